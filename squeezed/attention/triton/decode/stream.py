"""The stream of units, of kept rows and of dropped nodes, that programs share."""

import triton
import triton.language as tl

from squeezed.attention.triton.decode.selection import RUN, unpack

UNIT = tl.constexpr(16)
"""Rows of one unit of the stream; of dropped nodes it has more, since those bring no keys."""


@triton.jit
def stream(counters, problems, Z_PAD: tl.constexpr, NODE_UNIT: tl.constexpr):
    """Kept runs and dropped nodes of every problem, the units of the runs, and where its units
    begin and end in the stream, `[Z_PAD]`.
    """
    z = tl.arange(0, Z_PAD)
    # Past the first cache, since the kernel before may still be running.
    counted = tl.load(counters + z, mask=z < problems, other=0, cache_modifier=".cg")
    runs, dropped = unpack(counted)
    near = tl.cdiv(runs * RUN, UNIT)
    units = tl.where(z < problems, tl.maximum(near + tl.cdiv(dropped, NODE_UNIT), 1), 0)
    end = tl.cumsum(units, 0)
    return runs, dropped, near, end - units, end


@triton.jit
def at(values, index, Z_PAD: tl.constexpr):
    """Element `index` of a vector held in registers."""
    return tl.sum(tl.where(tl.arange(0, Z_PAD) == index, values, 0))
