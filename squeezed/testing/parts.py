"""Keys, values and queries with the structure that matters here: topics, token types, sharp heads.

A key is what all keys of its head share, thirty times what tells them apart as in the first layer
of Qwen2.5, plus the topic of its stretch of the document, its token type and noise, which are
strong in few directions and weak in most. Queries are drawn from the same parts, so neighbours
among them want similar keys, and heads differ in sharpness, so that they keep different shares
under one threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STRETCH = 64  # tokens that share a topic
COMMON = 30.0  # deviations
DECAY = 0.5  # a direction's strength falls with its number to this power


@dataclass(frozen=True)
class Parts:
    """What keys and queries of one layer are made of: `[Hkv, topics, D]`, `[Hkv, types, D]`."""

    topics: Tensor
    types: Tensor
    sharpness: Tensor  # [Hkv, 1, 1]
    strength: Tensor  # [D]
    common: Tensor  # [Hkv, 1, D]
    generator: torch.Generator

    @staticmethod
    def of(heads: int, dim: int, device: str, seed: int = 0) -> Parts:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, generator=generator)

        sharpness = torch.linspace(0.7, 1.4, heads, device=device)[:, None, None]
        strength = torch.arange(1, dim + 1, device=device, dtype=torch.float32) ** -DECAY
        strength = strength * (dim / strength.square().sum()).sqrt()
        topics, types = normal(heads, 256, dim), normal(heads, 1024, dim)
        common = COMMON * normal(heads, 1, dim)
        return Parts(topics, types, sharpness, strength, common, generator)

    def draw(self, tokens: int, noise: float = 0.6) -> Tensor:
        """`[Hkv, tokens, D]` float32; token types follow a Zipf-like law, as words do."""
        device, generator = self.topics.device, self.generator
        stretches = -(-tokens // STRETCH)
        topic = torch.randint(
            self.topics.shape[1], (stretches,), device=device, generator=generator
        )
        topic = topic.repeat_interleave(STRETCH)[:tokens]
        uniform = torch.rand(tokens, device=device, generator=generator)
        kind = (self.types.shape[1] ** uniform).long() - 1
        x = torch.randn(
            self.topics.shape[0], tokens, self.topics.shape[2], device=device, generator=generator
        )
        return (
            x.mul_(noise)
            .add_(self.topics[:, topic], alpha=0.6)
            .add_(self.types[:, kind], alpha=0.5)
            .mul_(self.strength)
        )

    def keys(self, tokens: int, dtype: torch.dtype) -> Tensor:
        return self.draw(tokens).add_(self.common).to(dtype)

    def queries(self, rows: int, group: int, dtype: torch.dtype) -> Tensor:
        """`[1, Hkv * group, rows, D]`."""
        drawn = [self.draw(rows) * (2 * self.sharpness) for _ in range(group)]
        return torch.stack(drawn, 1).flatten(0, 1)[None].to(dtype)
