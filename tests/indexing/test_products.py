"""Long products in pieces, and those of kept rows, against plain ones; under the interpreter."""

import interpreter
import pytest
import torch

from squeezed.indexing import products
from squeezed.indexing.triton import products as fused

DEVICE = interpreter.DEVICE
HALF_OR_NOT = [torch.float32, torch.float16]  # the interpreter multiplies bfloat16 as integers


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def rounding(dtype, length):
    """Sums of `length` products of about 1, which are exact, in float32."""
    return (
        dict(rtol=1e-5, atol=4e-7 * length)
        if dtype != torch.float32
        else dict(rtol=1e-4, atol=1e-4)
    )


@pytest.mark.parametrize("dtype", HALF_OR_NOT, ids=str)
@pytest.mark.parametrize("rows, length, dim", [(7, 5, 4), (20, 128, 16), (150, 200, 40)])
def test_long_product_equals_the_product(rows, length, dim, dtype, monkeypatch):
    monkeypatch.setattr(fused, "PIECE", 64)
    left = normal(2, length, rows, dtype=dtype).mT  # rows need not lie together
    right = normal(2, length + 3, dim, dtype=dtype, seed=1)[:, 3:]
    exact = (left.double() @ right.double()).float()
    torch.testing.assert_close(fused.long_product(left, right), exact, **rounding(dtype, length))
    if DEVICE == "cpu":
        found = products.long_product(left, right)
        torch.testing.assert_close(found, exact, **rounding(dtype, length))


@pytest.mark.parametrize("dtype", HALF_OR_NOT, ids=str)
@pytest.mark.parametrize("rules, group, queries", [(1, 1, 3), (8, 4, 5), (3, 40, 4)])
def test_kept_products_sum_the_rows_that_rules_keep(rules, group, queries, dtype, monkeypatch):
    monkeypatch.setattr(fused, "PIECE", 64)
    heads, length, nodes, dim = 2, 150, 9, 12
    weights = normal(heads, group * queries, length + 2, dtype=dtype).exp()[..., 2:]
    values = normal(heads, length + 2, dim, dtype=dtype, seed=1)[:, 2:]
    owner = (normal(heads, length, seed=2).abs() * 3).int().clamp(max=nodes - 1).sort(-1).values
    kept = normal(rules, heads, queries, nodes, seed=3) > 0
    rows = kept.gather(3, owner.long()[None, :, None].expand(rules, -1, queries, -1))
    rows = torch.cat([rows, torch.ones_like(rows[:1])]).repeat(1, 1, group, 1).transpose(0, 1)
    exact = weights.double()[:, None] * rows
    for found in (fused.kept_products(weights, values, owner, kept),) + (
        (products.kept_products(weights.float(), values.float(), owner, kept),)
        if DEVICE == "cpu"
        else ()
    ):
        sums, masses = found
        expected = (exact @ values.double()[:, None]).float()
        torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(masses, exact.sum(-1, keepdim=True).float())


@pytest.mark.parametrize("dtype", HALF_OR_NOT, ids=str)
def test_mapped_rows_are_as_precise_as_float32(dtype):
    rows, matrix = normal(2, 50, 16, dtype=dtype), normal(2, 16, 16, seed=1)
    exact = (rows.double() @ matrix.double()).float()
    torch.testing.assert_close(products.mapped_rows(rows, matrix), exact, rtol=1e-4, atol=1e-4)
