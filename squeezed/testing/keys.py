"""Keys, values and queries with the statistics of real models, which random numbers do not have.

Measured on Qwen2.5, SmolLM2 and Gemma 3 (DESIGN.md): keys share a large part, for projections have
biases; a few directions hold most of what tells them apart; some tokens lie far out; and a document
repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

TOPIC_TOKENS = 24
"""Neighbouring tokens that share a topic."""


@dataclass(frozen=True)
class KeyStatistics:
    """What keys of one layer are like; lengths are in deviations of a key from the mean key.

    Attributes:
        common: norm of the part that all keys of a head share.
        turning: share of that part that rotates along the document, as rotary embedding turns a
            bias.
        decay: the `i`-th direction's deviation falls as `(i + 1) ** -decay`; 0 is isotropic.
        tail: degrees of freedom of Student's t, by which tokens lie farther out; `None`: Gaussian.
        repeated: share of the tokens that are near-copies of an earlier one.
        value_scale: norm of a value.
        query_scale: norm of a query times the softmax scale: deviations of its logits.
    """

    common: float = 0.0
    turning: float = 0.0
    decay: float = 0.5
    tail: float | None = None
    repeated: float = 0.0
    value_scale: float = 1.0
    query_scale: float = 2.0

    def but(self, **changes: Any) -> KeyStatistics:
        return replace(self, **changes)


REAL_LIKE = {
    "plain": KeyStatistics(),
    "common 10": KeyStatistics(common=10.0),
    "common 100": KeyStatistics(common=100.0),
    "common 1000": KeyStatistics(common=1000.0),
    "turning": KeyStatistics(common=30.0, turning=0.2),
    "few directions": KeyStatistics(common=3.0, decay=1.5),
    "heavy tails": KeyStatistics(common=10.0, tail=3.0),
    "near-duplicates": KeyStatistics(common=50.0, repeated=0.7),
    "large values": KeyStatistics(common=10.0, value_scale=1000.0),
    "sharp queries": KeyStatistics(common=50.0, query_scale=20.0),
}
"""Kinds of keys by name; `common 100` with `few directions` is nearest to Qwen2.5's first layer."""


@dataclass(frozen=True)
class Drawn:
    """A document and what follows it, in one layer.

    Attributes:
        keys, values: `[Hkv, P, D]`, as a model hands them over.
        suffix_keys, suffix_values: `[1, Hkv, S, D]`, of the same kind.
        probe: `[Hq, W, D]`, queries that calibrate.
        query: `[1, Hq, Q, D]`.
        scale: softmax scale.
    """

    keys: Tensor
    values: Tensor
    suffix_keys: Tensor
    suffix_values: Tensor
    probe: Tensor
    query: Tensor
    scale: float


def draw(
    kind: KeyStatistics,
    tokens: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    group: int = 1,
    suffix: int = 8,
    probe: int = 32,
    rows: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Drawn:
    """Draw a layer of that kind; the same seed gives the same draw.

    Args:
        group: query heads per KV head.
        probe, rows: queries of the probe and of the question.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    every = tokens + suffix
    axes = torch.linalg.qr(normal(heads, dim, dim)).Q
    strength = torch.arange(1, dim + 1, device=device, dtype=torch.float32) ** -kind.decay
    strength = strength / strength.square().sum().sqrt()
    basis = strength[:, None] * axes  # [heads, dim, dim]: rows are directions with their deviations
    parts = 0.6 * normal(heads, every, dim)
    topics = -(-every // TOPIC_TOKENS)
    parts += 0.8 * normal(heads, topics, dim).repeat_interleave(TOPIC_TOKENS, 1)[:, :every]
    parts *= _stretch(kind.tail, every, generator, device)
    parts = _repeat(parts, kind.repeated, generator)
    keys = parts @ basis + kind.common * _common(kind.turning, every, normal(heads, dim))
    values = (
        kind.value_scale * dim**-0.5 * (normal(heads, every, dim) + 0.5 * normal(heads, 1, dim))
    )
    wanted = normal(heads, group, probe + rows, dim) + 0.5 * normal(heads, group, 1, dim)
    scale = dim**-0.5
    queries = wanted @ axes[:, None] * (kind.query_scale / scale)
    queries = queries.flatten(0, 1).to(dtype)
    keys, values = keys.to(dtype), values.to(dtype)
    return Drawn(
        keys[:, :tokens].contiguous(),
        values[:, :tokens].contiguous(),
        keys[None, :, tokens:].contiguous(),
        values[None, :, tokens:].contiguous(),
        queries[:, :probe].contiguous(),
        queries[None, :, probe:].contiguous(),
        scale,
    )


def _stretch(
    tail: float | None, tokens: int, generator: torch.Generator, device: torch.device | str
) -> Tensor | float:
    """How far out every token lies, `[tokens, 1]`: what makes a Gaussian Student's t."""
    if tail is None:
        return 1.0
    halves = torch.randn(tokens, round(tail), generator=generator, device=device).square().mean(-1)
    return halves.clamp(min=1e-2).rsqrt()[:, None]


def _repeat(parts: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Make a share of the tokens near-copies of an earlier token."""
    heads, tokens, dim = parts.shape
    device = parts.device
    copies = torch.rand(tokens, generator=generator, device=device) < share
    source = (torch.rand(tokens, generator=generator, device=device) * 0.2 * tokens).long()
    noise = 1e-3 * torch.randn(heads, tokens, dim, generator=generator, device=device)
    return torch.where(copies[:, None], parts[:, source] + noise, parts)


def _common(turning: float, tokens: int, direction: Tensor) -> Tensor:
    """Unit vectors that tokens share, `[heads, tokens, D]`; a part of them turns along the way."""
    heads, dim = direction.shape
    unit = torch.nn.functional.normalize(direction, dim=-1)[:, None].expand(heads, tokens, dim)
    if not turning:
        return unit
    angle = torch.linspace(0, torch.pi / 2, tokens, device=direction.device)[:, None]
    first, second = unit.chunk(2, -1)
    turned = torch.cat(
        [first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], -1
    )
    return (1 - turning) * unit + turning * turned
