"""`torch.ops.trifast_inductor.triangle_attention`: schema, fake, autograd and choice of implementation.

    x[b,r,h,i,j] = scale·⟨q[b,r,i,h], k[b,r,j,h]⟩ + bias[b,h,i,j]  (⊕ key term[b,r,j])
    out[b,r,i,h] = Σ_j softmax_j(x[b,r,h,i,j]) · v[b,r,j,h]

Source: Jumper et al. 2021, Supplementary Algorithms 13 and 14; r is the row that shares the bias.

| argument | shape | meaning |
|---|---|---|
| q | [B, R, I, H, D] | any strides; float32, bfloat16, float16, float64 |
| k, v | [B, R, J, H, D] | dtype of q |
| bias | [B, H, I, J] | optional; any float dtype; added in float32; differentiable |
| key_bias | [B, R, J] | optional; any float dtype; added in float32; no gradient |
| key_mask | [B, R, J] bool | optional, True where the logit is replaced by `fill`; excludes key_bias |
| key_term_first | bool | the key term meets the logits before the bias, not after it |
| masked_rows_are_zero | bool | nothing but -inf gives 0, forward and backward, as SDPA has it; else NaN, as softmax |

Returns out `[B, R, I, H, D]` contiguous in the dtype of q, and the row maximum and row sum `[B, R, H, I]` in
float32 (float64 for float64). They are saved apart: at a maximum of -1e9 their log-sum loses log J. A row whose keys
are all masked behaves as eager does: additive and finite fill give the softmax of what is there, -inf gives NaN. A
row maximum of +inf marks a row that was set to 0.

This file imports torch only; Triton is imported when a kernel is launched.
"""

import math
import os
from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from trifast_inductor.errors import DoubleBackwardError, DtypeError, ForwardModeError
from trifast_inductor.kernels.triangle_attention import batching, cpu, validation

_TERMS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, Tensor? key_mask, "
    "float scale, float fill, bool key_term_first"
)

_library = torch.library.Library("trifast_inductor", "DEF")
for _name in ("triangle_attention", "triangle_attention_forward"):
    _library.define(
        f"{_name}({_TERMS}, bool masked_rows_are_zero=False) -> (Tensor out, Tensor row_max, Tensor row_sum)",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
    )
for _name in ("triangle_attention_gradients", "triangle_attention_backward"):
    _library.define(
        f"{_name}(Tensor grad_out, {_TERMS}, Tensor out, Tensor row_max, Tensor row_sum, "
        "bool needs_dbias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
    )

# The first of each pair has autograd. The second is what is left of it once it has been differentiated, so that a
# compiled graph does not pass through Python twice for each call.
triangle_attention = torch.ops.trifast_inductor.triangle_attention.default
triangle_attention_forward = torch.ops.trifast_inductor.triangle_attention_forward.default
triangle_attention_gradients = torch.ops.trifast_inductor.triangle_attention_gradients.default
triangle_attention_backward = torch.ops.trifast_inductor.triangle_attention_backward.default


def implementation(device: torch.device, dtype: torch.dtype) -> str:
    """What runs: "torch" for CPU tensors and float64, else "triton"; TRITON_INTERPRET=1 runs that on the CPU too."""
    if dtype == torch.float64 or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"):
        return "torch"
    return "triton"


def _runs_in_torch(q: Tensor) -> bool:
    return implementation(q.device, q.dtype) == "torch"


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
    masked_rows_are_zero: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first)
    if _runs_in_torch(q):
        validation.check_op(q, k, v, bias, key_bias, key_mask)
        result = cpu.forward(*arguments)
    else:
        from trifast_inductor.kernels.triangle_attention import forward

        result = forward.launch(*arguments)
    if masked_rows_are_zero:
        _zero_masked_rows(*result)
    return result


