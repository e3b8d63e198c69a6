"""The blocks for which a fixed shift was no good, computed once more with a running maximum.

`forward.py` leaves a row sum of NaN in such a row: its later logits lie too far above those of its first tile, all
its keys are masked, or there is a NaN or an infinity among its inputs. Everything is read as the caller gave it, so
what comes out is what the portable kernel would give.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments
from trifast_inductor.kernels.triangle_attention.launching import Repeated, on_device_of
from trifast_inductor.kernels.triangle_attention.logits import (
    LOG2E,
    dot,
    load_key_term,
    load_rows,
    logits_tile,
    offset,
    store_rows,
)


@triton.jit
def _triangle_attention_fwd_again(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
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
    stride_bias_j: tl.int64,
    stride_key_b: tl.int64,
    stride_key_r: tl.int64,
    stride_key_j,
    R,
    H,
    I,
    J,
    scale,
    fill,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    SEEN: tl.constexpr,  # row sums looked at together
):
    program = tl.program_id(0)
    h = program % H
    r = (program // H % R).to(tl.int64)
    b = (program // (H * R)).to(tl.int64)
    statistics = ((b * R + r) * H + h) * I
    row_sum_ptr += statistics
    unsound = 0
    for start in range(0, I, SEEN):
        seen = start + tl.arange(0, SEEN)
        sums = tl.load(row_sum_ptr + seen, mask=seen < I, other=0.0)
        unsound += tl.sum((sums != sums).to(tl.int32), 0)
    if unsound == 0:
        return

    q_ptr += b * stride_qb + r * stride_qr + h * stride_qh
    k_ptr += b * stride_kb + r * stride_kr + h * stride_kh
    v_ptr += b * stride_vb + r * stride_vr + h * stride_vh
    bias_ptr += b * stride_bias_b + h * stride_bias_h
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r
    out_ptr += ((b * R + r) * I * H + h) * D
    row_max_ptr += statistics
    for first in range(0, I, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        i_in_range = i < I
        sums = tl.load(row_sum_ptr + i, mask=i_in_range, other=0.0)
        if tl.sum((sums != sums).to(tl.int32), 0) > 0:
            q = load_rows(q_ptr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
            row_max = tl.full([BLOCK_I], float("-inf"), tl.float32)
            row_sum = tl.zeros([BLOCK_I], tl.float32)
            acc = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)
            for start in range(0, J, BLOCK_J):
                j = start + tl.arange(0, BLOCK_J)
                in_range = j < J
                k = load_rows(k_ptr, j, in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
                qk = dot(q, tl.trans(k), None, PRECISION)
                key = load_key_term(key_ptr, j, in_range, stride_key_j, KEY_TERM)
                bias_ptrs = bias_ptr + offset(i, stride_bias_i)[:, None] + offset(j, stride_bias_j)[None, :]
                bias = tl.load(bias_ptrs, mask=i_in_range[:, None] & in_range[None, :], other=0.0)
                x = logits_tile(
                    qk, bias, key[None, :], in_range[None, :], scale, fill, True, KEY_TERM, KEY_TERM_FIRST, False
                )  # fmt: skip
                new_max = tl.maximum(row_max, tl.max(x, 1))
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
                p = tl.exp2((x - shift[:, None]) * LOG2E)
                rescale = tl.exp2((row_max - shift) * LOG2E)
                row_sum = row_sum * rescale + tl.sum(p, 1)
                v = load_rows(v_ptr, j, in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
                acc = dot(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)
                row_max = new_max
            store_rows(out_ptr, acc / row_sum[:, None], i, i_in_range, H * D, D, BLOCK_D)
            tl.store(row_max_ptr + i, row_max, mask=i_in_range)
            tl.store(row_sum_ptr + i, row_sum, mask=i_in_range)


_launch = Repeated(_triangle_attention_fwd_again)
_REST = [name for name in _triangle_attention_fwd_again.arg_names if not name.endswith("_ptr")]


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    scale: float,
    fill: float,
    key_term_first: bool,
) -> None:
    """Overwrites blocks of 64 queries of `out`, `row_max` and `row_sum` where one of the row sums is NaN."""
    B, R, I, H, _ = q.shape
    given = arguments.shared(q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first)
    values = {
        **given,
        "ALIGNED": arguments.rows_are_aligned(q, k, v),
        "BLOCK_I": 64,
        "BLOCK_J": 64,
        "SEEN": min(1024, triton.next_power_of_2(I)),
    }
    key = key_bias if key_mask is None else key_mask.view(torch.uint8)
    rest = [values[name] for name in _REST]
    with on_device_of(q):
        _launch(B * R * H, q, k, v, bias, key, out, row_max, row_sum, *rest, num_warps=4)
