"""dk = scale·Σ_i ds·q and dv = Σ_i p·grad_out: a program owns a block of keys and walks the queries."""
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
def dkdv_of_block(
    pid,
    operands,
    saved,
    dk_ptr,  # [B, R, J, H, D] contiguous
    dv_ptr,  # [B, R, J, H, D] contiguous
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
    TERMS_ARE_LEFT: tl.constexpr,
):
    of_q, of_k, of_v, of_bias, of_key, of_do = operands
    R, H, I, J, J_bias = sizes
    scale, fill = numbers
    b, r, h, block = program_place(pid, tl.cdiv(J, BLOCK_J), R, H)
    first = block * BLOCK_J
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    j_in_range = within(j, J - first, EVEN_J)

    q_ptr, stride_qi, stride_qd = head_of(of_q, b, r, h)
    k_ptr, stride_kj, stride_kd = head_of(of_k, b, r, h)
    k_ptr += first * stride_kj
    v_ptr, stride_vj, stride_vd = head_of(of_v, b, r, h)
    v_ptr += first * stride_vj
    do_ptr, stride_doi, stride_dod = head_of(of_do, b, r, h)
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j = of_bias
    key_ptr, stride_key_b, stride_key_r, stride_key_j = of_key
    if HAS_BIAS:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + first * tl.cast(stride_bias_j, tl.int64)
        bias_offsets = offset(j, stride_bias_j)[:, None] + offset(i, stride_bias_i)[None, :]
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r + first * tl.cast(stride_key_j, tl.int64)

    k = load_rows(k_ptr, j, j_in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
    v = load_rows(v_ptr, j, j_in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
    key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
    dk = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)

    out_ptr, row_max_ptr, row_sum_ptr, terms_ptr = saved_of_block(saved, b, r, h, 0, sizes, D)
    # Tiles are [j, i] here: p and ds are the left operands of their products as they come.
    for start in range(0, I, BLOCK_I):
        in_range = within(i, I - start, EVEN_I)
        q = load_rows(q_ptr, i, in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
        kq = dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_J, BLOCK_I]
        bias = 0.0
        if HAS_BIAS:
            bias_in_range = within(j, J_bias - first, EVEN_J)[:, None] & in_range[None, :]
            bias = tl.load(bias_ptr + bias_offsets, mask=bias_in_range, other=0.0)
        # Keys past the end are whole rows of this tile, and are not stored: no need to make them -inf.
        x = logits_tile(kq, bias, key[:, None], None, scale, fill, HAS_BIAS, KEY_TERM, KEY_TERM_FIRST, EVEN_J=True)
        do = load_rows(do_ptr, i, in_range, stride_doi, stride_dod, D, BLOCK_D, ALIGNED)
        row_max, log2_sum, delta = query_terms(
            out_ptr + start * H * D,
            row_max_ptr + start,
            row_sum_ptr + start,
            terms_ptr + start,
            do,
            i,
            in_range,
            I,
            H,
            D,
            BLOCK_D,
            TERMS_ARE_LEFT,
        )
        p = probabilities(x, row_max[None, :], log2_sum[None, :])
        dv = dot_of_tile(p.to(do.dtype), do, dv, PRECISION)
        dp = dot(v, tl.trans(do), None, PRECISION)
        ds = p * (dp - delta[None, :])
        if KEY_TERM == "select":
            ds = tl.where(key[:, None], 0.0, ds)
        dk = dot_of_tile(ds.to(q.dtype), q, dk, PRECISION)

        q_ptr += BLOCK_I * stride_qi
        do_ptr += BLOCK_I * stride_doi
        if HAS_BIAS:
            bias_ptr += BLOCK_I * stride_bias_i

    out_offset = (((b * R + r) * J + first) * H + h) * D
    store_rows(dk_ptr + out_offset, dk * scale, j, j_in_range, H * D, D, BLOCK_D)
    store_rows(dv_ptr + out_offset, dv, j, j_in_range, H * D, D, BLOCK_D)


@triton.jit
def _triangle_attention_bwd_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    do_ptr,
    row_max_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, 2, I] contiguous
    dk_ptr,  # [B, R, J, H, D] contiguous
    dv_ptr,  # [B, R, J, H, D] contiguous
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
    operands = (
        (q_ptr, stride_qb, stride_qr, stride_qi, stride_qh, stride_qd),
        (k_ptr, stride_kb, stride_kr, stride_kj, stride_kh, stride_kd),
        (v_ptr, stride_vb, stride_vr, stride_vj, stride_vh, stride_vd),
        (bias_ptr, stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j),
        (key_ptr, stride_key_b, stride_key_r, stride_key_j),
        (do_ptr, stride_dob, stride_dor, stride_doi, stride_doh, stride_dod),
    )
    dkdv_of_block(
        tl.program_id(0),
        operands,
        (row_max_ptr, row_max_ptr, row_max_ptr, terms_ptr),
        dk_ptr,
        dv_ptr,
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
        TERMS_ARE_LEFT=True,
    )
