"""One new token over a clustered context: the launcher of the decode kernels.

From query to output without a host synchronisation and with static shapes, so that a CUDA graph can
hold the step: `open` scores the coarsest level and attends to pinned and recent rows; `descend`,
one per further level, lists what is kept and, with its mass, what is dropped; `attend` reads the
rows of the one and the mean values of the other; `combine` merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from squeezed.attention.interface import Attended, Suffix
from squeezed.attention.triton import gpus
from squeezed.attention.triton.decode.selection import RUN
from squeezed.attention.triton.decode.step import Step
from squeezed.attention.triton.decode.workspace import Shape, Tuning
from squeezed.attention.triton.rows import code_bits, in_16_bits
from squeezed.config import FarField
from squeezed.context.layers import ClusteredLayer
from squeezed.context.rule import SelectionRule
from squeezed.errors import SqueezedError

MAX_GROUP = 16
MAX_DIM = 256
MAX_TOKENS = (1 << 31) // RUN.value
FEW_PARENTS, MANY_PARENTS = 6_000, 30_000
"""Nodes above the leaves, over all KV heads, where other block sizes become faster."""


@gpus.compiled_or_refused()
def decode_step(
    query: Tensor,
    layer: ClusteredLayer,
    rule: SelectionRule,
    suffix: Suffix | None = None,
    valid: Tensor | None = None,
    tuning: Tuning | None = None,
) -> Attended:
    """Squeezed attention of one new token per request, as `squeezed.attention.reference` has it.

    Args:
        query: `[B, Hq, 1, D]`, bfloat16 or float16; `D` a multiple of 16 up to 256, `Hq / Hkv` up
            to 16. Requests that share the context read every kept cluster once.
        layer: the context's clustered keys and values, contiguous, and the softmax scale.
        rule: thresholds, score and far field.
        suffix: keys and values `[B, Hkv, S, D]`, may be views of a static buffer; mask
            `[B, 1, 1, S]`, or `None` to attend to all of them. `None`: the context alone.
        valid: `[B, 1]` bool, False for a request of padding; `None` if there is none.
        tuning: block sizes; chosen by the shape when `None`.

    Raises:
        SqueezedError: an unsupported shape, dtype or layout.
    """
    query = query if query.stride(-1) == 1 else query.contiguous()
    check(query, layer, suffix)
    shape = shape_of(query, layer, suffix, rule.far_field)
    tuning = tuning or chosen_tuning(shape)
    step = Step(query, layer, rule, suffix, valid, shape, tuning)
    step.open()
    for stage in range(len(step.cut.parts)):
        step.descend(stage)
    if layer.levels:
        step.attend_lists()
    step.combine()
    return Attended(step.output, step.log_mass, step.keys_read)


def decode_many(
    query: Tensor,
    layers: Sequence[ClusteredLayer],
    rules: Sequence[SelectionRule],
    suffix: Suffix | None = None,
    valid: Tensor | None = None,
) -> Attended:
    """A decode step for requests over different contexts: request `b` reads `layers[b]`.

    One step per distinct pair of layer and rule, all in the same stream and so in the same CUDA
    graph; requests that share a pair share its bytes.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for request, pair in enumerate(zip(layers, rules, strict=True)):
        groups.setdefault((id(pair[0]), id(pair[1])), []).append(request)
    together = Attended(
        torch.empty_like(query),
        query.new_empty(query.shape[:3], dtype=torch.float32),
        query.new_empty(query.shape[0], dtype=torch.int64),
    )
    for members in groups.values():
        own = None if suffix is None else _of_requests(suffix, members)
        layer, rule = layers[members[0]], rules[members[0]]
        real = None if valid is None else _rows(valid, members)
        found = decode_step(_rows(query, members), layer, rule, own, real)
        for place, request in enumerate(members):
            for target, source in zip(together, found, strict=True):
                target[request].copy_(source[place])
    return together


def _of_requests(suffix: Suffix, members: list[int]) -> Suffix:
    mask = None if suffix.mask is None else _rows(suffix.mask, members)
    return Suffix(_rows(suffix.keys, members), _rows(suffix.values, members), mask)


def _rows(tensor: Tensor, members: list[int]) -> Tensor:
    """Rows of a batch, by slices: an index tensor would be a copy from the host."""
    if members == list(range(members[0], members[-1] + 1)):
        return tensor[members[0] : members[-1] + 1]
    return torch.cat([tensor[request : request + 1] for request in members])


