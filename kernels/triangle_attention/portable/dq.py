"""dq = scale·Σ_j ds·k: a program owns a block of queries and walks the keys."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.logits import (
    dot,
    dot_of_tile,
    head_of,
    load_key_term,
    load_rows,
    logits_tile,
    offset,
    probabilities,
    store_rows,
    within,
)
from trifast_inductor.kernels.triangle_attention.order import after_the_kernel_before, program_place
from trifast_inductor.kernels.triangle_attention.portable.operands import query_terms, saved_of_block


@triton.jit
def dq_of_block(
    pid,
    operands,
    saved,  # the terms are left here, if others want them
    dq_ptr,  # [B, R, I, H, D] contiguous
    sizes,
    numbers,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    LEAVE_TERMS: tl.constexpr,
):
    of_q, of_k, of_v, of_bias, of_key, of_do = operands
    R, H, I, J, J_bias = sizes
    scale, fill = numbers
    b, r, h, block = program_place(pid, tl.cdiv(I, BLOCK_I), R, H)
    first = block * BLOCK_I
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    i_in_range = within(i, I - first, EVEN_I)

    q_ptr, stride_qi, stride_qd = head_of(of_q, b, r, h)
    q_ptr += first * stride_qi
    k_ptr, stride_kj, stride_kd = head_of(of_k, b, r, h)
    v_ptr, stride_vj, stride_vd = head_of(of_v, b, r, h)
    do_ptr, stride_doi, stride_dod = head_of(of_do, b, r, h)
    do_ptr += first * stride_doi
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j = of_bias
    key_ptr, stride_key_b, stride_key_r, stride_key_j = of_key
    if HAS_BIAS:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + first * stride_bias_i
        bias_offsets = offset(i, stride_bias_i)[:, None] + offset(j, stride_bias_j)[None, :]
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r

    q = load_rows(q_ptr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
    do = load_rows(do_ptr, i, i_in_range, stride_doi, stride_dod, D, BLOCK_D, ALIGNED)
    out_ptr, row_max_ptr, row_sum_ptr, terms_ptr = saved_of_block(saved, b, r, h, first, sizes, D)
    row_max, log2_sum, delta = query_terms(
        out_ptr, row_max_ptr, row_sum_ptr, terms_ptr, do, i, i_in_range, I, H, D, BLOCK_D, TERMS_ARE_LEFT=False
    )
    if LEAVE_TERMS:
        tl.store(terms_ptr + i, log2_sum, mask=i_in_range)
        tl.store(terms_ptr + I + i, delta, mask=i_in_range)

    dq = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for start in range(0, J, BLOCK_J):
        in_range = within(j, J - start, EVEN_J)
        k = load_rows(k_ptr, j, in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
        qk = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_I, BLOCK_J]
        key = load_key_term(key_ptr, j, in_range, stride_key_j, KEY_TERM)
        bias = 0.0
        if HAS_BIAS:
            bias_in_range = i_in_range[:, None] & within(j, J_bias - start, EVEN_J)[None, :]
            bias = tl.load(bias_ptr + bias_offsets, mask=bias_in_range, other=0.0)
        x = logits_tile(
            qk,
            bias,
            key[None, :],
            in_range[None, :],
            scale,
            fill,
            HAS_BIAS,
            KEY_TERM,
            KEY_TERM_FIRST,
            EVEN_J,
        )
        p = probabilities(x, row_max[:, None], log2_sum[:, None])
        v = load_rows(v_ptr, j, in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
        dp = dot(do, tl.trans(v), None, PRECISION)
        ds = p * (dp - delta[:, None])
        if KEY_TERM == "select":
            ds = tl.where(key[None, :], 0.0, ds)
        if not EVEN_J:
            # p is NaN, not 0, past the end of a row whose logits are all -inf.
            ds = tl.where(in_range[None, :], ds, 0.0)
        dq = dot_of_tile(ds.to(k.dtype), k, dq, PRECISION)

        k_ptr += BLOCK_J * stride_kj
        v_ptr += BLOCK_J * stride_vj
        if HAS_BIAS:
            bias_ptr += BLOCK_J * tl.cast(stride_bias_j, tl.int64)
        if KEY_TERM != "none":
            key_ptr += BLOCK_J * tl.cast(stride_key_j, tl.int64)

    dq_ptr += (((b * R + r) * I + first) * H + h) * D
    store_rows(dq_ptr, dq * scale, i, i_in_range, H * D, D, BLOCK_D)


@triton.jit
def _triangle_attention_bwd_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    do_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, 2, I] contiguous: log2 of the sum and δ are left here for the other kernels
    dq_ptr,  # [B, R, I, H, D] contiguous
    counts_ptr,  # [counts], to which zeros are written, for a kernel that counts
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
    R,
    H,
    I,
    J,
    J_bias,  # J rounded up: so far do the rows of the bias go
    counts,  # no more than there are programs
    scale,
    fill,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_kernel_before(PDL)
    if counts_ptr is not None:
        tl.store(counts_ptr + tl.program_id(0), 0, mask=tl.program_id(0) < counts)
    operands = (
        (q_ptr, stride_qb, stride_qr, stride_qi, stride_qh, stride_qd),
        (k_ptr, stride_kb, stride_kr, stride_kj, stride_kh, stride_kd),
        (v_ptr, stride_vb, stride_vr, stride_vj, stride_vh, stride_vd),
        (bias_ptr, stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j),
        (key_ptr, stride_key_b, stride_key_r, stride_key_j),
        (do_ptr, stride_dob, stride_dor, stride_doi, stride_doh, stride_dod),
    )
    dq_of_block(
        tl.program_id(0),
        operands,
        (out_ptr, row_max_ptr, row_sum_ptr, terms_ptr),
        dq_ptr,
        (R, H, I, J, J_bias),
        (scale, fill),
        D,
        BLOCK_D,
        HAS_BIAS,
        KEY_TERM,
        KEY_TERM_FIRST,
        PRECISION,
        ALIGNED,
        EVEN_I,
        EVEN_J,
        BLOCK_I,
        BLOCK_J,
        LEAVE_TERMS=True,
    )
