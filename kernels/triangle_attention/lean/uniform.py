"""Gradients of a head whose queries all weigh all keys alike, as those of a row of padding do: no logits are needed.

    p = 1/J     ds = (⟨grad_out, v⟩ - δ) / J
    dq = scale/J·(grad_out·(Σ_j v kᵀ) - δ·Σ_j k)
    dk = scale/J·(v·(Σ_i grad_out qᵀ) - Σ_i δ·q)     dv = Σ_i grad_out/J

with keys that are selected left out of dq and dk. Products of D x D instead of I x J.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from trifast_inductor.kernels.triangle_attention.lean.operands import head_of, load, load_pairs, store
from trifast_inductor.kernels.triangle_attention.logits import dot, load_key_term


@triton.jit
def dq_of_uniform_head(
    b,
    r,
    h,
    operands,
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ
    dq_ptr,  # [B, R, I, H, D] contiguous
    sizes,
    scale,
    D: tl.constexpr,
    KEY_TERM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _of_q, of_k, of_v, of_key, of_do = operands
    R, H, I, J = sizes
    FLOAT32: tl.constexpr = "upcast" if PRECISION == "upcast" else "3xtf32"
    k_ptr, stride_kj = head_of(of_k, b, r, h)
    v_ptr, stride_vj = head_of(of_v, b, r, h)
    do_ptr, stride_doi = head_of(of_do, b, r, h)
    key_ptr, stride_key_b, stride_key_r, stride_key_j = of_key
    if KEY_TERM == "select":
        key_ptr += b * stride_key_b + r * stride_key_r
    n = tl.arange(0, BLOCK)
    vk = tl.zeros([D, D], tl.float32)
    sums_k = tl.zeros([BLOCK, D], tl.float32)  # added up after the loop, since that takes barriers
    for start in range(0, J, BLOCK):
        in_range = n < J - start
        k = load(k_ptr, n, stride_kj, in_range, D, False)
        v = load(v_ptr, n, stride_vj, in_range, D, False)
        if KEY_TERM == "select":
            selected = load_key_term(key_ptr, start + n, in_range, stride_key_j, KEY_TERM)
            k = tl.where(selected[:, None], 0.0, k)
        vk = dot(tl.trans(v), k, vk, PRECISION)
        sums_k += k.to(tl.float32)
        k_ptr += BLOCK * tl.cast(stride_kj, tl.int64)
        v_ptr += BLOCK * tl.cast(stride_vj, tl.int64)
    sum_k = tl.sum(sums_k, 0)
    factor = tl.cast(scale, tl.float32) / J
    terms_ptr += ((b * R + r) * H + h) * I * 2
    dq_ptr += ((b * R + r) * I * H + h) * D
    for start in range(0, I, BLOCK):
        in_range = n < I - start
        do = load(do_ptr, n, stride_doi, in_range, D, False)
        _logsum, delta = load_pairs(terms_ptr, I - start, BLOCK, False)
        dq = dot(do.to(tl.float32), vk, None, FLOAT32) - delta[:, None] * sum_k[None, :]
        store(dq_ptr, dq * factor, n, H * D, in_range, D)
        do_ptr += BLOCK * tl.cast(stride_doi, tl.int64)
        terms_ptr += 2 * BLOCK
        dq_ptr += BLOCK * H * D


@triton.jit
def dkdv_of_uniform_head(
    b,
    r,
    h,
    operands,
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ
    dk_ptr,  # [B, R, J, H, D] contiguous
    dv_ptr,  # [B, R, J, H, D] contiguous
    sizes,
    scale,
    D: tl.constexpr,
    KEY_TERM: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    of_q, _of_k, of_v, of_key, of_do = operands
    R, H, I, J = sizes
    FLOAT32: tl.constexpr = "upcast" if PRECISION == "upcast" else "3xtf32"
    q_ptr, stride_qi = head_of(of_q, b, r, h)
    v_ptr, stride_vj = head_of(of_v, b, r, h)
    do_ptr, stride_doi = head_of(of_do, b, r, h)
    key_ptr, stride_key_b, stride_key_r, stride_key_j = of_key
    if KEY_TERM == "select":
        key_ptr += b * stride_key_b + r * stride_key_r
    n = tl.arange(0, BLOCK)
    terms_ptr += ((b * R + r) * H + h) * I * 2
    doq = tl.zeros([D, D], tl.float32)
    sums_do = tl.zeros([BLOCK, D], tl.float32)
    sums_q = tl.zeros([BLOCK, D], tl.float32)  # times δ
    for start in range(0, I, BLOCK):
        in_range = n < I - start
        q = load(q_ptr, n, stride_qi, in_range, D, False)
        do = load(do_ptr, n, stride_doi, in_range, D, False)
        _logsum, delta = load_pairs(terms_ptr, I - start, BLOCK, False)
        doq = dot(tl.trans(do), q, doq, PRECISION)
        sums_do += do.to(tl.float32)
        sums_q += q.to(tl.float32) * delta[:, None]
        q_ptr += BLOCK * tl.cast(stride_qi, tl.int64)
        do_ptr += BLOCK * tl.cast(stride_doi, tl.int64)
        terms_ptr += 2 * BLOCK
    sum_do = tl.sum(sums_do, 0)
    sum_q = tl.sum(sums_q, 0)
    factor = tl.cast(scale, tl.float32) / J
    first = ((b * R + r) * J * H + h) * D
    dk_ptr += first
    dv_ptr += first
    for start in range(0, J, BLOCK):
        in_range = n < J - start
        v = load(v_ptr, n, stride_vj, in_range, D, False)
        dk = (dot(v.to(tl.float32), doq, None, FLOAT32) - sum_q[None, :]) * factor
        if KEY_TERM == "select":
            selected = load_key_term(key_ptr, start + n, in_range, stride_key_j, KEY_TERM)
            dk = tl.where(selected[:, None], 0.0, dk)
        store(dk_ptr, dk, n, H * D, in_range, D)
        store(dv_ptr, tl.broadcast_to((sum_do / J)[None, :], [BLOCK, D]), n, H * D, in_range, D)
        v_ptr += BLOCK * tl.cast(stride_vj, tl.int64)
        dk_ptr += BLOCK * H * D
        dv_ptr += BLOCK * H * D