def check(query: Tensor, layer: ClusteredLayer, suffix: Suffix | None) -> None:
    """Refuse what the kernels cannot do, in one line."""
    _, heads, rows, dim = query.shape
    kv_heads = layer.kv_heads
    if rows != 1:
        raise SqueezedError(f"query: decode takes 1 token per request, got {rows}; use prefill")
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise SqueezedError(
            f"query: expected bfloat16 or float16, got {query.dtype}; cast, or use 'reference'"
        )
    if dim % 16 or not 16 <= dim <= MAX_DIM:
        raise SqueezedError(
            f"query: expected a head dimension that is a multiple of 16 up to {MAX_DIM}, got {dim};"
            " use implementation 'reference'"
        )
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise SqueezedError(
            f"query: expected 1 to {MAX_GROUP} query heads per KV head, got {heads} for {kv_heads};"
            " use implementation 'reference'"
        )
    if layer.tokens > MAX_TOKENS:
        raise SqueezedError(
            f"layer: expected at most {MAX_TOKENS:,} tokens, got {layer.tokens:,}; split the text"
        )
    own: tuple[Tensor, ...] = () if suffix is None else (suffix.keys, suffix.values)
    for name, tensor in zip(("suffix.keys", "suffix.values"), own, strict=False):
        if tensor.dtype != query.dtype:
            raise SqueezedError(f"{name}: expected {query.dtype}, got {tensor.dtype}; cast it")
        if tensor.stride(-1) != 1 or tensor.stride() != own[0].stride():
            raise SqueezedError(
                f"{name}: expected rows contiguous and keys and values laid out alike, got strides "
                f"{tensor.stride()}; call contiguous()"
            )
    for name, tensor in zip(("keys", "values"), in_16_bits(layer.rows), strict=True):
        if not tensor.is_contiguous() or tensor.dtype != query.dtype:
            raise SqueezedError(
                f"layer.{name}: expected contiguous {query.dtype}, got {tensor.dtype} with strides "
                f"{tensor.stride()}; index the context in the model's dtype"
            )


def shape_of(query: Tensor, layer: ClusteredLayer, suffix: Suffix | None, far: FarField) -> Shape:
    """Sizes on which the launches depend."""
    return Shape(
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=layer.kv_heads,
        dim=query.shape[3],
        tokens=layer.tokens,
        pinned=layer.pinned if layer.levels else layer.tokens,
        recent=0 if suffix is None else suffix.tokens,
        nodes=tuple(level.nodes for level in layer.levels),
        far=far != "none" and bool(layer.levels),
        dipole=far == "second_order" and bool(layer.levels),
        gpu=gpus.of(query.device),
        code_bits=code_bits(layer.rows),
    )


def chosen_tuning(shape: Shape) -> Tuning:
    """Block sizes by shape: as measured best, smaller where a GPU's shared memory asks for it."""
    tuning = measured_tuning(shape)
    if shape.gpu.small and shape.dim > 128:
        tuning = replace(tuning, score_tile=32, tile=32)
    return coded_tuning(shape, tuning) if shape.code_bits else tuning


def measured_tuning(shape: Shape) -> Tuning:
    """Block sizes by shape, as measured best on an H200 (`benchmarks/h200/decode-tried.json`)."""
    tuning = Tuning(overlap=shape.gpu.overlaps)
    parents = shape.kv_heads * shape.nodes[-2] if len(shape.nodes) > 1 else 0
    rows = rows_of(shape)
    if rows > 16:  # programs are large: two of the attention kernel fit on a multiprocessor
        walk = replace(tuning, nodes=64, walk_programs=4, registers=128, warps=(4, 4, 4))
        return replace(walk, programs=2, stages=3, node_tile=32, node_unit=8)
    if shape.batch > 1:
        return replace(tuning, nodes=64, walk_programs=4, registers=128, warps=(4, 4, 4))
    if shape.dipole and parents < MANY_PARENTS:
        tuning = replace(tuning, stages=2)
    if parents < FEW_PARENTS:  # waiting counts, not bytes
        tuning = replace(tuning, nodes=16, walk_programs=32)
        if shape.dipole:
            return replace(tuning, tile=32, stages=4)
        return tuning if shape.far else replace(tuning, programs=4, stages=2)
    if rows == 1 and parents >= MANY_PARENTS:
        return replace(tuning, walk_programs=32)
    return tuning


def coded_tuning(shape: Shape, tuning: Tuning) -> Tuning:
    """Block sizes over encoded rows: at least 16 runs in a tile, for a product of matrices.

    Derived from registers and shared memory, not yet swept on a GPU.
    """
    if rows_of(shape) > 16:
        return replace(tuning, tile=64, stages=4)
    return replace(tuning, tile=64, stages=4, programs=3, attend_registers=168)


def rows_of(shape: Shape) -> int:
    """Query rows per KV head."""
    return shape.batch * shape.heads // shape.kv_heads