def _zero_masked_rows(out: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
    """A maximum of +inf makes every probability that the backward recomputes 0."""
    masked = row_max == -math.inf
    out.masked_fill_(masked.transpose(2, 3)[..., None], 0.0)
    row_max.masked_fill_(masked, math.inf)
    row_sum.masked_fill_(masked, 1.0)


def _backward(
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
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saved = (q, k, v, bias, key_bias, key_mask, out, row_max, row_sum)
    if _runs_in_torch(q):
        return cpu.backward(grad_out, *saved, scale, fill, key_term_first, needs_dbias)
    from trifast_inductor.kernels.triangle_attention import backward

    return backward.launch(grad_out, *saved, scale, fill, key_term_first, needs_dbias)


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
    masked_rows_are_zero: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    validation.check_op(q, k, v, bias, key_bias, key_mask)
    b, r, i, h, d = q.shape
    statistics = cpu.sum_dtype(q.dtype)
    return (
        q.new_empty((b, r, i, h, d)),
        q.new_empty((b, r, h, i), dtype=statistics),
        q.new_empty((b, r, h, i), dtype=statistics),
    )


def _fake_backward(
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
    out: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = bias.new_empty(bias.shape) if bias is not None and needs_dbias else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


class _TriangleAttention(_SingleLevelFunction):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, row_max, row_sum = _at_next_level(triangle_attention, triangle_attention_forward, *inputs)
        return out, row_max, row_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first, *_ = inputs
        out, row_max, row_sum = output
        if key_bias is not None and ctx.needs_input_grad[4]:
            raise DtypeError(
                "key_bias must not require a gradient, got one that does: use key_bias.detach(), "
                "or pass a term that is learned as part of the pair bias"
            )
        ctx.save_for_backward(q, k, v, bias, key_bias, key_mask, out, row_max, row_sum)
        ctx.scale, ctx.fill, ctx.key_term_first, ctx.inputs = scale, fill, key_term_first, len(inputs)
        ctx.mark_non_differentiable(row_max, row_sum)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * ctx.inputs
        q, k, v, bias, key_bias, key_mask, out, row_max, row_sum = ctx.saved_tensors
        needs_dbias = bias is not None and ctx.needs_input_grad[3]
        op = triangle_attention_gradients if torch.is_grad_enabled() else triangle_attention_backward
        dq, dk, dv, dbias = op(
            grad_out,
            q,
            k,
            v,
            bias,
            key_bias,
            key_mask,
            ctx.scale,
            ctx.fill,
            ctx.key_term_first,
            out,
            row_max,
            row_sum,
            needs_dbias,
        )
        return dq, dk, dv, dbias if needs_dbias else None, *(None,) * (ctx.inputs - 4)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise ForwardModeError(_NO_TANGENTS)


class _Gradients(_SingleLevelFunction):
    """The backward where a graph of it is asked for: it can be built, not used."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dq, dk, dv, dbias = _at_next_level(triangle_attention_gradients, triangle_attention_backward, *inputs)
        return dq, dk, dv, dbias

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise DoubleBackwardError(
            "triangle_attention is differentiable once: for a gradient of a gradient, compile that part "
            "of the model with backend='inductor', or call trifast_inductor.unregister() first"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise ForwardModeError(_NO_TANGENTS)


_NO_TANGENTS = (
    "triangle_attention has no forward-mode derivative: use reverse mode (torch.autograd.grad, torch.func.vjp), "
    "or keep eager attention where jvp, jacfwd or forward_ad is needed"
)


def _applied(function: Any, *inputs: Any) -> Any:
    """`function.apply`; inside torch.func at the level that this call was dispatched to, as for torch's own ops.

    `torch.autograd.Function` would ask for a transform once more: its parent has the autograd of one level.
    """
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*unwrap_dead_wrappers(inputs))
    with enable_single_level_autograd_function():
        return function.apply(*inputs)


def _at_next_level(differentiable: Any, differentiated: Any, *inputs: Any) -> Any:
    """What has been differentiated here; the next level of torch.func differentiates or batches in its turn."""
    if not torch._C._are_functorch_transforms_active():
        return differentiated(*inputs)
    # Function.forward runs with gradients off; whether the next level wants them, torch.func knows.
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return differentiable(*inputs)


def _differentiable(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    # A tangent travels with gradients off, too.
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return _applied(_TriangleAttention, *inputs)
    return triangle_attention_forward(*inputs)


def _differentiable_once(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return _applied(_Gradients, *inputs)
    return triangle_attention_backward(*inputs)


def _forward_flops(q_shape: Any, k_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    b, r, i, h, d = q_shape
    return 4 * b * r * h * i * k_shape[2] * d


def _backward_flops(grad_shape: Any, q_shape: Any, k_shape: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    # Five products, the least a backward that recomputes the probabilities can do; two make the forward.
    return _forward_flops(q_shape, k_shape) * 5 // 2


for _key in ("CPU", "CUDA"):
    _library.impl("triangle_attention", _forward, _key)
    _library.impl("triangle_attention_forward", _forward, _key)
    _library.impl("triangle_attention_gradients", _backward, _key)
    _library.impl("triangle_attention_backward", _backward, _key)
# What serves the op, for code that has chosen it already: `inductor.py`.
triangle_attention_forward.at_once = _forward  # type: ignore[attr-defined]
triangle_attention_backward.at_once = _backward  # type: ignore[attr-defined]
_library.impl("triangle_attention", _differentiable, "Autograd")
_library.impl("triangle_attention_gradients", _differentiable_once, "Autograd")
for _name, _fake, _flops in (
    ("triangle_attention", _fake_forward, _forward_flops),
    ("triangle_attention_forward", _fake_forward, _forward_flops),
    ("triangle_attention_gradients", _fake_backward, _backward_flops),
    ("triangle_attention_backward", _fake_backward, _backward_flops),
):
    _op = getattr(torch.ops.trifast_inductor, _name)
    torch.library.register_fake(f"trifast_inductor::{_name}", _fake, lib=_library)
    torch.library.register_vmap(f"trifast_inductor::{_name}", batching.folded(_op.default), lib=_library)
    torch.utils.flop_counter.register_flop_formula(_op)(_flops)
