"""What a meter counts while answers are forced."""

import torch
from tiny import document, tiny_model, tiny_tokenizer

from squeezed import engine
from squeezed.context.prompt import PromptTemplate
from squeezed.hf.build import build_cache
from squeezed.measure.accuracy.meter import ErrorHistogram, Meter
from squeezed.measure.agreement import forced_logits
from squeezed.methods import create


def test_meter_counts_bytes_of_kept_and_pinned_rows():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    context = engine.index(model, tokenizer, document(500), template=PromptTemplate.plain())
    meter, tokens = Meter(), len(context.tokens)
    layers = create("streaming").prepare(context, 0.25)
    cache = meter.metering(build_cache(context, layers, 0.25))
    parts = [(torch.arange(40, 45), torch.arange(60, 64))]
    forced_logits(model, cache, parts)
    pinned = 116
    kept = round(0.25 * (tokens - pinned))
    assert meter.spent()["keys_share"] == kept / (tokens - pinned)
    assert abs(meter.spent()["bytes_share"] - (pinned + kept) / tokens) < 1e-9


def test_meter_measures_no_token_that_only_fills_up_a_batch():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    context = engine.index(model, tokenizer, document(500), template=PromptTemplate.plain())
    parts = [(torch.arange(40, 43), torch.arange(60, 60 + t)) for t in (3, 9)]

    def measured(some):
        meter = Meter(measure_errors=True)
        layers = create("best", implementation="reference").prepare(context, 0.1)
        forced_logits(model, meter.metering(build_cache(context, layers, 0.1)), some)
        return meter

    together, alone = measured(parts), [measured([part]) for part in parts]
    assert [layer.number for layer in together.errors] == [
        model.config.num_attention_heads * (2 + 8)
    ] * len(together.errors)
    assert together.keys == sum(meter.keys for meter in alone)
    for name in ("keys_read", "bytes_read"):
        expected = sum(float(getattr(meter, name)) for meter in alone)
        assert abs(float(getattr(together, name)) - expected) < 1e-3 * expected, name


def test_error_histogram_keeps_mean_and_quantiles():
    errors = torch.logspace(-4, 1, 1000)
    whole, halves = ErrorHistogram(), ErrorHistogram()
    whole.add(errors)
    for part in errors.split(500):
        other = ErrorHistogram()
        other.add(part)
        halves.merge(ErrorHistogram.of(other.record()))
    assert torch.equal(halves.counts, whole.counts)
    assert abs(whole.mean - float(errors.mean())) < 1e-3
    for share in (0.5, 0.99):
        true = float(errors.quantile(share))
        assert true * 0.99 <= whole.quantile(share) <= true * 1.13
