"""The kernel that starts a decode step: all that needs no selection.

It scores the coarsest nodes for the normaliser and attends to pinned and recent rows.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from squeezed.attention.triton.decode.nodes import weigh_nodes
from squeezed.attention.triton.decode.softmax import (
    fold,
    load_query,
    load_rows,
    nothing,
    problem,
    store_partial,
)
from squeezed.attention.triton.decode.turning import turn_query


@triton.jit
def attend_run(
    q,
    keys,
    values,
    row_stride,
    first,
    stop,
    mask,
    mask_stride,
    scale_bits,
    M: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Softmax partial over the rows `[first, stop)` of one matrix of keys."""
    peak, mass, acc = nothing(M, D_PAD)
    for start in range(first, stop, N):
        position = start + tl.arange(0, N)
        live = position < stop
        if MASKED:
            live = live & (tl.load(mask + position * mask_stride, mask=live, other=0) != 0)
        key = load_rows(keys, position, live, row_stride, D, D_PAD)
        value = load_rows(values, position, live, row_stride, D, D_PAD)
        logits = tl.where(live[None, :], tl.dot(q, tl.trans(key)) * scale_bits, float("-inf"))
        peak, mass, acc = fold(peak, mass, acc, logits, value)
    return peak, mass, acc


@triton.jit
def attend_recent(
    query,
    suffix,
    mask,
    partials,
    head,
    tile,
    member,
    slot,
    batch,
    first,
    stop,
    scale_bits,
    GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The heads of one request over a share of its own recent rows."""
    keys, values, batch_stride, head_stride, row_stride = suffix  # [B, Hkv, S, D] twice
    seen, seen_batch_stride, seen_row_stride = mask  # [B, 1, 1, S]
    index = tl.arange(0, M)
    row = member * GROUP + index
    q, exists = load_query(query, head, tile, row, batch, GROUP, TILE_BATCH, D, D_PAD)
    request = tl.minimum(tile * TILE_BATCH + member, batch - 1).to(tl.int64)
    base = request * batch_stride + head.to(tl.int64) * head_stride
    peak, mass, acc = attend_run(
        q,
        keys + base,
        values + base,
        row_stride,
        first,
        stop,
        seen + request * seen_batch_stride,
        seen_row_stride,
        scale_bits,
        M,
        D,
        D_PAD,
        N,
        MASKED,
    )
    exists = exists & (index < GROUP)
    store_partial(partials, slot, row, exists, peak, mass, acc, ROWS, D, D_PAD)


@triton.jit
def open_kernel(
    query,
    context,
    level,
    alpha,
    suffix,
    mask,
    turning,
    scores,
    parents_of,
    norms,
    partials,
    counters,
    read_counts,
    keys_read,
    batch,
    pinned,
    recent,
    children,
    chunks,
    fixed_base,
    scale_bits,
    GROUP: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    M_ONE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    N: tl.constexpr,
    CHUNK: tl.constexpr,
    SECOND: tl.constexpr,
    NESTED: tl.constexpr,
    MASKED: tl.constexpr,
    CODE_BITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid `(problems, pinned chunks + splits + TILE_BATCH * suffix chunks)`.

    CODE_BITS: where rows are encoded, one more of each problem turns its query.
    """
    keys, values, tokens = context  # [Hkv, P, D] twice
    key_turn, turned, units = turning  # [Hkv, D, D], [Z, 2 * R, D], [Z, 2, R]
    splits = norms[2]
    pinned_chunks, suffix_chunks = chunks
    z, part = tl.program_id(0), tl.program_id(1)
    head, tile = problem(z, TILES)
    if PDL:
        gdc_launch_dependents()
    if part == 0:  # what later kernels add to
        tl.store(counters + z, tl.zeros([], tl.int64))
        for index in range(TILE_BATCH):
            tl.store(read_counts + z * TILE_BATCH + index, 0)
            if (head == 0) & (tile * TILE_BATCH + index < batch):
                tl.store(keys_read + tile * TILE_BATCH + index, 0)
    shared_parts = pinned_chunks + splits
    slot = fixed_base + z * (pinned_chunks + suffix_chunks)
    if part < pinned_chunks:
        row = tl.arange(0, M)
        q, exists = load_query(query, head, tile, row, batch, GROUP, TILE_BATCH, D, D_PAD)
        base = head.to(tl.int64) * tokens * D
        stop = tl.minimum(pinned, (part + 1) * CHUNK)
        peak, mass, acc = attend_run(
            q,
            keys + base,
            values + base,
            D,
            part * CHUNK,
            stop,
            None,
            0,
            scale_bits,
            M,
            D,
            D_PAD,
            N,
            False,
        )
        store_partial(partials, slot + part, row, exists, peak, mass, acc, ROWS, D, D_PAD)
    elif part < shared_parts:
        row = tl.arange(0, R)
        q, exists = load_query(query, head, tile, row, batch, GROUP, TILE_BATCH, D, D_PAD)
        weigh_nodes(
            q,
            exists,
            row,
            z,
            head,
            part - pinned_chunks,
            level,
            alpha,
            scale_bits,
            scores,
            parents_of,
            children,
            norms,
            GROUP,
            ROWS,
            D,
            D_PAD,
            N,
            SECOND,
            NESTED,
        )
    elif CODE_BITS and part == tl.num_programs(1) - 1:
        turn_query(
            query,
            key_turn,
            turned,
            units,
            z,
            head,
            tile,
            batch,
            scale_bits,
            GROUP,
            TILE_BATCH,
            R,
            D,
            D_PAD,
            CODE_BITS,
        )
    else:
        chunk = (part - shared_parts) % suffix_chunks
        attend_recent(
            query,
            suffix,
            mask,
            partials,
            head,
            tile,
            (part - shared_parts) // suffix_chunks,
            slot + pinned_chunks + chunk,
            batch,
            chunk * CHUNK,
            tl.minimum(recent, (chunk + 1) * CHUNK),
            scale_bits,
            GROUP,
            TILE_BATCH,
            ROWS,
            M_ONE,
            D,
            D_PAD,
            N,
            MASKED,
        )
