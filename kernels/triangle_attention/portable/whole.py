"""All gradients of short sequences in one pass: five products and one exponential a logit.

    p = exp(x - row_max) / row_sum     ds = p·(⟨grad_out, v⟩ - δ)     x as in `logits.py`
    dv = pᵀ·grad_out     dk = scale·dsᵀ·q     dq = scale·ds·k     dbias = Σ_r ds

A program owns some rows r of one head. All queries by all keys of a row are one tile `[i, j]`, so nothing is computed
twice: p and ds go through shared memory for dv and dk, ds is dq's left operand as it comes, and dbias stays in
registers over the rows. It is summed over the programs of a head afterwards (`sums.py`). Taken on Hopper, where it was
measured; longer sequences are for `hopper/whole.py`.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory, sums, tiling
from trifast_inductor.kernels.triangle_attention.bias import AlignedRows
from trifast_inductor.kernels.triangle_attention.hopper.choice import multiprocessors
from trifast_inductor.kernels.triangle_attention.launching import Launch, is_for_hopper
from trifast_inductor.kernels.triangle_attention.logits import (
    dot,
    load_key_term,
    load_rows,
    logits_tile,
    offset,
    probabilities,
    store_rows,
    within,
)
from trifast_inductor.kernels.triangle_attention.order import after_the_kernel_before
from trifast_inductor.kernels.triangle_attention.portable.operands import query_terms
from trifast_inductor.kernels.triangle_attention.tiling import Tile

LONGEST = 64  # queries and keys: at 128, where dbias just fits, one in twenty instructions is for what is spilled


@triton.jit
def _triangle_attention_bwd_whole(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    do_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    dq_ptr,  # [B, R, I, H, D] contiguous
    dk_ptr,  # [B, R, J, H, D] contiguous
    dv_ptr,  # [B, R, J, H, D] contiguous
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
    NEEDS_DBIAS: tl.constexpr,
    EVEN_I: tl.constexpr,
    EVEN_J: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PDL: tl.constexpr,
):
    after_the_kernel_before(PDL)
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)
    b = (pid // H % B).to(tl.int64)
    group = pid // (B * H)
    first_row = (group * rows).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    i_in_range = within(i, I, EVEN_I)
    j_in_range = within(j, J, EVEN_J)

    q_ptr += b * stride_qb + first_row * stride_qr + h * stride_qh
    k_ptr += b * stride_kb + first_row * stride_kr + h * stride_kh
    v_ptr += b * stride_vb + first_row * stride_vr + h * stride_vh
    do_ptr += b * stride_dob + first_row * stride_dor + h * stride_doh
    if HAS_BIAS:
        bias_ptr += b * stride_bias_b + h * stride_bias_h
        # Past the end the last query's once more, which spares a mask for each element.
        bias_i, bias_j = offset(tl.minimum(i, I - 1), stride_bias_i, WIDE=False), offset(j, stride_bias_j, WIDE=False)
        bias_offsets = bias_i[:, None] + bias_j[None, :]
        bias_in_range = within(j, J_bias, EVEN_J)[None, :]
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + first_row * stride_key_r
    row = b * R + first_row
    statistics = (row * H + h) * I
    row_max_ptr += statistics
    row_sum_ptr += statistics
    of_queries = row * I * H * D + h * D
    of_keys = row * J * H * D + h * D

    dbias = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for _ in range(tl.minimum(rows, R - group * rows)):
        q = load_rows(q_ptr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED, WIDE=False)
        k = load_rows(k_ptr, j, j_in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED, WIDE=False)
        qk = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_I, BLOCK_J]
        key = load_key_term(key_ptr, j, j_in_range, stride_key_j, KEY_TERM)
        bias = 0.0
        if HAS_BIAS:
            # Again for each row: a copy ahead takes no registers meanwhile.
            bias = tl.load(bias_ptr + bias_offsets, mask=bias_in_range, other=0.0)
        x = logits_tile(qk, bias, key[None, :], None, scale, fill, HAS_BIAS, KEY_TERM, KEY_TERM_FIRST, EVEN_J=True)
        do = load_rows(do_ptr, i, i_in_range, stride_doi, stride_dod, D, BLOCK_D, ALIGNED, WIDE=False)
        row_max, log2_sum, delta = query_terms(
            out_ptr + of_queries,
            row_max_ptr,
            row_sum_ptr,
            row_max_ptr,
            do,
            i,
            i_in_range,
            I,
            H,
            D,
            BLOCK_D,
            TERMS_ARE_LEFT=False,
        )
        p = probabilities(x, row_max[:, None], log2_sum[:, None])
        dv = dot(tl.trans(p.to(do.dtype)), do, None, PRECISION)
        v = load_rows(v_ptr, j, j_in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED, WIDE=False)
        dp = dot(do, tl.trans(v), None, PRECISION)
        ds = p * (dp - delta[:, None])
        if not EVEN_J:
            # Past the end a key has whatever the row maximum leaves of it.
            ds = tl.where(j_in_range[None, :], ds, 0.0)
        if NEEDS_DBIAS and KEY_TERM_FIRST:
            dbias += ds
        if KEY_TERM == "select":
            ds = tl.where(key[None, :], 0.0, ds)
        if NEEDS_DBIAS and not KEY_TERM_FIRST:
            dbias += ds
        ds = ds.to(q.dtype)
        dk = dot(tl.trans(ds), q, None, PRECISION)
        dq = dot(ds, k, None, PRECISION)
        store_rows(dv_ptr + of_keys, dv, j, j_in_range, H * D, D, BLOCK_D)
        store_rows(dk_ptr + of_keys, dk * scale, j, j_in_range, H * D, D, BLOCK_D)
        store_rows(dq_ptr + of_queries, dq * scale, i, i_in_range, H * D, D, BLOCK_D)

        q_ptr += stride_qr
        k_ptr += stride_kr
        v_ptr += stride_vr
        do_ptr += stride_dor
        if KEY_TERM != "none":
            key_ptr += stride_key_r
        row_max_ptr += H * I
        row_sum_ptr += H * I
        of_queries += I * H * D
        of_keys += J * H * D

    if NEEDS_DBIAS:
        place = (group.to(tl.int64) * B + b) * H + h
        offsets = (i * J)[:, None] + j[None, :]
        in_range = i_in_range[:, None] & j_in_range[None, :]
        tl.store(dbias_ptr + place * I * J + offsets, dbias.to(dbias_ptr.dtype.element_ty), mask=in_range)


def refusal(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    """Why other kernels serve a call, or None."""
    I, J = q.shape[2], k.shape[2]
    if max(I, J) > LONGEST:
        return f"{I} queries by {J} keys are longer than {LONGEST}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"{q.dtype} is not a 16-bit float"
    if grad_out.dtype != q.dtype or (bias is not None and bias.dtype != q.dtype):
        return "bias and gradient are not of one dtype with q"
    if q.shape[-1] > 32:
        return f"D={q.shape[-1]} is more than 32"
    steps = [t.stride(axis) for t in (grad_out, q, k, v) for axis in (2, 4)]
    if bias is not None:
        steps += [bias.stride(2), bias.stride(3)]
    if max(map(abs, steps)) >= 2**24:
        return "an offset within a tile would pass 32 bits"
    if not is_for_hopper():
        return "no Hopper GPU"
    return None


def tile_for(longest: int) -> Tile:
    """All queries by all keys. 64 takes 255 registers on sm_90 (triton 3.6)."""
    BLOCK = 32 if longest <= 32 else 64
    return Tile(BLOCK, BLOCK, num_warps=4, num_stages=3)


def programs_at_once(device: int) -> int:
    """Of one GPU, two to a multiprocessor; of an H200 where there is none to ask."""
    return 2 * (multiprocessors(device) if device >= 0 else 132)


def rows_of_a_program(R: int, heads: int, at_once: int) -> int:
    """Such that the programs end together.

    Counted in rows: a program takes about two more to begin and to leave its dbias, of which sixteen are added up in
    the time of one.
    """
    return tiling.rows_of_a_group(R, heads, at_once, extra=2, part=1 / 16, most=at_once)


class Plan:
    """What a call launches, decided from shapes, strides and dtypes alone; the arguments as in `backward.launch`."""

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
        needs_dbias = needs_dbias and bias is not None
        tile = tile_for(max(I, J))
        rows = rows_of_a_program(R, B * H, programs_at_once(q.get_device()))
        groups = triton.cdiv(R, rows)
        self._aligned = AlignedRows(bias)
        given = {
            **arguments.shared(q, k, v, self._aligned(bias), key_bias, key_mask, scale, fill, key_term_first),
            **arguments.strides("do", grad_out, "brihd"),
            **arguments.evenness(I, J, tile),
            "ALIGNED": arguments.rows_are_aligned(q, k, v, grad_out),
            "NEEDS_DBIAS": needs_dbias,
            "B": B,
            "rows": rows,
        }
        self._run = Launch(_triangle_attention_bwd_whole, B * H * groups, given, tile)
        self._dbias_shape = (B, H, I, J) if needs_dbias else (0,)
        self._parts_shape = (groups, B, H, I, J)
        self._sum = sums.sum_of(B * H * I * J, groups) if needs_dbias and groups > 1 else None

    def __call__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key: Tensor | None,
        out: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dq, dk, dv = (memory.empty(t.shape, q.dtype, q) for t in (q, k, v))
        dbias = memory.empty(self._dbias_shape, q.dtype, q)
        parts = dbias if self._sum is None else memory.empty(self._parts_shape, torch.float32, q)
        self._run(q, k, v, self._aligned(bias), key, grad_out, out, row_max, row_sum, dq, dk, dv, parts)
        if self._sum is not None:
            self._sum(parts, dbias)
        return dq, dk, dv, dbias
