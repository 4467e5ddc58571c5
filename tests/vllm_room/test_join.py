import pytest
import torch
from trees import random_layer

from squeezed.attention.interface import Attended, Suffix
from squeezed.attention.reference import attend
from squeezed.context.rule import SelectionRule
from squeezed.vllm import join as joining

KV_HEADS, HEADS, DIM, TOKENS = 2, 6, 32, 5


def parts(seed=0, dim=DIM, dtype=torch.float32):
    """A batch of tokens, what vLLM's kernel found for them, and a layer off its centre."""
    generator = torch.Generator().manual_seed(seed)
    layer = random_layer(KV_HEADS, 90, dim, (3, 9), 10, dtype, seed)
    layer.centre.copy_(torch.randn(KV_HEADS, dim, generator=generator) * 2)
    query = torch.randn(TOKENS, HEADS, dim, generator=generator).to(dtype)
    keys, values = torch.randn(2, TOKENS, KV_HEADS, 7, dim, generator=generator).to(dtype)
    logits = torch.einsum("thd,thkd->htk", query, keys.repeat_interleave(3, 1)) * layer.scale
    own = logits.logsumexp(-1)
    weights = logits.softmax(-1).transpose(0, 1)
    output = torch.einsum("thk,thkd->thd", weights, values.repeat_interleave(3, 1))
    return layer, query, (keys, values), output, own


def rule_of(layer):
    return SelectionRule.for_all_heads((-3.0, -3.0), layer, None, "first_order")


@pytest.mark.parametrize("dim", [32, 24])
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("together", [True, False])
def test_two_softmaxes_become_the_one_over_all_keys(kernel, together, dim):
    """Of some tokens of the batch; the others stay as they are."""
    layer, query, (keys, values), output, own = parts(dim=dim)
    places = torch.tensor([3, 0, 4])
    asked = query[places]
    shaped = asked[:, :, None] if together else asked.transpose(0, 1)[None]
    found = attend(shaped, layer, rule_of(layer))
    found = found._replace(keys_read=torch.arange(len(found.keys_read)) * 10 + 40)
    before, reads = output.clone(), torch.arange(1, 1 + len(found.keys_read))
    if kernel:
        context, mass = map(joining._by_token, found[:2])
        counted = found.keys_read, reads
        joining._launch(context, mass, layer, query, output, own, places, counted)
    else:
        joining.join(found, layer, query, output, own, places, reads)
    assert torch.equal(reads, found.keys_read + torch.arange(1, 1 + len(reads)))
    recent = Suffix.of(layer, keys[places], values[places])
    wanted = attend(asked[:, :, None], layer, rule_of(layer), recent).output[:, :, 0]
    torch.testing.assert_close(output[places], wanted, atol=2e-5, rtol=2e-5)
    assert torch.equal(output[[1, 2]], before[[1, 2]])


@pytest.mark.parametrize("kernel", [False, True])
def test_rows_of_several_tokens_may_be_filled_up(kernel):
    layer, query, (keys, values), output, own = parts(1)
    places = torch.tensor([2, 4, 0, 1, -1, -1])
    asked = query[places.clamp(min=0)].unflatten(0, (2, 3)).transpose(1, 2)
    found = attend(asked, layer, rule_of(layer), valid=(places >= 0).view(2, 3))
    reads, before = torch.zeros(2, dtype=torch.int64), output.clone()
    if kernel:
        context, mass = map(joining._by_token, found[:2])
        counted = found.keys_read, reads
        joining._launch(context, mass, layer, query, output, own, places, counted)
    else:
        joining.join(found, layer, query, output, own, places, reads)
    assert reads.tolist() == found.keys_read.tolist()
    real = places[places >= 0]
    recent = Suffix.of(layer, keys[real], values[real])
    wanted = attend(query[real][:, :, None], layer, rule_of(layer), recent).output[:, :, 0]
    torch.testing.assert_close(output[real], wanted, atol=2e-5, rtol=2e-5)
    assert torch.equal(output[3], before[3])


@pytest.mark.parametrize("kernel", [False, True])
def test_masses_far_apart_do_not_overflow(kernel):
    layer, query, _, output, own = parts(3)
    places = torch.arange(TOKENS)
    found = attend(query[:, :, None], layer, rule_of(layer))
    before = output.clone()
    for shift, wanted in ((-1e4, before), (1e4, found.output[:, :, 0])):
        output.copy_(before)
        moved = Attended(found.output, found.log_mass + shift, found.keys_read)
        if kernel:
            context, mass = map(joining._by_token, moved[:2])
            joining._launch(context, mass, layer, query, output, own, places)
        else:
            joining.join(moved, layer, query, output, own, places)
        torch.testing.assert_close(output, wanted)
