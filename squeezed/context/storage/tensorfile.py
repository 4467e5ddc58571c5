"""Safetensors files: written into an open file, and read from a buffer that nobody else can change.

The format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from squeezed.context.storage.strict import Count, Malformed, conformed, parsed
from squeezed.errors import shown
from squeezed.system.files import write_all

HEADER_BYTES = 1 << 20
METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8
PIECE = 1 << 22
"""Bytes that are hashed, and written while they are still in the processor's cache."""


def write(
    descriptor: int, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> tuple[int, str]:
    """Write a file into an empty open one; its bytes and SHA-256.

    Tensors of wide numbers come first, so that all of them are aligned.
    """
    order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    size, digest = 0, hashlib.sha256()
    for part in chain([_head(order, metadata)], map(_bytes_of, order)):
        for start in range(0, len(part), PIECE):
            piece = part[start : start + PIECE]
            digest.update(piece)
            write_all(descriptor, piece)
        size += len(part)
    return size, digest.hexdigest()


def _head(tensors: list[tuple[str, Tensor]], metadata: dict[str, str] | None) -> memoryview:
    entries: dict[str, object] = {METADATA: metadata} if metadata else {}
    end = 0
    for name, tensor in tensors:
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _bytes_of(named: tuple[str, Tensor]) -> memoryview:
    flat = named[1].detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensors_in(content: Tensor) -> dict[str, Tensor]:
    """The tensors of a file's bytes `[n]` uint8, as views of them.

    Raises:
        Malformed: the header lies about what follows it.
    """
    entries, data = _header(content)
    found, end = {}, 0
    spans = {name: _span(name, entry) for name, entry in entries.items()}
    for name, (dtype, shape, start, stop) in sorted(spans.items(), key=lambda x: x[1][2:]):
        if start != end:
            raise Malformed(f"{shown(name)}: does not start where the tensor before it ends")
        end = stop
        found[name] = (dtype, shape, start, stop)
    if end != len(data):
        raise Malformed(f"tensors of {end} bytes, data of {len(data)}")
    return {name: _view(data, *span) for name, span in found.items()}


def _header(content: Tensor) -> tuple[dict, Tensor]:
    length = int.from_bytes(content[:8].numpy().tobytes(), "little") if len(content) >= 8 else -1
    if not 2 <= length <= min(HEADER_BYTES, len(content) - 8):
        raise Malformed(f"a header of {length} bytes in a file of {len(content)}")
    entries = parsed(content[8 : 8 + length].numpy().tobytes())
    if not isinstance(entries, dict):
        raise Malformed("a header that is not an object")
    conformed(entries.pop(METADATA, {}), dict[str, str], METADATA)
    return entries, content[8 + length :]


def _span(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Malformed(f"{shown(name)}: expected dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise Malformed(f"{shown(name)}: unknown dtype {shown(entry['dtype'])}")
    dtype = DTYPES[entry["dtype"]]
    shape = conformed(entry["shape"], tuple[Count, ...], f"{name}.shape")
    offsets = conformed(entry["data_offsets"], tuple[Count, ...], f"{name}.data_offsets")
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    if len(offsets) != 2 or offsets[1] - offsets[0] != size or len(shape) > 8:
        raise Malformed(f"{shown(name)}: shape {shown(shape)} does not fill bytes {shown(offsets)}")
    return dtype, shape, offsets[0], offsets[1]


def _view(
    data: Tensor, dtype: torch.dtype, shape: tuple[int, ...], start: int, stop: int
) -> Tensor:
    part = data[start:stop]
    aligned = part.data_ptr() % dtype.itemsize == 0
    flat = part if aligned and part.storage_offset() % dtype.itemsize == 0 else part.clone()
    return flat.view(dtype).reshape(shape)
