"""Attention of a tile to kept rows that are encoded (`squeezed.context.encoding`).

A row is its leaf's mean and a difference that was turned before it was written. The query is turned
when a stretch of work begins; the differences are summed turned, and turned back when it ends.
"""

from __future__ import annotations

import triton
import triton.language as tl

from squeezed.attention.triton.codes import add_parts, part_dims, value_parts
from squeezed.attention.triton.prefill.classes import NEG_INF


@triton.jit
def turned_part(q, key_turn, part: tl.constexpr, DIM: tl.constexpr, BLOCK_D, PART, BITS):
    """A part `[BLOCK_M, PART]` of a turned query."""
    d, place = tl.arange(0, BLOCK_D), tl.arange(0, PART)
    inside = (d < DIM)[:, None] & (place < DIM * BITS // 16)[None, :]
    columns = key_turn + d[:, None] * DIM + part_dims(place, part, DIM, BITS)[None, :]
    return tl.dot(q, tl.load(columns, mask=inside, other=0.0), input_precision="ieee")


@triton.jit
def turned_query(q, key_turn, DIM: tl.constexpr, BLOCK_D, PART: tl.constexpr, BITS: tl.constexpr):
    """All parts of a turned query as float16, and what 1 in them is worth `[BLOCK_M]`."""
    a = turned_part(q, key_turn, 0, DIM, BLOCK_D, PART, BITS)
    b = turned_part(q, key_turn, 1, DIM, BLOCK_D, PART, BITS)
    unit = tl.maximum(tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1)), 1e-30)
    if BITS == 8:
        over = unit[:, None]
        return ((a / over).to(tl.float16), (b / over).to(tl.float16)), unit
    else:
        c = turned_part(q, key_turn, 2, DIM, BLOCK_D, PART, BITS)
        d = turned_part(q, key_turn, 3, DIM, BLOCK_D, PART, BITS)
        unit = tl.maximum(unit, tl.maximum(tl.max(tl.abs(c), 1), tl.max(tl.abs(d), 1)))
        over = unit[:, None]
        halves = (
            (a / over).to(tl.float16),
            (b / over).to(tl.float16),
            (c / over).to(tl.float16),
            (d / over).to(tl.float16),
        )
        return halves, unit


