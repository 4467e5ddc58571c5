"""Which tensors a saved layer has: names, named sizes, dtypes and bounds.

`CLUSTERED`, `LEVEL`, `WINDOW` and `OBSERVED_QUERIES` are the whole table, with `KEYS_AND_VALUES` or
`ENCODED` for the rows: a field of a layer is one line there. Sizes are named, and a name means the
same size wherever it stands; `Outline` gives them for each layer, in the description of the
context.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from squeezed.config import RowsName, check_rows
from squeezed.context.encoding import ENCODINGS
from squeezed.context.layers import ClusteredLayer, WindowLayer
from squeezed.context.rows import PLAIN
from squeezed.context.storage.strict import Count, PositiveCount

DTypeName = Literal["float16", "bfloat16", "float32", "float64"]
DTYPES: dict[DTypeName, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
INDEX = (torch.int16, torch.int32)


@dataclass(frozen=True)
class Outline:
    """Shapes and dtype of a layer: enough to say, without opening it, what it is.

    Attributes:
        kind: the class of the layer.
        heads, rows, dim: those of its keys and values.
        dtype: of keys, values and their means.
        pinned: rows that every query reads; 0 in a window.
        nodes: of every level, coarse to fine.
        encoding: of the rows behind the pinned ones.
    """

    kind: Literal["ClusteredLayer", "WindowLayer"]
    heads: PositiveCount
    rows: Count
    dim: PositiveCount
    dtype: DTypeName
    pinned: Count
    nodes: tuple[PositiveCount, ...]
    encoding: RowsName = PLAIN

    @classmethod
    def of(cls, layer: ClusteredLayer | WindowLayer) -> Outline:
        if isinstance(layer, WindowLayer):
            heads, rows, dim = layer.keys.shape
            return cls("WindowLayer", heads, rows, dim, _name_of(layer.keys.dtype), 0, ())
        size = layer.kv_heads, layer.tokens, layer.dim, _name_of(layer.dtype)
        nodes = tuple(level.nodes for level in layer.levels)
        written = check_rows(layer.rows.encoding)
        return cls("ClusteredLayer", *size, layer.pinned, nodes, written)

    @property
    def is_clustered(self) -> bool:
        return self.kind == ClusteredLayer.__name__


def _name_of(dtype: torch.dtype) -> DTypeName:
    return next(name for name, known in DTYPES.items() if known == dtype)


@runtime_checkable
class OutlinedLayers(Protocol):
    """Layers that are opened when used, and say before what they are."""

    outlines: tuple[Outline, ...]


@dataclass(frozen=True)
class Field:
    """One tensor: name, named sizes, dtypes (`None`: that of the keys), lowest and highest number.

    A bound may be a named size; numbers are finite in any case.
    """

    name: str
    sizes: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] | None = None
    low: str | int | None = None
    high: str | int | None = None


KEYS_AND_VALUES = (
    Field("keys", ("heads", "rows", "dim")),
    Field("values", ("heads", "rows", "dim")),
)
ENCODED = (
    Field("keys", ("heads", "pinned", "dim")),
    Field("values", ("heads", "pinned", "dim")),
    Field("scales", ("heads", "clustered", "pair"), (torch.bfloat16,), 0),
    Field("key_turn", ("heads", "dim", "dim")),
    Field("value_turn", ("heads", "dim", "dim")),
)
"""Of encoded rows, with their codes (`codes_of`)."""
CLUSTERED = (
    Field("positions", ("heads", "rows"), INDEX, 0, "last_row"),
    Field("pinned", (), (torch.int64,), "pinned", "pinned"),
    Field("value_slope", ("heads", "dim", "dim")),
    Field("centre", ("heads", "dim")),
)
LEVEL = (
    Field("centroids", ("heads", "nodes", "dim")),
    Field("mean_values", ("heads", "nodes", "dim")),
    Field("variance", ("heads", "nodes"), (torch.float32,), 0),
    Field("key_offsets", ("heads", "ends"), (torch.int32,), "pinned", "rows"),
    Field("child_offsets", ("heads", "ends"), (torch.int32,), 0, "children"),  # but in the leaves
)
WINDOW = (*KEYS_AND_VALUES, Field("window_tokens", (), (torch.int64,), "tokens", "tokens"))
OBSERVED_QUERIES = Field("queries", ("query_heads", "observed", "dim"))


def fields_of(outline: Outline, tokens: int) -> Iterator[tuple[str, Field, dict[str, int]]]:
    """Every tensor of a layer: its name in the file, its field, and the sizes that are named."""
    sizes = {
        "heads": outline.heads,
        "rows": outline.rows,
        "last_row": outline.rows - 1,
        "dim": outline.dim,
        "pinned": outline.pinned,
        "tokens": tokens,
        "clustered": outline.rows - outline.pinned,
        "pair": 2,
    }
    if outline.encoding != PLAIN:
        sizes["width"] = ENCODINGS[outline.encoding].width(outline.dim)
    for field in _fields_of_rows(outline) if outline.is_clustered else WINDOW:
        yield field.name, field, sizes
    for depth, nodes in enumerate(outline.nodes):
        children = outline.nodes[depth + 1] if depth + 1 < len(outline.nodes) else None
        own = sizes | {"nodes": nodes, "ends": nodes + 1, "children": children or 0}
        for field in LEVEL:
            if field.name != "child_offsets" or children is not None:
                yield f"level{depth}.{field.name}", field, own


def _fields_of_rows(outline: Outline) -> tuple[Field, ...]:
    if outline.encoding == PLAIN:
        return *KEYS_AND_VALUES, *CLUSTERED
    encoding = ENCODINGS[outline.encoding]
    shape, dtypes = ("heads", "clustered", "width"), (encoding.dtype,)
    codes = (Field(name, shape, dtypes, *encoding.stored) for name in ("key_codes", "value_codes"))
    return *codes, *ENCODED, *CLUSTERED
