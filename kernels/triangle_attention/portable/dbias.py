"""dbias = Σ_r ds: a program owns a tile of `[i, j]` and walks the rows, or a group of them."""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.logits import (
    dot,
    head_of,
    load_key_term,
    load_rows,
    logits_tile,
    offset,
    probabilities,
    within,
)
from trifast_inductor.kernels.triangle_attention.order import after_the_kernel_before
from trifast_inductor.kernels.triangle_attention.portable.operands import query_terms, saved_of_block
from trifast_inductor.kernels.triangle_attention.sums import add_up_if_last


@triton.jit
def dbias_of_tile(
    pid,
    operands,
    saved,
    dbias_ptr,  # [groups, B, H, I, J] contiguous
    sum_ptr,  # [B, H, I, J] contiguous: of the groups, if they are counted
    counts_ptr,  # how many groups of a tile are done, zeros at first; None where they are left apart
    groups,
    B,
    rows,  # of r, to a group
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
    # Keys innermost: neighbours share the queries of a row.
    blocks_i = tl.cdiv(I, BLOCK_I)
    blocks_j = tl.cdiv(J, BLOCK_J)
    head = (pid // (blocks_i * blocks_j)).to(tl.int64)  # of [groups, B, H]
    h = head % H
    b = head // H % B
    first_row = head // H // B * rows
    rows = tl.minimum(rows, R - first_row).to(tl.int32)
    first_i = pid // blocks_j % blocks_i * BLOCK_I
    first_j = (pid % blocks_j * BLOCK_J).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    i_in_range = within(i, I - first_i, EVEN_I)
    j_in_range = within(j, J - first_j, EVEN_J)
    in_range = i_in_range[:, None] & j_in_range[None, :]

    q_ptr, stride_qi, stride_qd = head_of(of_q, b, first_row, h)
    k_ptr, stride_kj, stride_kd = head_of(of_k, b, first_row, h)
    v_ptr, stride_vj, stride_vd = head_of(of_v, b, first_row, h)
    do_ptr, stride_doi, stride_dod = head_of(of_do, b, first_row, h)
    q_ptr += first_i * stride_qi
    k_ptr += first_j * stride_kj
    v_ptr += first_j * stride_vj
    do_ptr += first_i * stride_doi
    bias_ptr, stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j = of_bias
    key_ptr, stride_key_b, stride_key_r, stride_key_j = of_key
    bias_ptr += b * stride_bias_b + h * stride_bias_h + first_i * stride_bias_i + first_j * stride_bias_j
    bias_offsets = offset(i, stride_bias_i)[:, None] + offset(j, stride_bias_j)[None, :]
    bias_in_range = i_in_range[:, None] & within(j, J_bias - first_j, EVEN_J)[None, :]
    bias = tl.load(bias_ptr + bias_offsets, mask=bias_in_range, other=0.0)
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + first_row * stride_key_r + first_j * stride_key_j

    dbias = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    out_ptr, row_max_ptr, row_sum_ptr, terms_ptr = saved_of_block(saved, b, first_row, h, first_i, sizes, D)
    for _ in range(rows):
        q = load_rows(q_ptr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
        k = load_rows(k_ptr, j, j_in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
        qk = dot(q, tl.trans(k), None, PRECISION)
        key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
        # Keys past the end are not stored: no need to make them -inf.
        x = logits_tile(qk, bias, key[None, :], None, scale, fill, HAS_BIAS, KEY_TERM, KEY_TERM_FIRST, EVEN_J=True)
        do = load_rows(do_ptr, i, i_in_range, stride_doi, stride_dod, D, BLOCK_D, ALIGNED)
        row_max, log2_sum, delta = query_terms(
            out_ptr, row_max_ptr, row_sum_ptr, terms_ptr, do, i, i_in_range, I, H, D, BLOCK_D, TERMS_ARE_LEFT
        )
        p = probabilities(x, row_max[:, None], log2_sum[:, None])
        v = load_rows(v_ptr, j, j_in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
        dp = dot(do, tl.trans(v), None, PRECISION)
        ds = p * (dp - delta[:, None])
        if KEY_TERM == "select" and not KEY_TERM_FIRST:
            ds = tl.where(key[None, :], 0.0, ds)
        dbias += ds

        q_ptr += of_q[2]
        k_ptr += of_k[2]
        v_ptr += of_v[2]
        do_ptr += of_do[2]
        row_max_ptr += H * I
        if TERMS_ARE_LEFT:
            terms_ptr += 2 * H * I
        else:
            row_sum_ptr += H * I
            out_ptr += I * H * D
        if KEY_TERM != "none":
            key_ptr += stride_key_r

    offsets = first_i.to(tl.int64) * J + first_j + ((i * J)[:, None] + j[None, :])
    tl.store(dbias_ptr + head * I * J + offsets, dbias.to(dbias_ptr.dtype.element_ty), mask=in_range)
    if counts_ptr is not None:
        tiles = B * H * blocks_i * blocks_j
        offsets += (b * H + h) * I * J
        step = tl.cast(B, tl.int64) * H * I * J
        add_up_if_last(dbias_ptr + offsets, sum_ptr + offsets, counts_ptr + pid % tiles, step, groups, in_range)


@triton.jit
def _triangle_attention_bwd_dbias(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    do_ptr,
    row_max_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, 2, I] contiguous
    dbias_ptr,  # [groups, B, H, I, J] contiguous
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
    dbias_of_tile(
        tl.program_id(0),
        operands,
        (row_max_ptr, row_max_ptr, row_max_ptr, terms_ptr),
        dbias_ptr,
        None,
        None,
        1,
        B,
        rows,
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
