"""Backward in plain Triton: three passes that recompute the probabilities, deterministic and without atomics.

    p = exp(x - row_max) / row_sum     dp = ⟨grad_out, v⟩     δ = Σ_d out·grad_out     ds = p·(dp - δ)
    dq = scale·Σ_j ds·k     dk = scale·Σ_i ds·q     dv = Σ_i p·grad_out     dbias = Σ_r ds

dq walks the keys and leaves δ for the others; dk and dv walk the queries; dbias owns a tile of `[i, j]` and
walks the rows, so that nothing is added up across programs. The price: nine products where five would do.

A key term that selects cuts ds off from q and k; from the bias as well, unless the bias came after it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, tiling
from trifast_inductor.kernels.triangle_attention.logits import (
    dot,
    load_key_term,
    load_rows,
    logits_tile,
    offset,
    probabilities,
    store_rows,
)
from trifast_inductor.kernels.triangle_attention.order import program_place


@triton.jit
def _triangle_attention_bwd_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    do_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous, as the next three
    row_sum_ptr,
    log2_sum_ptr,  # the two that the other kernels need are written here
    delta_ptr,
    dq_ptr,  # [B, R, I, H, D] contiguous
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
    EVEN_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    b, r, h, block = program_place(tl.cdiv(I, BLOCK_I), R, H)
    first = block * BLOCK_I
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    i_in_range = i < I - first

    q_ptr += b * stride_qb + r * stride_qr + h * stride_qh + first * stride_qi
    k_ptr += b * stride_kb + r * stride_kr + h * stride_kh
    v_ptr += b * stride_vb + r * stride_vr + h * stride_vh
    do_ptr += b * stride_dob + r * stride_dor + h * stride_doh + first * stride_doi
    if HAS_BIAS:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + first * stride_bias_i
        bias_offsets = offset(i, stride_bias_i)[:, None] + offset(j, stride_bias_j)[None, :]
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r
    out_offset = (((b * R + r) * I + first) * H + h) * D
    statistics = ((b * R + r) * H + h) * I + first + i

    q = load_rows(q_ptr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
    do = load_rows(do_ptr, i, i_in_range, stride_doi, stride_dod, D, BLOCK_D, ALIGNED)
    out = load_rows(out_ptr + out_offset, i, i_in_range, H * D, 1, D, BLOCK_D, ALIGNED=False)
    row_max = tl.load(row_max_ptr + statistics, mask=i_in_range, other=0.0)
    log2_sum = tl.log2(tl.load(row_sum_ptr + statistics, mask=i_in_range, other=1.0))
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(log2_sum_ptr + statistics, log2_sum, mask=i_in_range)
    tl.store(delta_ptr + statistics, delta, mask=i_in_range)

    dq = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
    for start in range(0, J, BLOCK_J):
        in_range = j < J - start
        k = load_rows(k_ptr, j, in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
        qk = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_I, BLOCK_J]
        key = load_key_term(key_ptr, j, in_range, stride_key_j, KEY_TERM)
        bias = 0.0
        if HAS_BIAS:
            bias_in_range = i_in_range[:, None] & (j < J_bias - start)[None, :]
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
        dq = dot(ds.to(k.dtype), k, dq, PRECISION)

        k_ptr += BLOCK_J * stride_kj
        v_ptr += BLOCK_J * stride_vj
        if HAS_BIAS:
            bias_ptr += BLOCK_J * tl.cast(stride_bias_j, tl.int64)
        if KEY_TERM != "none":
            key_ptr += BLOCK_J * tl.cast(stride_key_j, tl.int64)

    store_rows(dq_ptr + out_offset, dq * scale, i, i_in_range, H * D, D, BLOCK_D)


@triton.jit
def _triangle_attention_bwd_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    do_ptr,
    row_max_ptr,  # [B, R, H, I] contiguous, as the next two
    log2_sum_ptr,
    delta_ptr,
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
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    b, r, h, block = program_place(tl.cdiv(J, BLOCK_J), R, H)
    first = block * BLOCK_J
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    j_in_range = j < J - first

    q_ptr += b * stride_qb + r * stride_qr + h * stride_qh
    k_ptr += b * stride_kb + r * stride_kr + h * stride_kh + first * stride_kj
    v_ptr += b * stride_vb + r * stride_vr + h * stride_vh + first * stride_vj
    do_ptr += b * stride_dob + r * stride_dor + h * stride_doh
    if HAS_BIAS:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + first * tl.cast(stride_bias_j, tl.int64)
        bias_offsets = offset(j, stride_bias_j)[:, None] + offset(i, stride_bias_i)[None, :]
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r + first * tl.cast(stride_key_j, tl.int64)
    statistics = ((b * R + r) * H + h) * I + i

    k = load_rows(k_ptr, j, j_in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
    v = load_rows(v_ptr, j, j_in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
    key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
    dk = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)

    # Tiles are [j, i] here: p and ds are the left operands of their products as they come.
    for start in range(0, I, BLOCK_I):
        in_range = i < I - start
        q = load_rows(q_ptr, i, in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
        kq = dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_J, BLOCK_I]
        bias = 0.0
        if HAS_BIAS:
            bias_in_range = (j < J_bias - first)[:, None] & in_range[None, :]
            bias = tl.load(bias_ptr + bias_offsets, mask=bias_in_range, other=0.0)
        # Keys past the end are whole rows of this tile, and are not stored: no need to make them -inf.
        x = logits_tile(kq, bias, key[:, None], None, scale, fill, HAS_BIAS, KEY_TERM, KEY_TERM_FIRST, EVEN_J=True)
        # An infinite maximum makes p = 0 for a query past the end, whatever the key term.
        row_max = tl.load(row_max_ptr + statistics + start, mask=in_range, other=float("inf"))
        log2_sum = tl.load(log2_sum_ptr + statistics + start, mask=in_range, other=0.0)
        delta = tl.load(delta_ptr + statistics + start, mask=in_range, other=0.0)
        p = probabilities(x, row_max[None, :], log2_sum[None, :])
        do = load_rows(do_ptr, i, in_range, stride_doi, stride_dod, D, BLOCK_D, ALIGNED)
        dv = dot(p.to(do.dtype), do, dv, PRECISION)
        dp = dot(v, tl.trans(do), None, PRECISION)
        ds = p * (dp - delta[None, :])
        if KEY_TERM == "select":
            ds = tl.where(key[:, None], 0.0, ds)
        dk = dot(ds.to(q.dtype), q, dk, PRECISION)

        q_ptr += BLOCK_I * stride_qi
        do_ptr += BLOCK_I * stride_doi
        if HAS_BIAS:
            bias_ptr += BLOCK_I * stride_bias_i

    out_offset = (((b * R + r) * J + first) * H + h) * D
    store_rows(dk_ptr + out_offset, dk * scale, j, j_in_range, H * D, D, BLOCK_D)
    store_rows(dv_ptr + out_offset, dv, j, j_in_range, H * D, D, BLOCK_D)


@triton.jit
def _triangle_attention_bwd_dbias(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    do_ptr,
    row_max_ptr,  # [B, R, H, I] contiguous, as the next two
    log2_sum_ptr,
    delta_ptr,
    dbias_ptr,  # [B, H, I, J] contiguous
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
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    # Keys innermost: neighbours share the queries of a row.
    pid = tl.program_id(0)
    blocks_i = tl.cdiv(I, BLOCK_I)
    blocks_j = tl.cdiv(J, BLOCK_J)
    head = pid // (blocks_i * blocks_j)
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    first_i = pid // blocks_j % blocks_i * BLOCK_I
    first_j = (pid % blocks_j * BLOCK_J).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    i_in_range = i < I - first_i
    j_in_range = j < J - first_j
    in_range = i_in_range[:, None] & j_in_range[None, :]

    q_ptr += b * stride_qb + h * stride_qh + first_i * stride_qi
    k_ptr += b * stride_kb + h * stride_kh + first_j * stride_kj
    v_ptr += b * stride_vb + h * stride_vh + first_j * stride_vj
    do_ptr += b * stride_dob + h * stride_doh + first_i * stride_doi
    bias_ptr += b * stride_bias_b + h * stride_bias_h + first_i * stride_bias_i + first_j * stride_bias_j
    bias_offsets = offset(i, stride_bias_i)[:, None] + offset(j, stride_bias_j)[None, :]
    bias_in_range = i_in_range[:, None] & (j < J_bias - first_j)[None, :]
    bias = tl.load(bias_ptr + bias_offsets, mask=bias_in_range, other=0.0)
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + first_j * stride_key_j
    statistics = (b * R * H + h) * I + first_i + i

    dbias = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for _ in range(R):
        q = load_rows(q_ptr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
        k = load_rows(k_ptr, j, j_in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
        qk = dot(q, tl.trans(k), None, PRECISION)
        key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
        # Keys past the end are not stored: no need to make them -inf.
        x = logits_tile(qk, bias, key[None, :], None, scale, fill, HAS_BIAS, KEY_TERM, KEY_TERM_FIRST, EVEN_J=True)
        row_max = tl.load(row_max_ptr + statistics, mask=i_in_range, other=0.0)
        log2_sum = tl.load(log2_sum_ptr + statistics, mask=i_in_range, other=0.0)
        delta = tl.load(delta_ptr + statistics, mask=i_in_range, other=0.0)
        p = probabilities(x, row_max[:, None], log2_sum[:, None])
        do = load_rows(do_ptr, i, i_in_range, stride_doi, stride_dod, D, BLOCK_D, ALIGNED)
        v = load_rows(v_ptr, j, j_in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
        dp = dot(do, tl.trans(v), None, PRECISION)
        ds = p * (dp - delta[:, None])
        if KEY_TERM == "select" and not KEY_TERM_FIRST:
            ds = tl.where(key[None, :], 0.0, ds)
        dbias += ds

        q_ptr += stride_qr
        k_ptr += stride_kr
        v_ptr += stride_vr
        do_ptr += stride_dor
        statistics += H * I
        if KEY_TERM != "none":
            key_ptr += stride_key_r

    tl.store(
        dbias_ptr + (head.to(tl.int64) * I + first_i) * J + first_j + (i * J)[:, None] + j[None, :],
        dbias.to(dbias_ptr.dtype.element_ty),
        mask=in_range,
    )


def launch(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    scale: float,
    fill: float,
    key_term_first: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv in the shapes and dtype of q, k, v, and dbias in those of bias, all contiguous.

    Takes what `op.py` has checked, in any strides. dbias is empty unless there is a bias and it is asked for.
    Two runs on the same inputs agree to the bit.
    """
    B, R, I, H, D = q.shape
    J = k.shape[2]
    # Allocated dense: `empty_like` would keep the strides of an input.
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=q.dtype, device=q.device)
    dv = torch.empty(v.shape, dtype=q.dtype, device=q.device)
    if bias is not None and needs_dbias:
        dbias = torch.empty(bias.shape, dtype=bias.dtype, device=q.device)
    else:
        dbias = torch.empty(0, dtype=q.dtype, device=q.device)
    if 0 in (B, R, I, H, J):
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()

    out, row_max, row_sum = out.contiguous(), row_max.contiguous(), row_sum.contiguous()
    shared = arguments.shared(q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first)
    shared |= {
        "do_ptr": grad_out,
        **arguments.strides("do", grad_out, "brihd"),
        "row_max_ptr": row_max,
        "log2_sum_ptr": torch.empty_like(row_max),
        "delta_ptr": torch.empty_like(row_max),
        "ALIGNED": shared["ALIGNED"] and arguments.rows_are_aligned(grad_out),
    }
    launch_key = (H, shared["KEY_TERM"] != "none", shared["HAS_BIAS"], q.get_device())
    with torch.cuda.device_of(q):
        tile = tiling.dq_tile(q.dtype, D, I, J, shared["PRECISION"], *launch_key)
        _triangle_attention_bwd_dq[(B * R * H * triton.cdiv(I, tile.BLOCK_I),)](
            out_ptr=out, row_sum_ptr=row_sum, dq_ptr=dq, EVEN_J=J % tile.BLOCK_J == 0, **shared, **vars(tile)
        )
        tile = tiling.dkdv_tile(q.dtype, D, I, J, shared["PRECISION"], *launch_key)
        _triangle_attention_bwd_dkdv[(B * R * H * triton.cdiv(J, tile.BLOCK_J),)](
            dk_ptr=dk, dv_ptr=dv, **shared, **vars(tile)
        )
        if dbias.numel():
            tile = tiling.dbias_tile(q.dtype, D, I, J, shared["PRECISION"], *launch_key)
            tiles = triton.cdiv(I, tile.BLOCK_I) * triton.cdiv(J, tile.BLOCK_J)
            _triangle_attention_bwd_dbias[(B * H * tiles,)](dbias_ptr=dbias, **shared, **vars(tile))
    return dq, dk, dv, dbias
