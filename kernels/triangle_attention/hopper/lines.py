"""Rows r that a program owns, and what the logits of one need of its queries and keys, in pieces of 64."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from trifast_inductor.kernels.triangle_attention.hopper.tuples import appended

_PIECE = gl.constexpr(64)


@gluon.jit
def own_rows(B, R, H, rows):
    """Of which head a program owns rows, which group of them it is, its first row, and how many they are."""
    pid = gl.program_id(0)
    group = pid // (B * H)
    first_row = group * rows
    return pid // H % B, pid % H, group, first_row, gl.minimum(rows, R - first_row)


@gluon.jit
def load_lines(
    ptrs,
    strides,
    b,
    r,
    h,
    R,
    H,
    I,
    J,
    KEY_TERM: gl.constexpr,
    TI: gl.constexpr,
    TJ: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    """Row maximum and row sum of each query, and the term of each key."""
    key_ptr, row_max_ptr, row_sum_ptr = ptrs
    stride_key_b, stride_key_r, stride_key_j = strides
    piece = gl.arange(0, _PIECE, layout=gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
    of_row = ((b * R + r).to(gl.int64) * H + h) * I
    row_max = ()
    row_sum = ()
    key = ()
    for n in gl.static_range(TI):
        i = n * _PIECE + piece
        row_max = appended(row_max, gl.load(row_max_ptr + of_row + i, mask=i < I, other=float("inf")))
        row_sum = appended(row_sum, gl.load(row_sum_ptr + of_row + i, mask=i < I, other=1.0))
    if KEY_TERM != "none":
        key_ptr += b.to(gl.int64) * stride_key_b + r.to(gl.int64) * stride_key_r
        for n in gl.static_range(TJ):
            j = n * _PIECE + piece
            key = appended(key, gl.load(key_ptr + j.to(gl.int64) * stride_key_j, mask=j < J, other=0))
    return row_max, row_sum, key


@gluon.jit
def leave_lines(lines, smems, do_smem, out_smem, D: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Into shared memory what `load_lines` has loaded, the log2 of the row sum, and δ; all are tuples of pieces."""
    row_max, row_sum, key = lines
    max_smem, sum_smem, key_smem, delta_smem = smems
    THREADS: gl.constexpr = NUM_WARPS // 2  # to a query
    ROWS: gl.constexpr = gl.BlockedLayout([1, D // THREADS], [32 // THREADS, THREADS], [NUM_WARPS, 1], [1, 0])
    for n in gl.static_range(len(key)):
        key_smem[n].store(key[n])  # handed over by lines_full
    for n in gl.static_range(len(row_max)):
        max_smem[n].store(row_max[n])  # handed over by lines_full
        sum_smem[n].store(gl.log2(row_sum[n]))  # handed over by lines_full
        out = out_smem[n].reshape([_PIECE, D]).load(ROWS).to(gl.float32)
        do = do_smem[n].reshape([_PIECE, D]).load(ROWS).to(gl.float32)
        delta_smem[n].store(gl.sum(out * do, 1))  # handed over by lines_full
