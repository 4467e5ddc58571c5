"""Attention of query blocks to lists of rows, for Hopper GPUs: the work of `prefill_attention`.

The same arguments, stretches and parts, but a program's warps have roles, as in FlashAttention-3
(arXiv 2407.08608): four warps gather keys and values into a ring in shared memory, and two
warpgroups of four attend with 64 query rows each, so that one computes weights while the other
multiplies. Step `i` of a class of work holds the keys of unit `i` and the values of unit `i - 1`:
the products of both run while the weights of unit `i` are computed. A class's units go from the
last, which may be partial, to the first.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from squeezed.attention.triton import gpus
from squeezed.attention.triton.prefill.hopper.attend import attender
from squeezed.attention.triton.prefill.hopper.classes import (
    CAUSAL_SUFFIX,
    DIPOLES,
    MASKED_SUFFIX,
    NODES,
)
from squeezed.attention.triton.prefill.hopper.gather import gatherer
from squeezed.attention.triton.prefill.plan import LENGTHS

SHAPE = {"rows": 128, "keys": 128, "others": 64, "warps": 4, "stages": 3, "programs": 1}
"""Of the tile, in the words of `prefill_work.Tile`: what registers and shared memory hold."""
GATHERERS = gl.constexpr(128)  # threads
ATTENDER_REGISTERS, GATHERER_REGISTERS = gl.constexpr(224), gl.constexpr(56)


def fits(query: Tensor, rows: int, dim: int) -> bool:
    """Whether this kernel can run for tiles of `rows` query rows: enough of them, in 16 bits."""
    shaped = rows >= SHAPE["rows"] and dim in (64, 128) and query.element_size() == 2
    return shaped and gpus.of(query.device).generation == gpus.HOPPER


def aligned(x: Tensor) -> Tensor:
    """`x` with rows that can be copied 16 bytes at a time: as it is, as a rule."""
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
    fine = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides[:-1])
    return x if fine else x.clone(memory_format=torch.contiguous_format)


@gluon.jit(do_not_specialize=LENGTHS)
def hopper_attention_kernel(
    query,
    context,
    tokens,
    suffix_keys,
    suffix_values,
    mask,
    mask_batch_stride,
    mask_row_stride,
    mask_step,
    plan,
    kept,
    levels,
    far,
    far_alpha,
    partials,
    tiles,
    blocks,
    rows,
    suffix,
    capacity,
    pass_tiles,
    scale,
    HEADS_KV: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK: gl.constexpr,
    DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    OTHER_N: gl.constexpr,
    SPLIT_M: gl.constexpr,
    LEVELS: gl.constexpr,
    CLASSES: gl.constexpr,
    DIPOLE: gl.constexpr,
    CAUSAL: gl.constexpr,
    STEP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program's stretches of the line of units, one in every pass."""
    dtype: gl.constexpr = query[0].dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, DIM], dtype)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [2, BLOCK_M // 2, DIM], shared)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], shared)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], shared)
    size_ring = gl.allocate_shared_memory(gl.float32, [STAGES, OTHER_N], line)
    variance_ring = gl.allocate_shared_memory(gl.float32, [STAGES, OTHER_N], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=GATHERERS)
        mbarrier.init(empty.index(i), count=2)
    rings = k_ring, v_ring, size_ring, variance_ring, full, empty
    masks = mask, mask_batch_stride, mask_row_stride
    spans = tiles * SPLIT_M
    SUFFIX: gl.constexpr = CAUSAL_SUFFIX if CAUSAL else MASKED_SUFFIX
    FAR: gl.constexpr = DIPOLES if DIPOLE else NODES
    gl.warp_specialize(
        [
            (
                attender,
                (
                    query,
                    masks,
                    mask_step,
                    plan,
                    kept[1],
                    far[3],
                    far_alpha,
                    partials,
                    spans,
                    blocks,
                    rows,
                    suffix,
                    pass_tiles,
                    scale,
                    q_smem,
                    rings,
                    0,
                    HEADS_KV,
                    GROUP,
                    BLOCK,
                    DIM,
                    BLOCK_M,
                    BLOCK_N,
                    OTHER_N,
                    SPLIT_M,
                    STAGES,
                    LEVELS,
                    CLASSES,
                    SUFFIX,
                    FAR,
                    STEP,
                ),
            ),
            (
                attender,
                (
                    query,
                    masks,
                    mask_step,
                    plan,
                    kept[1],
                    far[3],
                    far_alpha,
                    partials,
                    spans,
                    blocks,
                    rows,
                    suffix,
                    pass_tiles,
                    scale,
                    q_smem,
                    rings,
                    1,
                    HEADS_KV,
                    GROUP,
                    BLOCK,
                    DIM,
                    BLOCK_M,
                    BLOCK_N,
                    OTHER_N,
                    SPLIT_M,
                    STAGES,
                    LEVELS,
                    CLASSES,
                    SUFFIX,
                    FAR,
                    STEP,
                ),
            ),
            (
                gatherer,
                (
                    context,
                    tokens,
                    suffix_keys,
                    suffix_values,
                    plan,
                    kept,
                    levels,
                    far,
                    spans,
                    blocks,
                    suffix,
                    capacity,
                    pass_tiles,
                    rings,
                    HEADS_KV,
                    DIM,
                    BLOCK_N,
                    OTHER_N,
                    SPLIT_M,
                    STAGES,
                    LEVELS,
                    CLASSES,
                    DIPOLE,
                    STEP,
                ),
            ),
        ],
        [4, 4],
        [ATTENDER_REGISTERS, GATHERER_REGISTERS],
    )
