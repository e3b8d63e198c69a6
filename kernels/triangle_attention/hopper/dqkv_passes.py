"""What stands before `dqkv.py`: terms of the queries, in plain Triton.

    columns of a query     0 to 2: -L / (scale·log2(e))     3 to 5: 1     6 to 8: -δ     9 to 15: 0

each number in three bfloat16, whose sum is it, to 24 bits. L and δ as `lean/operands.py` leaves them, which are left
for the other kernels, too. Past the end of the queries all is 0.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.lean.operands import flag_of, leave_terms, load
from trifast_inductor.kernels.triangle_attention.logits import LOG2E
from trifast_inductor.kernels.triangle_attention.tiling import Tile

_TILE = Tile(BLOCK_I=64, BLOCK_J=16, num_warps=8, num_stages=1)


@triton.jit
def _in_three(x, n):
    """The n-th of three bfloat16 that sum to x."""
    high = x.to(tl.bfloat16).to(tl.float32)
    middle = (x - high).to(tl.bfloat16).to(tl.float32)
    low = x - high - middle
    return tl.where(n == 0, high, tl.where(n == 1, middle, low))


@triton.jit
def _triangle_attention_bwd_query_terms(
    do_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ
    sums_ptr,  # [B, R, H, I, 2] contiguous: row maximum and log2 of the row sum
    huge_ptr,  # [B, R, H, blocks of queries] contiguous
    columns_ptr,  # [B, R, H, blocks of queries, 64, 16] contiguous
    stride_dob: tl.int64,
    stride_dor: tl.int64,
    stride_doi,
    stride_doh: tl.int64,
    R,
    H,
    I,
    J,
    scale,
    D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    HEADS: tl.constexpr,  # of a program
):
    # The heads of a query lie side by side in memory, so a program takes several.
    groups = tl.cdiv(H, HEADS)
    blocks = tl.cdiv(I, BLOCK_I)
    pid = tl.program_id(0)
    block = pid // groups % blocks
    row = (pid // (groups * blocks)).to(tl.int64)
    b = row // R
    r = row % R
    some = tl.arange(0, BLOCK_I * HEADS)
    h = pid % groups * HEADS + some % HEADS
    i = some // HEADS
    in_range = (i < I - block * BLOCK_I) & (h < H)
    first = (block * BLOCK_I).to(tl.int64)
    do_ptr += b * stride_dob + r * stride_dor + first * stride_doi
    d = tl.arange(0, D)
    offsets = (i * stride_doi).to(tl.int64) + h * stride_doh
    do_ptrs = tl.multiple_of(do_ptr + offsets[:, None] + d[None, :], (1, 16))
    do = tl.load(do_ptrs, mask=in_range[:, None], other=0.0)
    out = load(out_ptr + (row * I + first) * H * D, i * H + h, D, in_range, D, False)
    left = (terms_ptr, sums_ptr, huge_ptr)
    _max, _sum, logsum, delta, is_usual, is_uniform = leave_terms(
        (row_max_ptr, row_sum_ptr), left, out, do, row, h, first, i, in_range, (H, I, J)
    )
    of_head = pid % groups * HEADS + tl.arange(0, HEADS)
    flag = flag_of(tl.reshape(is_usual, [BLOCK_I, HEADS]), tl.reshape(is_uniform, [BLOCK_I, HEADS]))
    tl.store(huge_ptr + (row * H + of_head) * blocks + block, flag, mask=of_head < H)
    column = tl.arange(0, 16)[None, :]
    shift = -logsum / (tl.cast(scale, tl.float32) * LOG2E)
    x = _in_three(tl.where(column < 3, shift[:, None], -delta[:, None]), column % 3)
    x = tl.where((column < 3) | ((column > 5) & (column < 9)), x, tl.where(column < 6, 1.0, 0.0))
    x = tl.where(in_range[:, None], x, 0.0)
    place = (((row * H + h) * blocks + block) * BLOCK_I + i) * 16
    tl.store(columns_ptr + place[:, None] + column, x.to(tl.bfloat16), mask=(h < H)[:, None])


class QueryTerms:
    """Makes the terms of calls of one shape and layout."""

    def __init__(self, grad_out: Tensor, J: int, scale: float) -> None:
        B, R, I, H, D = grad_out.shape
        blocks = triton.cdiv(I, 64)
        HEADS = min(4, triton.next_power_of_2(H))
        self._shape = (B * R * H * blocks * 64, 16)
        given = {
            **arguments.strides("do", grad_out, "brihd"),
            "R": R,
            "H": H,
            "I": I,
            "J": J,
            "scale": scale,
            "D": D,
            "HEADS": HEADS,
        }
        programs = B * R * blocks * triton.cdiv(H, HEADS)
        self._make = Launch(_triangle_attention_bwd_query_terms, programs, given, _TILE)

    def __call__(
        self, grad_out: Tensor, out: Tensor, row_max: Tensor, row_sum: Tensor, left: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Columns `[B·R·H·blocks·64, 16]`; `left` takes L and δ, row maximum and log2 of the row sum, what is huge."""
        columns = memory.empty(self._shape, torch.bfloat16, out)
        self._make(grad_out, out, row_max, row_sum, *left, columns)
        return columns
