"""The tensors of a safetensors file, taken from a buffer that nobody else can change.

The format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import torch
from torch import Tensor

from squeezed.context.storage.strict import Count, Malformed, conformed, parsed
from squeezed.errors import shown

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
}


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
