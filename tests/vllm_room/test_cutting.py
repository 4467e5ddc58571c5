import math
from dataclasses import replace

import pytest
import torch
from saved import BLOCK, made

import squeezed
from squeezed.attention.interface import Suffix
from squeezed.attention.reference import attend
from squeezed.context.layers import WindowLayer
from squeezed.context.storage.outline import Outline
from squeezed.vllm.cutting import (
    MERGED_TOKENS,
    Share,
    bytes_on,
    in_place,
    whole_blocks,
    without_last,
)


@pytest.mark.parametrize("block", [1, 16, 32, 64])
@pytest.mark.parametrize("tokens", [0, 3, 4, 5, 63, 64, 67, 68, 1000])
def test_whole_blocks_leave_the_tokens_that_may_be_merged(tokens, block):
    kept = whole_blocks(tokens, block)
    assert kept % block == 0
    assert kept == 0 or tokens - kept >= MERGED_TOKENS
    assert tokens - kept < MERGED_TOKENS + block


def asked(layer, heads, rows, suffix, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kv, _, dim = layer.keys.shape
    query = torch.randn(2, heads, rows, dim, generator=generator)
    keys, values = torch.randn(2, 2, kv, suffix, dim, generator=generator)
    return query, keys, values


def tail_of(layer, dropped):
    """Keys and values of the document's last tokens, relative to the layer's centre."""
    rows = layer.pinned - dropped, layer.pinned
    return layer.keys[:, slice(*rows)], layer.values[:, slice(*rows)]


@pytest.mark.parametrize("dropped", [0, 4, 17, 67])
@pytest.mark.parametrize("budget", [1.0, 0.1])
def test_a_cut_layer_and_its_tail_as_suffix_are_the_whole_layer(dropped, budget):
    context = squeezed.load(made()[0])
    for number, layer in enumerate(context.clustered_layers):
        rule = context.calibration("best").rule(number, budget, block=False)
        query, keys, values = asked(layer, 4, 3, 5)
        wanted, mass, read = attend(query, layer, rule, Suffix(keys, values))
        cut = without_last(layer, dropped)
        last = [x.expand(2, -1, -1, -1) for x in tail_of(layer, dropped)]
        joined = [torch.cat(pair, 2) for pair in zip(last, (keys, values), strict=True)]
        mask = torch.ones(3, dropped + 5, dtype=torch.bool).tril(dropped + 2)[None, None]
        got, mass_of_cut, read_of_cut = attend(query, cut, rule, Suffix(*joined, mask))
        assert cut.tokens == layer.tokens - dropped
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mass_of_cut, mass, atol=1e-5, rtol=1e-5)
        assert torch.equal(read, read_of_cut)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("preset", ["best", "paper"])
def test_ranks_answer_together_as_one(ranks, preset):
    """Two KV heads on four ranks: each is held twice, by half of its query heads each."""
    context = squeezed.load(made()[0])
    layer = context.clustered_layers[0]
    rule = context.calibration(preset).rule(0, 1.0, block=False)
    query, keys, values = asked(layer, 4, 2, 3)
    wanted = attend(query, layer, rule, Suffix(keys, values)).output
    parts = []
    for rank in range(ranks):
        share = Share(rank, ranks)
        kv, own = share.heads(2), share.heads(4)
        cut = in_place(share.layer(layer), torch.device("cpu"))
        suffix = Suffix(keys[:, kv], values[:, kv])
        parts.append(attend(query[:, own], cut, share.rule(rule), suffix).output)
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-5, rtol=1e-5)


def test_ranks_share_every_head_once():
    for heads, ranks in ((8, 1), (8, 4), (12, 3), (3, 2)):
        own = [Share(rank, ranks).heads(heads) for rank in range(ranks)]
        assert [head for part in own for head in range(part.start, part.stop)] == list(range(heads))


def test_bytes_are_those_of_the_tensors():
    context = squeezed.load(made()[0])
    tokens = len(context.tokens)
    for layer, outline in zip(context.layers, context.outlines, strict=True):
        held = sum(t.numel() * t.element_size() for t in layer.tensors())
        assert held <= bytes_on(outline, tokens, Share()) <= held * 1.02
        halves = [bytes_on(outline, tokens, Share(rank, 2)) for rank in range(2)]
        assert math.isclose(sum(halves), bytes_on(outline, tokens, Share()), rel_tol=0.001)
    window = WindowLayer(torch.zeros(2, 5, 16), torch.zeros(2, 5, 16), 90)
    assert bytes_on(Outline.of(window), 90, Share()) >= window.kv_bytes()


def test_a_layer_in_place_has_memory_of_its_own():
    layer = squeezed.load(made()[0]).clustered_layers[0]
    cut = in_place(Share(1, 2).layer(layer), torch.device("cpu"))
    assert all(tensor.is_contiguous() for tensor in cut.tensors())
    assert torch.equal(cut.keys, layer.keys[1:])
    assert replace(cut).tokens == layer.tokens
    assert BLOCK == 16
