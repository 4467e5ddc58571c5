"""Teacher forcing against one plain forward pass, and distances against their formulas."""

import torch
from tiny import document, tiny_model, tiny_tokenizer

from squeezed import engine
from squeezed.context.prompt import PromptTemplate
from squeezed.measure.accuracy.asking import compare, forced_logits, metered_cache
from squeezed.measure.accuracy.meter import ErrorHistogram, Meter
from squeezed.methods import create


def test_forced_logits_of_dense_equal_a_plain_forward_pass():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    context = engine.index(model, tokenizer, document(500), template=PromptTemplate.plain())
    parts = [
        (torch.arange(40, 40 + n), torch.arange(60, 60 + t)) for n, t in ((3, 5), (9, 1), (6, 8))
    ]
    layers = create("dense").prepare(context, 1.0)
    cache = metered_cache(context, layers, Meter(), 1.0)
    found = forced_logits(model, tokenizer, context, cache, parts)
    for (asked, answer), logits in zip(parts, found, strict=True):
        with torch.inference_mode():
            whole = model(torch.cat([context.tokens, asked, answer])[None]).logits[0]
        expected = whole[len(context.tokens) + len(asked) - 1 : -1]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_meter_counts_bytes_of_kept_and_pinned_rows():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    context = engine.index(model, tokenizer, document(500), template=PromptTemplate.plain())
    meter, tokens = Meter(), len(context.tokens)
    cache = metered_cache(context, create("streaming").prepare(context, 0.25), meter, 0.25)
    parts = [(torch.arange(40, 45), torch.arange(60, 64))]
    forced_logits(model, tokenizer, context, cache, parts)
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
        forced_logits(model, tokenizer, context, metered_cache(context, layers, meter, 0.1), some)
        return meter

    together, alone = measured(parts), [measured([part]) for part in parts]
    assert [layer.number for layer in together.errors] == [
        model.config.num_attention_heads * (2 + 8)
    ] * len(together.errors)
    assert together.keys == sum(meter.keys for meter in alone)
    for name in ("keys_read", "bytes_read"):
        expected = sum(float(getattr(meter, name)) for meter in alone)
        assert abs(float(getattr(together, name)) - expected) < 1e-3 * expected, name


def test_compare_gives_divergence_agreement_and_nll():
    dense = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    ours = torch.tensor([[0.0, 2.0, 1.0], [0.0, 3.0, 0.0]])
    found = compare(ours, dense, torch.tensor([1, 1]))
    p, q = dense.softmax(-1), ours.softmax(-1)
    assert abs(found["kl"] - float((p * (p / q).log()).sum() / 2)) < 1e-6
    assert found["top1"] == 0.5
    assert found["exact"] == 1.0 and compare(dense, dense, torch.tensor([1, 1]))["exact"] == 0.0
    assert abs(found["nll"] + float(q[:, 1].log().mean())) < 1e-6


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
