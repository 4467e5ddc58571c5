"""What one attention layer of a document becomes: keys and values in the order of a cluster tree.

Shapes: `Hkv` key/value heads, `P` context tokens, `C` clusters of a level, `D` head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from squeezed.context.rows import Rows


@dataclass(frozen=True)
class Level:
    """One level of the tree. Node `i` of a head holds the rows `key_offsets[i]:key_offsets[i+1]`.

    Attributes:
        centroids: `[Hkv, C, D]`, mean of the layer's keys in each node, in their dtype.
        mean_values: `[Hkv, C, D]`, mean of the values of each node.
        variance: `[Hkv, C]` float32, the keys' variance, mean over dimensions: of the raw keys, or
            of the keys in the space in which they were clustered (`squeezed.indexing.space`).
        key_offsets: `[Hkv, C + 1]` int32, rows of the layer's sorted keys. Empty nodes are allowed.
        child_offsets: `[Hkv, C + 1]` int32, nodes of the next finer level; `None` for the leaves.
    """

    centroids: Tensor
    mean_values: Tensor
    variance: Tensor
    key_offsets: Tensor
    child_offsets: Tensor | None = None

    @property
    def nodes(self) -> int:
        return self.centroids.shape[1]

    @property
    def sizes(self) -> Tensor:
        """Keys in each node, `[Hkv, C]` int64."""
        return self.key_offsets.long().diff(dim=-1)

    def to(self, device: torch.device | str) -> Level:
        return _moved(self, device)


@dataclass(frozen=True)
class ClusteredLayer:
    """A full-attention layer: exact keys and values, sorted by cluster, and the tree above them.

    Attributes:
        rows: keys and values, `[Hkv, P, D]`. Rows `[0, pinned)` are the pinned tokens, in document
            order and read by every query; the rest lie in the order of the leaves. Keys are
            relative to `centre`: those of the model are `keys + centre`.
        positions: `[Hkv, P]`, the document position of every row; int16 where that holds them.
        pinned: number of pinned rows, the same for all heads.
        levels: coarse to fine; empty if the document is too short to cluster.
        value_slope: `[Hkv, D, D]` in the dtype of the keys: how values move with their keys inside
            a leaf, for a variance of 1 (`squeezed.indexing.statistics.value_slope`). A query `q`
            moves the value of a node of variance `v` by `v * value_slope @ (s q)`.
        centre: `[Hkv, D]` in the dtype of the keys, what a head's keys have in common
            (`squeezed.indexing.clustering.common_part`). A softmax does not see what all its
            logits share, so whoever joins other keys to these subtracts it from them too
            (`centred`); mean keys of the levels are relative to it as well.
        scale: softmax scale, by which queries' products with keys are multiplied.
    """

    rows: Rows
    positions: Tensor
    pinned: int
    levels: tuple[Level, ...]
    value_slope: Tensor
    centre: Tensor
    scale: float

    @property
    def keys(self) -> Tensor:
        """`[Hkv, P, D]`, if they are plain."""
        return self.rows.plain()[0]

    @property
    def values(self) -> Tensor:
        """`[Hkv, P, D]`, if they are plain."""
        return self.rows.plain()[1]

    @property
    def tokens(self) -> int:
        return self.rows.tokens

    @property
    def kv_heads(self) -> int:
        return self.centre.shape[0]

    @property
    def dim(self) -> int:
        return self.centre.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's keys and values, and of all means."""
        return self.centre.dtype

    @property
    def device(self) -> torch.device:
        return self.centre.device

    def of_leaves(self, means: Tensor) -> Iterator[Tensor]:
        """What the clustered rows have from their leaves, `[P - pinned, D]` of one KV head after
        the other, from `means [Hkv, C, D]`."""
        for mean, sizes in zip(means, self.levels[-1].sizes, strict=True):
            yield mean.repeat_interleave(sizes, 0, output_size=self.clustered)

    def centred(self, keys: Tensor) -> Tensor:
        """Keys of the model `[..., Hkv, S, D]`, of the user's tokens say, relative to `centre`."""
        return keys - self.centre[:, None].to(keys.dtype)

    def common_logit(self, query: Tensor) -> Tensor:
        """What the model's logits have on top of those with centred keys, `scale * q.centre`.

        Args:
            query: `[B, Hq, Q, D]`.

        Returns:
            `[B, Hq, Q]` float32 (float64 for such queries): add it to a log mass of centred keys.
        """
        wide = query.to(torch.promote_types(query.dtype, torch.float32))
        grouped = wide.unflatten(1, (len(self.centre), -1))
        common = torch.einsum("bhgqd,hd->bhgq", grouped, self.centre.to(wide.dtype))
        return self.scale * common.flatten(1, 2)

    @property
    def clustered(self) -> int:
        """Rows that belong to clusters, per head."""
        return self.tokens - self.pinned

    def kv_bytes(self) -> int:
        return self.rows.kv_bytes()

    def index_bytes(self) -> int:
        """Bytes held on top of keys and values."""
        return sum(_bytes(t) for t in self.tensors()) - self.kv_bytes()

    def tensors(self) -> list[Tensor]:
        """Every tensor of the layer and of its levels."""
        records: tuple[Level | ClusteredLayer, ...] = (self, *self.levels)
        own = [tensor for record in records for tensor in _tensors(record).values()]
        return [*self.rows.tensors(), *own]

    def of_heads(self, own: slice) -> ClusteredLayer:
        """Some KV heads alone, as views."""
        levels = tuple(_sliced(level, own) for level in self.levels)
        return replace(_sliced(self, own), rows=self.rows.of_heads(own), levels=levels)

    def to(self, device: torch.device | str) -> ClusteredLayer:
        levels = tuple(level.to(device) for level in self.levels)
        return replace(_moved(self, device), rows=self.rows.to(device), levels=levels)


@dataclass(frozen=True)
class WindowLayer:
    """A sliding-window layer: it only ever sees its window, so its last keys are kept as they are.

    Attributes:
        keys, values: `[Hkv, W, D]`, the last tokens of the document in document order.
        tokens: length of the whole document.
    """

    keys: Tensor
    values: Tensor
    tokens: int

    def kv_bytes(self) -> int:
        return _bytes(self.keys, self.values)

    def index_bytes(self) -> int:
        return 0

    def to(self, device: torch.device | str) -> WindowLayer:
        return _moved(self, device)


Record = TypeVar("Record", Level, ClusteredLayer, WindowLayer)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _tensors(record: Level | ClusteredLayer | WindowLayer) -> dict[str, Tensor]:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _sliced(record: Record, own: slice) -> Record:
    rows: dict[str, Any] = {name: t[own] for name, t in _tensors(record).items()}
    return replace(record, **rows)


def _moved(record: Record, device: torch.device | str) -> Record:
    there: dict[str, Any] = {name: t.to(device) for name, t in _tensors(record).items()}
    return replace(record, **there)
