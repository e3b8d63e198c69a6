"""Backward in plain Triton: three passes that recompute the probabilities, deterministic and without atomics.

    p = exp(x - row_max) / row_sum     dp = ⟨grad_out, v⟩     δ = Σ_d out·grad_out     ds = p·(dp - δ)
    dq = scale·Σ_j ds·k     dk = scale·Σ_i ds·q     dv = Σ_i p·grad_out     dbias = Σ_r ds

dq walks the keys and leaves δ for the others; dk and dv walk the queries; dbias owns a tile of `[i, j]` and
walks the rows. Nothing is added up across programs, but for dbias where its tiles are too few to fill a GPU: groups
of rows are then summed apart and added in order. The price: nine products where five would do.

A key term that selects cuts ds off from q and k; from the bias as well, unless the bias came after it.

The portable path. On Hopper `launch` hands long sequences of 16 bits to the kernels of `lean/`; `lean/launch.py` says
which.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, sums, tiling
from trifast_inductor.kernels.triangle_attention.arguments import float32_precision
from trifast_inductor.kernels.triangle_attention.bias import AlignedRows
from trifast_inductor.kernels.triangle_attention.launching import Launch, Plans, on_device_of, signature
from trifast_inductor.kernels.triangle_attention.lean import launch as lean
from trifast_inductor.kernels.triangle_attention.logits import (
    dot,
    dot_of_tile,
    load_key_term,
    load_rows,
    logits_tile,
    offset,
    probabilities,
    store_rows,
    within,
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
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    terms_ptr,  # [B, R, H, 2, I] contiguous: log2 of the sum and δ are left here for the other kernels
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
    EVEN_I: tl.constexpr,
    EVEN_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    b, r, h, block = program_place(tl.cdiv(I, BLOCK_I), R, H)
    first = block * BLOCK_I
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    i_in_range = within(i, I - first, EVEN_I)

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
    head = (b * R + r) * H + h
    statistics = head * I + first + i
    terms_ptr += head * 2 * I + first

    q = load_rows(q_ptr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
    do = load_rows(do_ptr, i, i_in_range, stride_doi, stride_dod, D, BLOCK_D, ALIGNED)
    out = load_rows(out_ptr + out_offset, i, i_in_range, H * D, 1, D, BLOCK_D, ALIGNED=False)
    row_max = tl.load(row_max_ptr + statistics, mask=i_in_range, other=0.0)
    log2_sum = tl.log2(tl.load(row_sum_ptr + statistics, mask=i_in_range, other=1.0))
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
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

    store_rows(dq_ptr + out_offset, dq * scale, i, i_in_range, H * D, D, BLOCK_D)


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
):
    b, r, h, block = program_place(tl.cdiv(J, BLOCK_J), R, H)
    first = block * BLOCK_J
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    j_in_range = within(j, J - first, EVEN_J)

    q_ptr += b * stride_qb + r * stride_qr + h * stride_qh
    k_ptr += b * stride_kb + r * stride_kr + h * stride_kh + first * stride_kj
    v_ptr += b * stride_vb + r * stride_vr + h * stride_vh + first * stride_vj
    do_ptr += b * stride_dob + r * stride_dor + h * stride_doh
    if HAS_BIAS:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + first * tl.cast(stride_bias_j, tl.int64)
        bias_offsets = offset(j, stride_bias_j)[:, None] + offset(i, stride_bias_i)[None, :]
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r + first * tl.cast(stride_key_j, tl.int64)
    head = (b * R + r) * H + h
    row_max_ptr += head * I
    terms_ptr += head * 2 * I

    k = load_rows(k_ptr, j, j_in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
    v = load_rows(v_ptr, j, j_in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
    key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
    dk = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_J, BLOCK_D], tl.float32)

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
        # An infinite maximum makes p = 0 for a query past the end, whatever the key term.
        row_max = tl.load(row_max_ptr + start + i, mask=in_range, other=float("inf"))
        log2_sum = tl.load(terms_ptr + start + i, mask=in_range, other=0.0)
        delta = tl.load(terms_ptr + I + start + i, mask=in_range, other=0.0)
        p = probabilities(x, row_max[None, :], log2_sum[None, :])
        do = load_rows(do_ptr, i, in_range, stride_doi, stride_dod, D, BLOCK_D, ALIGNED)
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
):
    # Keys innermost: neighbours share the queries of a row.
    pid = tl.program_id(0)
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

    q_ptr += b * stride_qb + first_row * stride_qr + h * stride_qh + first_i * stride_qi
    k_ptr += b * stride_kb + first_row * stride_kr + h * stride_kh + first_j * stride_kj
    v_ptr += b * stride_vb + first_row * stride_vr + h * stride_vh + first_j * stride_vj
    do_ptr += b * stride_dob + first_row * stride_dor + h * stride_doh + first_i * stride_doi
    bias_ptr += b * stride_bias_b + h * stride_bias_h + first_i * stride_bias_i + first_j * stride_bias_j
    bias_offsets = offset(i, stride_bias_i)[:, None] + offset(j, stride_bias_j)[None, :]
    bias_in_range = i_in_range[:, None] & within(j, J_bias - first_j, EVEN_J)[None, :]
    bias = tl.load(bias_ptr + bias_offsets, mask=bias_in_range, other=0.0)
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + first_row * stride_key_r + first_j * stride_key_j
    row = (b * R + first_row) * H + h
    row_max_ptr += row * I + first_i
    terms_ptr += row * 2 * I + first_i

    dbias = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for _ in range(rows):
        q = load_rows(q_ptr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
        k = load_rows(k_ptr, j, j_in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
        qk = dot(q, tl.trans(k), None, PRECISION)
        key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
        # Keys past the end are not stored: no need to make them -inf.
        x = logits_tile(qk, bias, key[None, :], None, scale, fill, HAS_BIAS, KEY_TERM, KEY_TERM_FIRST, EVEN_J=True)
        row_max = tl.load(row_max_ptr + i, mask=i_in_range, other=0.0)
        log2_sum = tl.load(terms_ptr + i, mask=i_in_range, other=0.0)
        delta = tl.load(terms_ptr + I + i, mask=i_in_range, other=0.0)
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
        row_max_ptr += H * I
        terms_ptr += 2 * H * I
        if KEY_TERM != "none":
            key_ptr += stride_key_r

    tl.store(
        dbias_ptr + (head * I + first_i) * J + first_j + (i * J)[:, None] + j[None, :],
        dbias.to(dbias_ptr.dtype.element_ty),
        mask=in_range,
    )


class _Plan:
    """What `launch` decides from shapes, strides and dtypes alone."""

    def __init__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        needs_dbias: bool,
    ) -> None:
        self.dbias_shape = tuple(bias.shape) if bias is not None and needs_dbias else (0,)
        self.dbias_dtype = q.dtype if bias is None else bias.dtype
        self.is_empty = 0 in (*q.shape[:4], k.shape[2])
        self.lean: lean.Plan | None = None
        self.portable: _Portable | None = None  # once it is asked for
        if not self.is_empty and lean.refusal(grad_out, q, k, v, bias, key_bias, key_mask, fill) is None:
            given = (grad_out, q, k, v, bias, key_bias, key_mask)
            self.lean = lean.Plan(*given, scale, fill, key_term_first, needs_dbias)


class _Portable:
    """The kernels of this file for such shapes, with a bias that they can read."""

    def __init__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        needs_dbias: bool,
    ) -> None:
        B, R, I, H, _ = q.shape
        J = k.shape[2]
        self.terms_shape = (B, R, H, 2, I)
        self.aligned = AlignedRows(bias)
        shared = arguments.shared(q, k, v, self.aligned(bias), key_bias, key_mask, scale, fill, key_term_first)
        shared |= {
            **arguments.strides("do", grad_out, "brihd"),
            "B": B,
            "ALIGNED": arguments.rows_are_aligned(q, k, v, grad_out),
        }
        kind = arguments.kind(shared, q.dtype, q.get_device())
        tile = tiling.choose("dq", **kind)
        programs = B * R * H * triton.cdiv(I, tile.BLOCK_I)
        self.dq = Launch(_triangle_attention_bwd_dq, programs, shared | arguments.evenness(I, J, tile), tile)
        tile = tiling.choose("dkdv", **kind)
        programs = B * R * H * triton.cdiv(J, tile.BLOCK_J)
        self.dkdv = Launch(_triangle_attention_bwd_dkdv, programs, shared | arguments.evenness(I, J, tile), tile)

        self.dbias: Launch | None = None
        self.sum: Launch | None = None
        if bias is None or not needs_dbias:
            return
        tile = tiling.choose("dbias", **kind)
        programs = B * H * triton.cdiv(I, tile.BLOCK_I) * triton.cdiv(J, tile.BLOCK_J)
        grouped = triton.cdiv(R, tiling.dbias_groups(R, programs))
        groups = triton.cdiv(R, grouped)
        rest = {"rows": grouped, **arguments.evenness(I, J, tile)}
        self.dbias = Launch(_triangle_attention_bwd_dbias, groups * programs, shared | rest, tile)
        if groups > 1:
            self.parts_shape = (groups, B, H, I, J)
            self.sum = sums.sum_of(B * H * I * J, groups)


_plans: Plans[_Plan] = Plans()


def _planned(*given: Any) -> _Plan:
    *tensors, scale, fill, key_term_first, needs_dbias = given
    key = (signature(*tensors), scale, fill, key_term_first, needs_dbias, float32_precision(tensors[1].dtype))
    return _plans.of(key, tensors[1], _Plan, given)


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
    given = (grad_out, q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first, needs_dbias)
    plan = _planned(*given)
    if plan.lean is None:
        return _run(plan, *given, out=out, row_max=row_max, row_sum=row_sum)
    with on_device_of(q):
        key_term = key_bias if key_mask is None else key_mask
        saved = map(arguments.dense, (out, row_max, row_sum))
        return plan.lean(grad_out, q, k, v, bias, key_term, *saved)


def portable(
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
    """As `launch`, by the kernels of this file whatever the device."""
    given = (grad_out, q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first, needs_dbias)
    return _run(_planned(*given), *given, out=out, row_max=row_max, row_sum=row_sum)


def _run(
    plan: _Plan, *given: Any, out: Tensor, row_max: Tensor, row_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_out, q, k, v, bias, key_bias, key_mask, *_ = given
    # Allocated dense: `empty_like` would keep the strides of an input.
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=q.dtype, device=q.device)
    dv = torch.empty_like(dk)
    dbias = torch.empty(plan.dbias_shape, dtype=plan.dbias_dtype, device=q.device)
    if plan.is_empty:
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias.zero_()

    out, row_max, row_sum = map(arguments.dense, (out, row_max, row_sum))
    with on_device_of(q):
        if plan.portable is None:
            plan.portable = _Portable(*given)
        run = plan.portable
        terms = torch.empty(run.terms_shape, dtype=torch.float32, device=q.device)
        read = (q, k, v, run.aligned(bias), key_bias if key_mask is None else key_mask, grad_out)
        run.dq(*read, out, row_max, row_sum, terms, dq)
        run.dkdv(*read, row_max, terms, dk, dv)
        if run.sum is not None and run.dbias is not None:
            parts = torch.empty(run.parts_shape, dtype=torch.float32, device=q.device)
            run.dbias(*read, row_max, terms, parts)
            run.sum(parts, dbias)
        elif run.dbias is not None:
            run.dbias(*read, row_max, terms, dbias)
    return dq, dk, dv, dbias
