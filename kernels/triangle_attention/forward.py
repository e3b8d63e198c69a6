"""Forward in plain Triton: one program owns a block of queries of one row and head and walks the keys.

    x = scale·⟨q, k⟩ + bias (⊕ key term), out = Σ_j softmax_j(x) · v

Source: Jumper et al. 2021, Supplementary Algorithms 13 and 14; the softmax is summed as in Dao et al. 2022,
Algorithm 1. The portable path: no layout, size or architecture is assumed beyond what `op.py` states. On Hopper
`launch` hands long sequences of 16 bits to `hopper/forward.py` and shorter ones to `hopper/whole_forward.py`;
`hopper/choice.py` and `hopper/whole_forward_choice.py` say which.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory, tiling, validation
from trifast_inductor.kernels.triangle_attention.arguments import float32_precision
from trifast_inductor.kernels.triangle_attention.bias import AlignedRows
from trifast_inductor.kernels.triangle_attention.hopper import choice as hopper
from trifast_inductor.kernels.triangle_attention.hopper import whole_forward_choice
from trifast_inductor.kernels.triangle_attention.launching import Launch, cuda_arch, on_device_of
from trifast_inductor.kernels.triangle_attention.logits import (
    dot,
    load_key_term,
    load_rows,
    logits_tile,
    offset,
    running_probabilities,
    store_rows,
    within,
)
from trifast_inductor.kernels.triangle_attention.order import after_the_kernel_before, program_place
from trifast_inductor.kernels.triangle_attention.plans import Plans, signature
from trifast_inductor.kernels.triangle_attention.replay import Recorder


@triton.jit
def _triangle_attention_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    key_ptr,
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    # int64 makes every offset so; strides that are often 1 stay free to be specialised.
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
    b, r, h, block = program_place(tl.program_id(0), tl.cdiv(I, BLOCK_I), R, H)
    first = block * BLOCK_I
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    i_in_range = within(i, I - first, EVEN_I)

    q_ptr += b * stride_qb + r * stride_qr + h * stride_qh + first * stride_qi
    k_ptr += b * stride_kb + r * stride_kr + h * stride_kh
    v_ptr += b * stride_vb + r * stride_vr + h * stride_vh
    if HAS_BIAS:
        bias_ptr += b * stride_bias_b + h * stride_bias_h + first * stride_bias_i
        bias_offsets = offset(i, stride_bias_i)[:, None] + offset(j, stride_bias_j)[None, :]
    if KEY_TERM != "none":
        key_ptr += b * stride_key_b + r * stride_key_r

    q = load_rows(q_ptr, i, i_in_range, stride_qi, stride_qd, D, BLOCK_D, ALIGNED)
    row_max = tl.full([BLOCK_I], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_I], tl.float32)
    acc = tl.zeros([BLOCK_I, BLOCK_D], tl.float32)

    if KEY_TERM == "select":
        key = load_key_term(key_ptr, j, within(j, J, EVEN_J), stride_key_j, KEY_TERM)
    for start in range(0, J, BLOCK_J):
        in_range = within(j, J - start, EVEN_J)
        if KEY_TERM != "select":
            key = load_key_term(key_ptr, j, in_range, stride_key_j, KEY_TERM)
        if KEY_TERM != "none":
            key_ptr += BLOCK_J * tl.cast(stride_key_j, tl.int64)
        if KEY_TERM == "select":
            # A turn ahead: Triton makes no copies ahead of less than four bytes.
            next_key = load_key_term(key_ptr, j, j < J - start - BLOCK_J, stride_key_j, KEY_TERM)
        k = load_rows(k_ptr, j, in_range, stride_kj, stride_kd, D, BLOCK_D, ALIGNED)
        qk = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_I, BLOCK_J]
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

        p, rescale, row_max = running_probabilities(x, row_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        v = load_rows(v_ptr, j, in_range, stride_vj, stride_vd, D, BLOCK_D, ALIGNED)
        acc = dot(p.to(v.dtype), v, acc * rescale[:, None], PRECISION)

        k_ptr += BLOCK_J * stride_kj
        v_ptr += BLOCK_J * stride_vj
        if HAS_BIAS:
            bias_ptr += BLOCK_J * tl.cast(stride_bias_j, tl.int64)
        if KEY_TERM == "select":
            key = next_key

    out_ptr += (((b * R + r) * I + first) * H + h) * D
    store_rows(out_ptr, acc / row_sum[:, None], i, i_in_range, H * D, D, BLOCK_D)
    statistics = ((b * R + r) * H + h) * I + first + i
    tl.store(row_max_ptr + statistics, row_max, mask=i_in_range)
    tl.store(row_sum_ptr + statistics, row_sum, mask=i_in_range)


class _Plan:
    """What `launch` decides from shapes, strides and dtypes alone."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
    ) -> None:
        validation.check_op(q, k, v, bias, key_bias, key_mask)
        B, R, I, H, D = q.shape
        self.out_shape = (B, R, I, H, D)
        self.statistics_shape = (B, R, H, I)
        self.has_no_keys = k.shape[2] == 0
        self.is_empty = self.has_no_keys or 0 in self.out_shape
        self.on_hopper: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None
        numbers = (scale, fill, key_term_first)
        if not self.is_empty and (planned := plan_on_hopper(q, k, v, bias, key_mask, *numbers)) is not None:
            self.on_hopper = hopper.attempt(planned, q, k, v, bias, key_bias, key_mask, *numbers)
        self.portable: _Portable | None = None  # once it is asked for
        self.recorder = Recorder()


