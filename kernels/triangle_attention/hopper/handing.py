"""A whole number that one partition hands to others by shared memory, `[1]` in int32; the layout of one axis there.

The store comes before the arrival at the barrier that the others wait for.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def hand(smem, number):
    """From a partition of one warp."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    smem.store(gl.full([1], number, gl.int32, layout))  # handed over by the barrier that follows


@gluon.jit
def handed(smem, NUM_WARPS: gl.constexpr):
    """In a partition of so many warps."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    return gl.max(smem.load(layout), 0)  # handed over by the barrier before
