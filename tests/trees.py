"""Random clustered layers for tests: right by construction, whatever clustering does."""

from itertools import pairwise

import torch

from squeezed.testing.layers import random_offsets, tree_over


def random_layer(
    kv_heads=2,
    tokens=300,
    dim=32,
    nodes=(6, 24),
    pinned=20,
    dtype=torch.float32,
    seed=0,
    keys=None,
    scale=0.2,
):
    """A `ClusteredLayer` with a random tree over random keys (or the given `[Hkv, P, D]` keys)."""
    generator = torch.Generator().manual_seed(seed)
    if keys is None:
        keys = torch.randn(kv_heads, tokens, dim, generator=generator)
    values = torch.randn(keys.shape, generator=generator)
    keys, values = keys.to(dtype), values.to(dtype)
    kv_heads, tokens, _ = keys.shape
    leaves = random_offsets(kv_heads, tokens - pinned, nodes[-1], generator) + pinned
    pairs = reversed(list(pairwise(nodes)))
    children = [random_offsets(kv_heads, fine, coarse, generator) for coarse, fine in pairs][::-1]
    positions = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(kv_heads)])
    slope = 0.3 * torch.randn(kv_heads, keys.shape[2], keys.shape[2], generator=generator)
    slope, positions = slope.to(keys.dtype), positions.int()
    return tree_over(keys, values, leaves, children, slope, scale, positions)


def far_alpha_for(layer, far_field, group=1):
    """Weights `[Hq]` where the far field is of second order, else `None`."""
    if far_field != "second_order":
        return None
    return torch.linspace(0.2, 0.9, layer.kv_heads * group, device=layer.device)
