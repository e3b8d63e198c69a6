"""All gradients in one launch, for short sequences: programs for dbias, for dk and dv, and for dq side by side.

Each finds the terms of its queries for itself, so that none waits for another: at N=64 three kernels one after the
other leave most of a GPU idle, and a launch costs the host about what a kernel costs the GPU.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.order import after_the_kernel_before
from trifast_inductor.kernels.triangle_attention.portable.dbias import dbias_of_tile
from trifast_inductor.kernels.triangle_attention.portable.dkdv import dkdv_of_block
from trifast_inductor.kernels.triangle_attention.portable.dq import dq_of_block


@triton.jit
def _triangle_attention_bwd_together(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    do_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, 2, I] contiguous, from the kernel for dq if that ran before
    dq_ptr,  # [B, R, I, H, D] contiguous
    dk_ptr,  # [B, R, J, H, D] contiguous
    dv_ptr,  # [B, R, J, H, D] contiguous
    dbias_ptr,  # [groups, B, H, I, J] contiguous
    sum_ptr,  # [B, H, I, J] contiguous: of the groups, where a kernel before has left zeros to count them
    counts_ptr,
    stride_qb: tl.int64,
    stride_qr: tl.int64,
    stride_qi: tl.int64,
    stride_qh: tl.int64,
    stride_qd,
    stride_kb: tl.int64,
    stride_kr: tl.int64,
    stride_kj: tl.int64,
    stride_kh: tl.int64,
    stride_kd,
    stride_vb: tl.int64,
    stride_vr: tl.int64,
    stride_vj: tl.int64,
    stride_vh: tl.int64,
    stride_vd,
    stride_bias_b: tl.int64,
    stride_bias_h: tl.int64,
    stride_bias_i: tl.int64,
    stride_bias_j,
    stride_key_b: tl.int64,
    stride_key_r: tl.int64,
    stride_key_j,
    stride_dob: tl.int64,
    stride_dor: tl.int64,
    stride_doi: tl.int64,
    stride_doh: tl.int64,
    stride_dod,
    B,
    R,
    H,
    I,
    J,
    rows,  # of r, to a group
    groups,
    J_bias,  # J rounded up: so far do the rows of the bias go
    programs_dbias,
    programs_dkdv,
    scale,
    fill,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    NEEDS_DBIAS: tl.constexpr,
    WITH_DQ: tl.constexpr,
    DQ_EVEN_I: tl.constexpr,
    DQ_EVEN_J: tl.constexpr,
    DQ_BLOCK_I: tl.constexpr,
    DQ_BLOCK_J: tl.constexpr,
    DKDV_EVEN_I: tl.constexpr,
    DKDV_EVEN_J: tl.constexpr,
    DKDV_BLOCK_I: tl.constexpr,
    DKDV_BLOCK_J: tl.constexpr,
    DBIAS_EVEN_I: tl.constexpr,
    DBIAS_EVEN_J: tl.constexpr,
    DBIAS_BLOCK_I: tl.constexpr,
    DBIAS_BLOCK_J: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_kernel_before(PDL)
    operands = (
        (q_ptr, stride_qb, stride_qr, stride_qi, stride_qh, stride_qd),
        (k_ptr, stride_kb, stride_kr, stride_kj, stride_kh, stride_kd),
        (v_ptr, stride_vb, stride_vr, stride_vj, stride_vh, stride_vd),
        (bias_ptr, stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j),
        (key_ptr, stride_key_b, stride_key_r, stride_key_j),
        (do_ptr, stride_dob, stride_dor, stride_doi, stride_doh, stride_dod),
    )
    saved = (out_ptr, row_max_ptr, row_sum_ptr, row_max_ptr if WITH_DQ else terms_ptr)
    sizes = (R, H, I, J, J_bias)
    numbers = (scale, fill)
    pid = tl.program_id(0)
    # dbias first, whose programs take longest.
    if NEEDS_DBIAS and pid < programs_dbias:
        dbias_of_tile(
            pid,
            operands,
            saved,
            dbias_ptr,
            sum_ptr,
            counts_ptr,
            groups,
            B,
            rows,
            sizes,
            numbers,
            D,
            BLOCK_D,
            HAS_BIAS,
            KEY_TERM,
            KEY_TERM_FIRST,
            PRECISION,
            ALIGNED,
            DBIAS_EVEN_I,
            DBIAS_EVEN_J,
            DBIAS_BLOCK_I,
            DBIAS_BLOCK_J,
            TERMS_ARE_LEFT=not WITH_DQ,
        )
    elif not WITH_DQ or pid < programs_dbias + programs_dkdv:
        dkdv_of_block(
            pid - programs_dbias,
            operands,
            saved,
            dk_ptr,
            dv_ptr,
            sizes,
            numbers,
            D,
            BLOCK_D,
            HAS_BIAS,
            KEY_TERM,
            KEY_TERM_FIRST,
            PRECISION,
            ALIGNED,
            DKDV_EVEN_I,
            DKDV_EVEN_J,
            DKDV_BLOCK_I,
            DKDV_BLOCK_J,
            TERMS_ARE_LEFT=not WITH_DQ,
        )
    else:
        dq_of_block(
            pid - programs_dbias - programs_dkdv,
            operands,
            saved,
            dq_ptr,
            sizes,
            numbers,
            D,
            BLOCK_D,
            HAS_BIAS,
            KEY_TERM,
            KEY_TERM_FIRST,
            PRECISION,
            ALIGNED,
            DQ_EVEN_I,
            DQ_EVEN_J,
            DQ_BLOCK_I,
            DQ_BLOCK_J,
            LEAVE_TERMS=False,
        )
