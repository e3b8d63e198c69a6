"""The bias as the other kernels read it: in rows that lie dense and start and end on 16 elements.

A bias is often a view of `[B, I, J, H]`, and J any number; each of its elements would then be loaded through a
pointer of its own, once for each row r. A copy has the size of the bias, and is read R times.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.order import after_the_kernel_before
from trifast_inductor.kernels.triangle_attention.tiling import Tile

# Keys of a row that a program copies; four warps then take 8 elements a thread.
ROW = tl.constexpr(1024)
_TILE = Tile(BLOCK_I=1, BLOCK_J=ROW.value, num_warps=4, num_stages=1)


@triton.jit
def copy_row(bias_ptr, rows_ptr, strides, H, I, J, J_bias, pid, BLOCK_J: tl.constexpr):
    """The part of a row that is the pid-th, of blocks of so many keys; zeros past its end."""
    blocks = tl.cdiv(J_bias, BLOCK_J)
    row = pid // blocks
    j = pid % blocks * BLOCK_J + tl.arange(0, BLOCK_J)
    head = (row // I).to(tl.int64)
    bias_ptr += head // H * strides[0] + head % H * strides[1] + row % I * strides[2]
    bias = tl.load(bias_ptr + j * strides[3], mask=j < J, other=0.0)
    tl.store(rows_ptr + row.to(tl.int64) * J_bias + j, bias, mask=j < J_bias)


@triton.jit
def _triangle_attention_bias_rows(
    bias_ptr,
    rows_ptr,  # [B, H, I, J_bias] contiguous
    stride_bias_b: tl.int64,
    stride_bias_h: tl.int64,
    stride_bias_i: tl.int64,
    stride_bias_j: tl.int64,
    H,
    I,
    J,
    J_bias,
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_kernel_before(PDL)
    strides = (stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j)
    copy_row(bias_ptr, rows_ptr, strides, H, I, J, J_bias, tl.program_id(0), BLOCK_J)


def shape_of_copy(bias: Tensor) -> tuple[int, int, int, int] | None:
    """Its rows end on 16 elements; None where the bias can be read as it lies."""
    if arguments.bias_is_aligned(bias):
        return None
    B, H, I, J = bias.shape
    return B, H, I, J + -J % 16


def programs_to_copy(shape: tuple[int, int, int, int]) -> int:
    B, H, I, J_bias = shape
    return B * H * I * triton.cdiv(J_bias, ROW.value)


class AlignedRows:
    """Copies a bias of one shape and layout, unless it can be read as it lies or there is none."""

    def __init__(self, bias: Tensor | None) -> None:
        self._copy: Launch | None = None
        shape = None if bias is None else shape_of_copy(bias)
        if bias is not None and shape is not None:
            self._shape = shape
            sizes = {"H": shape[1], "I": shape[2], "J": bias.shape[3], "J_bias": shape[3]}
            given = arguments.strides("bias_", bias, "bhij")
            self._copy = Launch(_triangle_attention_bias_rows, programs_to_copy(shape), {**given, **sizes}, _TILE)

    def __call__(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or self._copy is None:
            return bias
        rows = memory.empty(self._shape, bias.dtype, bias)
        self._copy(bias, rows)
        return rows
