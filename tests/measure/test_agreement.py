"""Teacher forcing against one plain forward pass, and distances against their formulas."""

import pytest
import torch
from tiny import document, tiny_model, tiny_tokenizer

import squeezed
from squeezed.measure.agreement import compare, forced_logits


@pytest.fixture(scope="module")
def context():
    return squeezed.index(tiny_model("llama"), tiny_tokenizer(), document(700))


def ids_of(text):
    return torch.tensor(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def test_compare_of_equal_logits_is_full_agreement():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    same = compare(logits, logits, logits.argmax(-1))
    assert same.identical == same.top1 == 1.0 and same.tokens == 5
    assert same.kl == pytest.approx(0.0, abs=1e-6) and same.scores()["exact"] == 1.0


def test_compare_gives_divergence_agreement_and_likelihood():
    dense = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    ours = torch.tensor([[0.0, 2.0, 1.0], [0.0, 3.0, 0.0]])
    found = compare(ours, dense, torch.tensor([1, 1]))
    p, q = dense.double().softmax(-1), ours.double().softmax(-1)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum() / 2), rel=1e-5)
    assert found.nll == pytest.approx(-float(q[:, 1].log().mean()), rel=1e-5)
    assert found.top1 == 0.5 and found.identical == 1.0
    assert found.scores() == {"kl": found.kl, "top1": 0.5, "nll": found.nll, "exact": 1.0}
    itself = compare(dense, dense, torch.tensor([1, 1]))
    assert itself.identical == 0.5 and itself.scores()["exact"] == 0.0


def test_forced_logits_of_everything_kept_are_the_models_own(context):
    model = tiny_model("llama")
    parts = [
        (torch.arange(40, 40 + n), torch.arange(60, 60 + t)) for n, t in ((3, 5), (9, 1), (6, 8))
    ]
    found = forced_logits(model, context.cache(1.0, implementation="reference"), parts)
    for (asked, answer), logits in zip(parts, found, strict=True):
        with torch.inference_mode():
            whole = model(torch.cat([context.tokens, asked, answer])[None]).logits[0]
        expected = whole[-len(answer) - 1 : -1]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_forced_logits_of_a_batch_are_those_of_each(context):
    model, parts = (
        tiny_model("llama"),
        [(ids_of("a?"), ids_of("mu")), (ids_of("x"), ids_of("nu z"))],
    )
    together = forced_logits(model, context.cache(0.2, implementation="reference"), parts)
    for part, found in zip(parts, together, strict=True):
        (alone,) = forced_logits(model, context.cache(0.2, implementation="reference"), [part])
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)


def test_forced_logits_select_token_by_token_as_decoding_does(context):
    model, question, answer = tiny_model("llama"), ids_of("What is alpha?"), ids_of(document(90))
    forced = context.cache(0.1, implementation="reference")
    (together,) = forced_logits(model, forced, [(question, answer)])
    stepped = context.cache(0.1, implementation="reference")
    rows = forced_logits(model, stepped, [(question, answer[:1])])
    for token in answer[:-1]:  # 90 tokens: more than select alone in a longer input
        rows += forced_logits(model, stepped, [(token[None], answer[:1])])
    torch.testing.assert_close(together, torch.cat(rows), rtol=1e-3, atol=1e-3)
