"""The user's tokens over encoded rows: the prefill kernels against the reference."""

from dataclasses import replace

import interpreter  # noqa: F401  before any kernel
import poison
import pytest
import torch
from devices import gpu
from test_triton_coded import encodings, longest_difference
from test_triton_prefill import (
    DEVICE,
    inputs,
    layer_of,
    mask_of,
    rule_of,
    threshold_keeping,
    upper_threshold,
)
from trees import far_alpha_for

from squeezed.attention import Suffix
from squeezed.attention.scores import NEG_INF
from squeezed.attention.triton.prefill.launch import prefill
from squeezed.attention.triton.prefill.work import choose_tile
from squeezed.context.encoding import encoded
from squeezed.testing.compared import assert_matches_reference

TURNED = 2**-10
"""Relative error of a turned query, a float16 relative to its largest number, with room."""


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison.buffers(monkeypatch)


def check(layer, encoding, rule, query, keys, values, mask=None):
    """Output within twice the reference's own error and a rounding of the weights, equal counts."""
    layer = replace(encoded(layer, encoding), scale=query.shape[-1] ** -0.5).to(DEVICE)
    group = query.shape[1] // layer.kv_heads
    rule = replace(rule, far_alpha=far_alpha_for(layer, rule.far_field, group))
    valid = None if mask is None else mask.any(-1)[:, 0]
    operands = query, layer, rule, Suffix(keys, values, mask), valid
    found = prefill(*operands)
    reach = layer.scale * float(query.double().norm(dim=-1).max()) * longest_difference(layer)
    rounding = max(torch.finfo(t).eps for t in (torch.float16, query.dtype))
    assert_matches_reference(found, *operands, floor=rounding, mass_floor=TURNED * reach)
    return found.keys_read


@encodings
@pytest.mark.parametrize("tokens", [200, gpu(3000)])
@pytest.mark.parametrize(
    ("group", "rows", "nodes", "far_field"),
    [
        (1, 13, (5, 20), "none"),
        (3, 8, (20,), "second_order"),
        (1, 9, (3, 9, 40), "first_order"),
    ],
)
def test_blocks_over_coded_rows_equal_reference(group, rows, nodes, far_field, tokens, encoding):
    layer = layer_of(nodes=nodes, tokens=tokens)
    query, keys, values = inputs(group=group, rows=rows)
    leaf = threshold_keeping(layer, query, 0.3, 8)
    rule = rule_of((upper_threshold(layer),) * (len(nodes) - 1) + (leaf,), far_field)
    keys_read = check(layer, encoding, rule, query, keys, values)
    assert 0 < int(keys_read) < 0.7 * layer.clustered * 2 * rows


@encodings
@pytest.mark.parametrize("dtype", [torch.float16, gpu(torch.bfloat16)])
@pytest.mark.parametrize(("group", "dim"), [(4, 64), (1, 96), (2, 128), (1, 80), gpu(2, 256)])
def test_blocks_over_coded_rows_equal_reference_for_head_shapes(group, dim, dtype, encoding):
    layer = layer_of(dim=dim, dtype=dtype)
    query, keys, values = inputs(group=group, dim=dim, dtype=dtype)
    rule = rule_of((upper_threshold(layer), threshold_keeping(layer, query, 0.3, 8)))
    check(layer, encoding, rule, query, keys, values)


@pytest.mark.parametrize("pinned", [0, 20])
def test_requests_with_padding_over_coded_rows_equal_reference(pinned):
    layer = layer_of(pinned=pinned)
    query, keys, values = inputs(rows=10, suffix=10, batch=3)
    mask = mask_of(10, 10, (0, 3, 9))
    check(layer, "int4", rule_of((NEG_INF, NEG_INF)), query, keys, values, mask)
    leaf = threshold_keeping(layer, query, 0.3, 8)
    check(layer, "int4", rule_of((NEG_INF, leaf), "second_order"), query, keys, values, mask)


def test_the_kernel_of_one_gpu_leaves_coded_rows_to_that_of_all():
    query = torch.zeros(1, 8, 512, 128, dtype=torch.bfloat16, device=DEVICE)
    sizes = type("Sizes", (), dict(group=4, block=128, dim=128, tiles=8))()
    assert not choose_tile(query, sizes, "none", coded=True).hopper
