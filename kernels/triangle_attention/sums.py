"""Sum of what groups of rows have left apart, in order: the same to the bit each time."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.order import after_the_kernel_before
from trifast_inductor.kernels.triangle_attention.tiling import Tile

_TILE = Tile(BLOCK_I=1, BLOCK_J=1024, num_warps=4, num_stages=1)


@triton.jit
def _triangle_attention_bwd_sum(
    parts_ptr,  # [groups, count] contiguous, float32
    sum_ptr,  # [count]
    count: tl.int64,
    groups,
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_kernel_before(PDL)
    place = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    total = tl.zeros([BLOCK_J], tl.float32)
    for _ in range(groups):
        total += tl.load(parts_ptr + place, mask=place < count, other=0.0)
        parts_ptr += count
    tl.store(sum_ptr + place, total.to(sum_ptr.dtype.element_ty), mask=place < count)


def sum_of(count: int, groups: int) -> Launch:
    """Takes the parts `[groups, count]` and where their sum goes."""
    blocks = triton.cdiv(count, _TILE.BLOCK_J)
    return Launch(_triangle_attention_bwd_sum, blocks, {"count": count, "groups": groups}, _TILE)