@triton.jit
def turned_back(
    acc, parts, value_turn, DIM: tl.constexpr, BLOCK_D, BITS: tl.constexpr, PTX: tl.constexpr
):
    """`acc [BLOCK_M, BLOCK_D]` with the turned sums `[BLOCK_M, PART]` turned back."""
    PART: tl.constexpr = parts[0].shape[1]
    PRECISION: tl.constexpr = "tf32x3" if PTX else "ieee"  # AMD's compiler knows no tf32x3
    d, place = tl.arange(0, BLOCK_D), tl.arange(0, PART)
    inside = (d < DIM)[None, :] & (place < DIM * BITS // 16)[:, None]
    for part in tl.static_range(len(parts)):
        rows = value_turn + part_dims(place, part, DIM, BITS)[:, None] * DIM + d[None, :]
        matrix = tl.load(rows, mask=inside, other=0.0).to(tl.float32)
        acc = tl.dot(parts[part], matrix, acc=acc, input_precision=PRECISION)
    return acc


@triton.jit
def load_coded(codes, row, pinned, WIDTH: tl.constexpr, PART: tl.constexpr):
    """Rows `[BLOCK_N, PART]` of codes, nothing of pinned ones."""
    place = tl.arange(0, PART)
    rows = codes + (row - pinned)[:, None].to(tl.int64) * WIDTH + place[None, :]
    return tl.load(rows, mask=(row >= pinned)[:, None] & (place < WIDTH)[None, :], other=0)


@triton.jit
def load_base(front, means, row, leaf, pinned, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `[BLOCK_N, BLOCK_D]`: pinned ones themselves, of others the means of their leaves."""
    d = tl.arange(0, BLOCK_D)
    own = front + row[:, None].to(tl.int64) * DIM
    rows = tl.where((row < pinned)[:, None], own, means + leaf[:, None].to(tl.int64) * DIM)
    inside = tl.broadcast_to((d < DIM)[None, :], (row.shape[0], BLOCK_D))
    return tl.load(rows + d[None, :], mask=inside, other=0.0)


@triton.jit
def attend_coded_rows(
    q,
    scale,
    acc,
    peak,
    mass,
    front,
    coding,
    head,
    list_,
    first,
    last,
    count,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,
    BITS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Units `first:last` of the encoded rows of one head in `list_`; as `classes.attend_rows`.

    `front` are pinned keys and values `[pinned, DIM]`, `coding` is as `Work.coding` has it.
    """
    if first < last:
        key_codes, value_codes, scales, coded = coding[0]  # [Hkv, n, ..] twice, [Hkv, n], n
        mean_keys, mean_values, nodes = coding[1]  # [Hkv, C, DIM] twice, C
        leaf_of, pinned = coding[2]  # [Hkv, P]
        key_turn, value_turn = coding[3]  # [Hkv, DIM, DIM] each
        leaf_of += head * (pinned + coded)
        scales += head * coded
        mean_keys, mean_values = mean_keys + head * nodes * DIM, mean_values + head * nodes * DIM
        queries, unit = turned_query(q, key_turn + head * DIM * DIM, DIM, BLOCK_D, PART, BITS)
        WIDTH: tl.constexpr = DIM * BITS // 16
        key_codes, value_codes = (
            key_codes + head * coded * WIDTH,
            value_codes + head * coded * WIDTH,
        )
        zero = tl.zeros([q.shape[0], PART], tl.float32)
        sums = (zero,) * (16 // BITS)
        worth = unit / 16 if BITS == 4 else unit  # of levels, which are 16 times too large
        for index in range(first, last):
            slot = index * BLOCK_N + tl.arange(0, BLOCK_N)
            row = tl.load(list_ + slot, mask=slot < count, other=0)
            leaf = tl.load(leaf_of + row)
            both = tl.load(scales + row - pinned, mask=row >= pinned, other=0)
            key_scale = (both << 16).to(tl.float32, bitcast=True)
            value_scale = (both & -65536).to(tl.float32, bitcast=True)
            base = load_base(front[0], mean_keys, row, leaf, pinned, DIM, BLOCK_D)
            levels = value_parts(load_coded(key_codes, row, pinned, WIDTH, PART), BITS, PTX)
            away = tl.dot(queries[0], tl.trans(levels[0]))
            for part in tl.static_range(1, len(levels)):
                away = tl.dot(queries[part], tl.trans(levels[part]), acc=away)
            raw = tl.dot(q, tl.trans(base), input_precision="ieee")
            raw += away * worth[:, None] * key_scale[None, :]
            raw = tl.where((slot < count)[None, :], raw, NEG_INF)
            top = tl.maximum(peak, tl.max(raw, 1) * scale)
            safe = tl.where(top == NEG_INF, 0.0, top)
            p, shrink = tl.exp2(raw * scale - safe[:, None]), tl.exp2(peak - safe)
            peak, mass = top, mass * shrink + tl.sum(p, 1)
            value = load_base(front[1], mean_values, row, leaf, pinned, DIM, BLOCK_D)
            acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
            largest = tl.maximum(tl.max(value_scale), 1e-30)  # so that float16 holds what it weighs
            p = (p * (value_scale / largest)[None, :]).to(tl.float16)
            levels = value_parts(load_coded(value_codes, row, pinned, WIDTH, PART), BITS, PTX)
            sums = add_parts(sums, shrink[:, None], largest, p, levels, BITS)
        acc = turned_back(acc, sums, value_turn + head * DIM * DIM, DIM, BLOCK_D, BITS, PTX)
    return acc, peak, mass
