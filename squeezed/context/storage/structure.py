"""What the tensors of a saved layer must be, before a kernel sees them, and the layer they make.

The table of them is in `outline`. What no table can say of one tensor alone (offsets that end where
the next level ends, positions that are a permutation) is checked here. No check trusts a number
before another one has bounded it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from squeezed.context.encoding import ENCODINGS
from squeezed.context.layers import ClusteredLayer, Level, WindowLayer
from squeezed.context.rows import PLAIN, Codes, Rows
from squeezed.context.storage.outline import (
    CLUSTERED,
    DTYPES,
    LEVEL,
    Field,
    Outline,
    fields_of,
)
from squeezed.context.storage.strict import Malformed
from squeezed.errors import shown

CODES = {"keys": "key_codes", "values": "value_codes"}
"""Names in a file of what `Codes` calls otherwise: there plain rows have them."""


def check_outline(outline: Outline, tokens: int) -> None:
    """Raise `Malformed` for a layer that no document of so many tokens can have."""
    rows, pinned, nodes = outline.rows, outline.pinned, outline.nodes
    if not outline.is_clustered:
        _require(rows <= tokens and not pinned and not nodes, "a window wider than the document")
        _require(outline.encoding == PLAIN, "a window with encoded rows")
        return
    _require(bool(nodes) or outline.encoding == PLAIN, "encoded rows without clusters")
    packed = outline.encoding != PLAIN and ENCODINGS[outline.encoding].packed
    _require(not packed or outline.dim % 2 == 0, "two codes to a byte in an odd dimension")
    _require(rows == tokens, f"{rows} rows for {tokens} tokens")
    _require(pinned < rows if nodes else pinned == rows, f"{pinned} of {rows} rows are pinned")
    _require(all(count <= rows - pinned for count in nodes), "more nodes than rows")


def check_layer(tensors: Mapping[str, Tensor], outline: Outline, tokens: int) -> None:
    """Raise `Malformed` unless the tensors are exactly those of such a layer."""
    wanted = {name: (field, sizes) for name, field, sizes in fields_of(outline, tokens)}
    wrong = sorted(set(tensors) ^ set(wanted))
    if wrong:
        raise Malformed(f"{shown(wrong[0])} is missing or unknown")
    for name, (field, sizes) in wanted.items():
        check_tensor(name, tensors[name], field, sizes, DTYPES[outline.dtype])
    if outline.is_clustered:
        _check_positions(tensors["positions"], outline.pinned)
        for depth in range(len(outline.nodes)):
            _check_offsets(tensors, depth)


def check_tensor(
    name: str, tensor: Tensor, field: Field, sizes: Mapping[str, int], dtype: torch.dtype
) -> None:
    """Raise `Malformed` for another shape or dtype, or a number out of the field's range."""
    shape = tuple(sizes[size] for size in field.sizes)
    dtypes = field.dtypes or (dtype,)
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise Malformed(
            f"{name}: expected shape {shape} of {dtypes[0]}, got {tuple(tensor.shape)} of "
            f"{tensor.dtype}"
        )
    if not tensor.numel():
        return
    found_low, found_high = (float(x) for x in tensor.aminmax())
    most = torch.finfo(torch.float64).max
    low, high = _bound(field.low, -most, sizes), _bound(field.high, most, sizes)
    if not (low <= found_low and found_high <= high):  # also if they are NaN
        raise Malformed(f"{name}: numbers from {found_low} to {found_high}, out of its range")


def _bound(bound: str | int | None, otherwise: float, sizes: Mapping[str, int]) -> float:
    if bound is None:
        return otherwise
    return sizes[bound] if isinstance(bound, str) else bound


def _check_positions(positions: Tensor, pinned: int) -> None:
    """Every head's rows are the document's tokens, each once; the pinned ones in order."""
    rows = positions.long()
    seen = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device).scatter_(1, rows, True)
    _require(bool(seen.all()), "positions: not every token has a row")
    front = rows[:, :pinned]
    same = bool((front == front[:1]).all()) and bool((front.diff(dim=1) > 0).all())
    _require(same, "positions: the pinned tokens are not in order")


def _check_offsets(tensors: Mapping[str, Tensor], depth: int) -> None:
    """Nodes lie end to end, and the children of each hold exactly its rows."""
    name = f"level{depth}.key_offsets"
    keys, low, high = tensors[name], tensors["pinned"], tensors["positions"].shape[1]
    _check_ends(name, keys, low, high)
    children = tensors.get(f"level{depth}.child_offsets")
    if children is None:
        return
    finer = tensors[f"level{depth + 1}.key_offsets"]
    _check_ends(f"level{depth}.child_offsets", children, 0, finer.shape[1] - 1)
    nested = bool((finer.gather(1, children.long()) == keys).all())
    _require(nested, f"{name}: the children of a node do not hold its rows")


def _check_ends(name: str, offsets: Tensor, first: Tensor | int, last: int) -> None:
    good = (offsets[:, 0] == first).all() & (offsets[:, -1] == last).all()
    _require(bool(good & (offsets.diff(dim=1) >= 0).all()), f"{name}: not one run after the other")


def _require(good: bool, complaint: str) -> None:
    if not good:
        raise Malformed(complaint)


def tensors_of(layer: ClusteredLayer | WindowLayer) -> dict[str, Tensor]:
    """The tensors of a layer by their names in its file."""
    if isinstance(layer, WindowLayer):
        own = {"keys": layer.keys, "values": layer.values}
        return own | {"window_tokens": torch.tensor(layer.tokens)}
    found = {field.name: getattr(layer, field.name) for field in CLUSTERED}
    found["pinned"] = torch.tensor(layer.pinned)
    found |= _tensors_of_rows(layer.rows)
    for depth, level in enumerate(layer.levels):
        own = {f"level{depth}.{field.name}": getattr(level, field.name) for field in LEVEL}
        found |= {name: tensor for name, tensor in own.items() if tensor is not None}
    return found


def _tensors_of_rows(rows: Rows) -> dict[str, Tensor]:
    if rows.codes is None:
        return dict(zip(("keys", "values"), rows.plain(), strict=True))
    codes = {CODES.get(name, name): tensor for name, tensor in rows.codes.named().items()}
    return {"keys": rows.keys, "values": rows.values, **codes}


def layer_of(
    tensors: Mapping[str, Tensor], outline: Outline, scale: float | None
) -> ClusteredLayer | WindowLayer:
    """The layer that was checked; `scale` is its softmax scale, `None` of a window."""
    if not outline.is_clustered:
        return WindowLayer(tensors["keys"], tensors["values"], int(tensors["window_tokens"]))
    assert scale is not None
    levels = tuple(_level(tensors, depth) for depth in range(len(outline.nodes)))
    codes = None
    if outline.encoding != PLAIN:
        named = {field.name: tensors[CODES.get(field.name, field.name)] for field in fields(Codes)}
        codes = Codes(**named)
    rows = Rows(tensors["keys"], tensors["values"], outline.encoding, codes)
    found = {field.name: tensors[field.name] for field in CLUSTERED if field.name != "pinned"}
    pinned = int(tensors["pinned"])
    return ClusteredLayer(rows=rows, levels=levels, pinned=pinned, scale=scale, **found)


def _level(tensors: Mapping[str, Tensor], depth: int) -> Level:
    found = {field.name: tensors.get(f"level{depth}.{field.name}") for field in LEVEL}
    return Level(**{name: tensor for name, tensor in found.items() if tensor is not None})
