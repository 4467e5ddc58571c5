"""What both roles of the Hopper attention ask of the plan: `prefill_plan` says what it holds."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROLE = gl.constexpr(4)
"""Warps of one role."""


@gluon.jit
def stretch(ends, tiles, pass_tiles, number, STEP: gl.constexpr):
    """Tiles `first:stop` and units `begin:end` of this program in a pass."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [ROLE], [0])
    pid, programs = gl.program_id(0), gl.num_programs(0)
    w_first = number * pass_tiles
    w_last = gl.minimum(w_first + pass_tiles, tiles)
    base = gl.load(ends + w_first - 1, mask=w_first > 0, other=0)
    line = gl.load(ends + w_last - 1)
    share = gl.maximum(gl.cdiv(line - base, programs), 1)
    begin = gl.minimum(base + pid * share, line)
    end = gl.minimum(begin + share, line)
    first, stop = w_first, w_first
    for at in range(w_first, w_last, STEP):
        w = at + gl.arange(0, STEP, flat)
        tile_end = gl.load(ends + w, mask=w < w_last, other=2147483647)
        first += gl.sum((tile_end <= begin).to(gl.int32), 0)
        stop += gl.sum((tile_end < end).to(gl.int32), 0)
    return first, gl.where(begin < end, stop + 1, first), begin, end


@gluon.jit
def tile_part(ends, bounds, w, begin, end, CLASSES: gl.constexpr):
    """Units `first:last` of tile `w` inside `begin:end` of the line, from the tile's start."""
    tile_end = gl.load(ends + w)
    start = tile_end - gl.load(bounds + w * CLASSES + CLASSES - 1)
    return gl.maximum(begin - start, 0), gl.minimum(end, tile_end) - start


@gluon.jit
def class_part(first, last, start, end):
    """The part of units `first:last` of a tile inside a class, from the class's start."""
    return gl.maximum(first, start) - start, gl.minimum(last, end) - start
