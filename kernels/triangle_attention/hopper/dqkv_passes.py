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

from trifast_inductor.kernels.triangle_attention import arguments
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.lean.operands import leave_terms, load
from trifast_inductor.kernels.triangle_attention.logits import LOG2E
from trifast_inductor.kernels.triangle_attention.tiling import Tile

_TILE = Tile(BLOCK_I=64, BLOCK_J=16, num_warps=4, num_stages=1)


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
):
    # Heads innermost: those of a query lie side by side in memory.
    blocks = tl.cdiv(I, BLOCK_I)
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    block = pid // H % blocks
    row = (pid // (H * blocks)).to(tl.int64)
    b = row // R
    r = row % R
    first = (block * BLOCK_I).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    in_range = i < I - first
    head = row * H + h
    do_ptr += b * stride_dob + r * stride_dor + h * stride_doh + first * stride_doi
    do = load(do_ptr, i, stride_doi, in_range, D, False)
    saved = (out_ptr, row_max_ptr, row_sum_ptr)
    left = (terms_ptr, sums_ptr, huge_ptr)
    _max, _sum, logsum, delta, _huge = leave_terms(saved, left, do, b, r, h, block, (R, H, I, J), D, BLOCK_I)
    column = tl.arange(0, 16)[None, :]
    shift = -logsum / (tl.cast(scale, tl.float32) * LOG2E)
    x = _in_three(tl.where(column < 3, shift[:, None], -delta[:, None]), column % 3)
    x = tl.where((column < 3) | ((column > 5) & (column < 9)), x, tl.where(column < 6, 1.0, 0.0))
    x = tl.where(in_range[:, None], x, 0.0)
    columns_ptr += (head * blocks + block) * (BLOCK_I * 16)
    tl.store(columns_ptr + i[:, None] * 16 + column, x.to(tl.bfloat16))


class QueryTerms:
    """Makes the terms of calls of one shape and layout."""

    def __init__(self, grad_out: Tensor, J: int, scale: float) -> None:
        B, R, I, H, D = grad_out.shape
        programs = B * R * H * triton.cdiv(I, 64)
        self._shape = (programs * 64, 16)
        given = {**arguments.strides("do", grad_out, "brihd"), "R": R, "H": H, "I": I, "J": J, "scale": scale, "D": D}
        self._make = Launch(_triangle_attention_bwd_query_terms, programs, given, _TILE)

    def __call__(
        self, grad_out: Tensor, out: Tensor, row_max: Tensor, row_sum: Tensor, left: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """Columns `[B·R·H·blocks·64, 16]`; `left` takes L and δ, row maximum and log2 of the row sum, what is huge."""
        columns = torch.empty(self._shape, dtype=torch.bfloat16, device=out.device)
        self._make(grad_out, out, row_max, row_sum, *left, columns)
        return columns