class _Portable:
    """The portable kernel for such shapes, with a bias that it can read."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
    ) -> None:
        B, R, I, H, _ = q.shape
        J = k.shape[2]
        self.aligned = AlignedRows(bias)
        shared = arguments.shared(q, k, v, self.aligned(bias), key_bias, key_mask, scale, fill, key_term_first)
        tile = tiling.choose("forward", **arguments.kind(shared, q.dtype, q.get_device()))
        tile = tiling.capped(tile, q.dtype, q.shape[-1], cuda_arch())
        programs = B * R * H * triton.cdiv(I, tile.BLOCK_I)
        shared |= {"ALIGNED": arguments.rows_are_aligned(q, k, v), **arguments.evenness(I, J, tile)}
        self.run = Launch(_triangle_attention_fwd, programs, shared, tile)


_plans: Plans[_Plan] = Plans()


def _planned(*given: Any) -> _Plan:
    q, k, v, bias, key_bias, key_mask, *numbers = given
    key = (signature(q, k, v, bias, key_bias, key_mask), *numbers, float32_precision(q.dtype))
    return _plans.of(key, q, _Plan, given)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out `[B, R, I, H, D]`, and row maximum and row sum `[B, R, H, I]` in float32, all contiguous.

    The row maximum may be another value of the size of a row's logits, with a row sum to match: the backward asks no
    more of it. It is -inf where, and only where, all logits of a row are.

    Checks what it takes, which may have any strides, the first time that it meets such shapes. No keys at all: out
    and row sum are 0, row maximum -inf.
    """
    given = (q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first)
    tensors, numbers = given[:6], (*given[6:], float32_precision(q.dtype))
    known = _plans.programs.run(tensors, numbers)
    if known is None:
        plan = _planned(*given)
        known = _plans.programs.record(plan.recorder, lambda: _launch(plan, *given), tensors, numbers)
    out, row_max, row_sum = known
    return out, row_max, row_sum


def _launch(plan: _Plan, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    if plan.on_hopper is not None:
        q, *_ = tensors = given[:6]
        with on_device_of(q):
            results = hopper.attempt(plan.on_hopper, *tensors)
        if results is not None:
            return results
    return _run(plan, *given)


def plan_on_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
) -> Callable[..., Callable[..., tuple[Tensor, Tensor, Tensor]]] | None:
    """What plans such a call, which is not empty, for a kernel in Gluon; None where the portable one takes it."""
    if whole_forward_choice.refusal(q, k, v, bias) is None:
        return _planned_whole
    if hopper.refusal(q, k, v, bias, key_mask, scale, fill, key_term_first) is None:
        return _planned_long
    return None


def _planned_whole(*given: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from trifast_inductor.kernels.triangle_attention.hopper import whole_forward

    return whole_forward.Plan(*given)


def _planned_long(*given: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from trifast_inductor.kernels.triangle_attention.hopper import forward as on_hopper

    return on_hopper.Plan(*given)


def portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `launch`, by the kernel of this file whatever the device; the row maximum is the maximum."""
    given = (q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first)
    return _run(_planned(*given), *given)


def _run(plan: _Plan, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, bias, key_bias, key_mask, *_ = given
    with on_device_of(q):
        out = memory.empty(plan.out_shape, q.dtype, q)
        row_max = memory.empty(plan.statistics_shape, torch.float32, q)
        row_sum = memory.empty(plan.statistics_shape, torch.float32, q)
        if plan.is_empty:
            if plan.has_no_keys:
                return out.zero_(), row_max.fill_(float("-inf")), row_sum.zero_()
            return out, row_max, row_sum
        if plan.portable is None:
            plan.portable = _Portable(*given)
        key_term = key_bias if key_mask is None else key_mask
        plan.portable.run(q, k, v, plan.portable.aligned(bias), key_term, out, row_max, row_sum)
    return out, row_max, row_sum
