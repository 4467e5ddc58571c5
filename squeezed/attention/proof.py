"""One tiny call of an implementation, so that what it lacks shows before a document is read."""

from __future__ import annotations

from functools import cache

import torch

from squeezed.attention import Suffix, choose, implementation
from squeezed.context.layers import ClusteredLayer, Level
from squeezed.context.rows import Rows
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError

HEADS, DIM, PINNED, LEAF, LEAVES = 1, 64, 16, 16, 3

TOLERANCE = 0.05
"""How far the output may be from dense attention, over its norm; rounding to 16 bits is less."""


@cache
def prove(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Let an implementation, by name or `auto`, answer a query over a few random keys.

    Args:
        device, dtype: of the keys of the contexts that it is to answer from.

    Raises:
        SqueezedError: it is unknown, cannot run on `device`, does not start, or is wrong.
    """
    port, scale = implementation(name, device), DIM**-0.5
    generator = torch.Generator().manual_seed(0)
    tokens = PINNED + LEAVES * LEAF + 1
    query, keys, values = (
        torch.randn(1, HEADS, rows, DIM, generator=generator).to(device, dtype)
        for rows in (1, tokens, tokens)
    )
    layer = _layer(keys[0, :, :-1], values[0, :, :-1])
    rule = SelectionRule.for_all_heads([-torch.inf], layer, None, "none")
    output = port(query, layer, rule, Suffix(keys[:, :, -1:], values[:, :, -1:])).output
    expected = (query.float() @ keys.float().mT * scale).softmax(-1) @ values.float()
    error = (output.float() - expected).norm() / expected.norm()
    if not error < TOLERANCE:
        raise SqueezedError(
            f"implementation: {choose(name, device)!r} is wrong on this machine: of a small query "
            f"its output is {float(error):.2f} from dense attention; use 'reference', and please "
            "report it"
        )


def _layer(keys: torch.Tensor, values: torch.Tensor) -> ClusteredLayer:
    """Keys and values `[Hkv, P, D]` as a layer of one level."""
    leaves = (x[:, PINNED:].unflatten(1, (LEAVES, LEAF)) for x in (keys, values))
    means, mean_values = (x.float().mean(2).to(keys.dtype) for x in leaves)
    ends = PINNED + LEAF * torch.arange(LEAVES + 1, dtype=torch.int32, device=keys.device)
    variance = means.new_zeros(HEADS, LEAVES, dtype=torch.float32)
    level = Level(means, mean_values, variance, ends.expand(HEADS, -1).contiguous())
    positions = torch.arange(keys.shape[1], dtype=torch.int16, device=keys.device)
    return ClusteredLayer(
        rows=Rows(keys.contiguous(), values.contiguous()),
        positions=positions.expand(HEADS, -1),
        pinned=PINNED,
        levels=(level,),
        value_slope=keys.new_zeros(HEADS, DIM, DIM),
        centre=keys.new_zeros(HEADS, DIM),
        scale=DIM**-0.5,
    )
