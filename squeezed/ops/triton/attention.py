"""The kernel that attends to kept rows.

The kept rows of all problems form one stream of tiles that is cut into equal parts, one per
program. A head that keeps many keys therefore takes many programs and holds nobody up. A program
leaves one partial sum per problem it touches, in slot `program + z`: unique, because along the
stream either the program or the problem moves on.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from squeezed.ops.triton.selection import RUN, spread
from squeezed.ops.triton.tile import fold, load_query, load_rows, problem, store_partial


@triton.jit
def stream(counters, problems, stride, TILE: tl.constexpr, Z_PAD: tl.constexpr):
    """Kept runs of every problem, and where its tiles begin and end in the stream, `[Z_PAD]`."""
    z = tl.arange(0, Z_PAD)
    runs = tl.load(counters + z * stride, mask=z < problems, other=0)
    tiles = tl.where(z < problems, tl.maximum(tl.cdiv(runs * RUN, TILE), 1), 0)
    end = tl.cumsum(tiles, 0)
    return runs, end - tiles, end


@triton.jit
def at(values, index, Z_PAD: tl.constexpr):
    """Element `index` of a vector held in registers."""
    return tl.sum(tl.where(tl.arange(0, Z_PAD) == index, values, 0))


@triton.jit
def attend_kernel(
    query, keys, values, kept_runs, kept_bits, counters, sums, highs, masses,
    query_stride_batch, query_stride_head, batch, problems, context_tokens, capacity,
    counter_stride, scale_bits,
    GROUP: tl.constexpr, TILE_BATCH: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr,
    Z_PAD: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Exact attention of every problem over its list of runs of rows; grid `(programs,)`."""
    program = tl.program_id(0)
    row = tl.arange(0, M)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    length, begin, end = stream(counters, problems, counter_stride, TILE, Z_PAD)
    total = tl.max(end)
    share = tl.cdiv(total, tl.num_programs(0))
    cursor = program * share
    stop = tl.minimum(total, cursor + share)
    while cursor < stop:
        z = tl.sum((end <= cursor).to(tl.int32) * (tl.arange(0, Z_PAD) < problems))
        first = at(begin, z, Z_PAD)
        last = tl.minimum(stop, at(end, z, Z_PAD))
        count = at(length, z, Z_PAD)
        head, tile = problem(z, TILES)
        q, exists = load_query(
            query, query_stride_batch, query_stride_head, head, tile, row, batch,
            GROUP, TILE_BATCH, D, D_PAD,
        )  # fmt: skip
        context = head.to(tl.int64) * context_tokens * D
        first_run = z.to(tl.int64) * capacity
        high = tl.full([M], float("-inf"), tl.float32)
        mass = tl.zeros([M], tl.float32)
        sum_ = tl.zeros([M, D_PAD], tl.float32)
        for step in tl.range(cursor - first, last - first, num_stages=STAGES):
            position = step * TILE + tl.arange(0, TILE)
            listed = position // RUN < count
            run = tl.load(kept_runs + first_run + position // RUN, mask=listed, other=0)
            live = listed & (position % RUN <= run % RUN)
            # Behind its end a run repeats its last row, which costs no mask and no memory traffic.
            kept = run // RUN + tl.minimum(position % RUN, run % RUN)
            everywhere = tl.full([TILE], True, tl.int1)
            key = load_rows(keys + context, kept, everywhere, D, D, D_PAD)
            value = load_rows(values + context, kept, everywhere, D, D, D_PAD)
            logits = tl.dot(q, tl.trans(key)) * scale_bits
            attended = live[None, :]
            if SHARED:
                wanted = tl.load(kept_bits + first_run + position // RUN, mask=listed, other=0)
                attended = attended & spread(wanted, row, GROUP)
            logits = tl.where(attended, logits, float("-inf"))
            high, mass, sum_ = fold(high, mass, sum_, logits, value)
        store_partial(
            sums, highs, masses, program + z, row, exists & (row < ROWS), high, mass, sum_,
            ROWS, D, D_PAD,
        )  # fmt: skip
        cursor = last
