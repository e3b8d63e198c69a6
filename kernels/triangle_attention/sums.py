"""Sum of what groups of rows have left apart, in an order that does not change: the same to the bit each time.

By the last of the programs that leave it, where a kernel before has left zeros to count them with; else by a kernel.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.order import after_the_kernel_before
from trifast_inductor.kernels.triangle_attention.tiling import Tile

SIDE = tl.constexpr(64)  # of the tiles that `hopper/whole.py` and `hopper/whole_by_key.py` leave
# Of eight groups at a time, so that their loads are under way together, and of few elements, for many programs.
_TILE = Tile(BLOCK_I=8, BLOCK_J=256, num_warps=4, num_stages=1)


@triton.jit
def add_up_if_last(parts_ptr, sum_ptr, count_ptr, step, groups, in_range):
    """A program calls this once it has stored its part of a tile.

    Args:
        parts_ptr: of the tile, the first group's; the others follow a step apart.
        count_ptr: how many programs of this tile have called.
    """
    tl.debug_barrier()  # the part is there, whichever thread stored it, before the count says so
    done = tl.atomic_add(count_ptr, 1, sem="acq_rel")
    if done == groups - 1:
        tl.debug_barrier()
        total = tl.zeros(in_range.shape, tl.float32)
        for _ in range(groups):
            # Not from L1, which knows nothing of other multiprocessors' stores.
            total += tl.load(parts_ptr, mask=in_range, other=0.0, cache_modifier=".cg")
            parts_ptr += step
        tl.store(sum_ptr, total.to(sum_ptr.dtype.element_ty), mask=in_range)


@triton.jit
def _summed(ptrs, step, groups, in_range, BLOCK_I: tl.constexpr):
    """Of each element the sum over groups, a step apart, BLOCK_I at a time."""
    group = tl.arange(0, BLOCK_I)[:, None]
    ptrs = ptrs[None, :] + group * step
    total = tl.zeros(ptrs.shape, tl.float32)
    for first in range(0, groups, BLOCK_I):
        total += tl.load(ptrs, mask=(group < groups - first) & in_range[None, :], other=0.0)
        ptrs += BLOCK_I * step
    return tl.sum(total, 0)


@triton.jit
def _triangle_attention_bwd_sum(
    parts_ptr,  # [groups, count] contiguous, float32
    sum_ptr,  # [count]
    count: tl.int64,
    groups,
    BLOCK_I: tl.constexpr,  # groups at a time
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_kernel_before(PDL)
    place = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = _summed(parts_ptr + place, count, groups, place < count, BLOCK_I)
    tl.store(sum_ptr + place, total.to(sum_ptr.dtype.element_ty), mask=place < count)


def sum_of(count: int, groups: int) -> Launch:
    """Takes the parts `[groups, count]` and where their sum goes."""
    blocks = triton.cdiv(count, _TILE.BLOCK_J)
    return Launch(_triangle_attention_bwd_sum, blocks, {"count": count, "groups": groups}, _TILE)


@triton.jit
def _triangle_attention_bwd_sum_of_tiles(
    parts_ptr,  # [groups, heads, tiles along j, tiles along i, 64, 64] contiguous, float32
    sum_ptr,  # [heads, I, J] contiguous
    heads,
    groups,
    I,
    J,
    tiles_i,
    tiles_j,
    BLOCK_I: tl.constexpr,  # groups at a time
    BLOCK_J: tl.constexpr,  # numbers of a tile
    PDL: tl.constexpr,
):
    after_the_kernel_before(PDL)
    PARTS: tl.constexpr = SIDE * SIDE // BLOCK_J
    tile = tl.program_id(0) // PARTS
    element = tl.program_id(0) % PARTS * BLOCK_J + tl.arange(0, BLOCK_J)
    step = tl.cast(heads * tiles_i * tiles_j, tl.int64) * (SIDE * SIDE)
    ptrs = parts_ptr + tile.to(tl.int64) * (SIDE * SIDE) + element
    total = _summed(ptrs, step, groups, tl.full([BLOCK_J], True, tl.int1), BLOCK_I)
    i = tile % tiles_i * SIDE + element // SIDE
    j = tile // tiles_i % tiles_j * SIDE + element % SIDE
    head = (tile // (tiles_i * tiles_j)).to(tl.int64)
    tl.store(sum_ptr + (head * I + i) * J + j, total.to(sum_ptr.dtype.element_ty), mask=(i < I) & (j < J))


def sum_of_tiles(heads: int, I: int, J: int, groups: int) -> Launch:
    """As `sum_of`, of parts that lie tile by tile: `[groups, heads, tiles along j, tiles along i, 64, 64]`."""
    tiles_i, tiles_j = triton.cdiv(I, SIDE.value), triton.cdiv(J, SIDE.value)
    given = {"heads": heads, "groups": groups, "I": I, "J": J, "tiles_i": tiles_i, "tiles_j": tiles_j}
    programs = heads * tiles_i * tiles_j * (SIDE.value**2 // _TILE.BLOCK_J)
    return Launch(_triangle_attention_bwd_sum_of_tiles, programs, given, _TILE)
