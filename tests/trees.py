"""Random clustered layers for tests: right by construction, whatever clustering does."""

import torch

from squeezed.context.layers import ClusteredLayer, Level


def random_offsets(heads, members, nodes, generator):
    """Non-decreasing `[heads, nodes + 1]` from 0 to `members`; empty nodes occur."""
    cuts = torch.randint(0, members + 1, (heads, nodes - 1), generator=generator).sort(-1).values
    zero, end = torch.zeros(heads, 1), torch.full((heads, 1), members)
    return torch.cat([zero, cuts, end], -1).to(torch.int32)


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
    members, child_offsets, key_offsets = tokens - pinned, [None], None
    key_offsets = [random_offsets(kv_heads, members, nodes[-1], generator) + pinned]
    for coarse, fine in zip(nodes[-2::-1], nodes[:0:-1], strict=True):
        children = random_offsets(kv_heads, fine, coarse, generator)
        child_offsets.insert(0, children)
        key_offsets.insert(0, key_offsets[0].gather(1, children.long()))
    levels = [
        level_of(keys, values, offsets, children)
        for offsets, children in zip(key_offsets, child_offsets, strict=True)
    ]
    positions = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(kv_heads)])
    slope = 0.3 * torch.randn(kv_heads, keys.shape[2], keys.shape[2], generator=generator)
    slope, centre = slope.to(keys.dtype), torch.zeros_like(keys[:, 0])
    levels = tuple(levels)
    return ClusteredLayer(keys, values, positions.int(), pinned, levels, slope, centre, scale)


def level_of(keys, values, key_offsets, child_offsets):
    heads, nodes = key_offsets.shape[0], key_offsets.shape[1] - 1
    centroids = torch.zeros(heads, nodes, keys.shape[-1])
    mean_values, variance = torch.zeros_like(centroids), torch.zeros(heads, nodes)
    for head in range(heads):
        for node in range(nodes):
            rows = slice(int(key_offsets[head, node]), int(key_offsets[head, node + 1]))
            if rows.stop > rows.start:
                inside = keys[head, rows].float()
                centroids[head, node] = inside.mean(0)
                mean_values[head, node] = values[head, rows].float().mean(0)
                variance[head, node] = inside.var(0, unbiased=False).mean()
    return Level(
        centroids.to(keys.dtype), mean_values.to(keys.dtype), variance, key_offsets, child_offsets
    )


def far_alpha_for(layer, far_field, group=1):
    """Weights `[Hq]` where the far field is of second order, else `None`."""
    if far_field != "second_order":
        return None
    return torch.linspace(0.2, 0.9, layer.keys.shape[0] * group, device=layer.keys.device)
