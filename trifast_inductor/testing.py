"""Random inputs and an error budget, for our tests and for yours.

A fused kernel rounds at other places than eager does, so neither is the measure of the other. Both are held
against float64: for the output and for each gradient

    ‖actual - exact‖ ≤ 2·‖eager - exact‖ + ½·eps·‖exact‖

with `exact` in float64 from the same rounded inputs, `eager` and `actual` in one dtype, eps of that dtype (one
rounding of the result), and ‖·‖ once the largest element and once the root mean square.

    inputs = random_inputs(R=64, I=64, J=64, dtype=torch.bfloat16, key_term="mask")
    assert_attention_within_budget(my_attention, inputs)     # output and all gradients
    assert_within_budget(actual, eager, exact)               # any tensor
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import reference

KEY_TERMS = ("none", "additive", "mask", "-inf mask")


@dataclass(frozen=True)
class Inputs:
    """Arguments of the op, in its order and shapes (`kernels/triangle_attention/op.py`), and a gradient."""

    q: Tensor  # [B, R, I, H, D]
    k: Tensor  # [B, R, J, H, D]
    v: Tensor  # [B, R, J, H, D]
    bias: Tensor | None  # [B, H, I, J]
    key_bias: Tensor | None  # [B, R, J], 0 or -1e9
    key_mask: Tensor | None  # [B, R, J], True where the logit is replaced by `fill`
    scale: float
    fill: float
    key_term_first: bool
    grad_out: Tensor  # [B, R, I, H, D]

    @property
    def op(self) -> tuple[Any, ...]:
        """The arguments of the forward."""
        return tuple(getattr(self, field.name) for field in fields(self))[:-1]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same values in another float dtype; strides are kept, the mask is left alone."""
        floats: dict[str, Any] = {
            field.name: value.to(dtype)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.is_floating_point()
        }
        return replace(self, **floats)


def random_inputs(
    B: int = 1,
    R: int = 8,
    I: int = 8,
    J: int = 8,
    H: int = 2,
    D: int = 32,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    key_term: str = "none",
    key_term_first: bool = False,
    has_bias: bool = True,
    sharpness: float = 1.0,
    seed: int = 0,
) -> Inputs:
    """Standard normal inputs, the same on every device, with about a third of the keys left out.

    Args:
        key_term: one of `KEY_TERMS`: nothing; -1e9 added; a finite fill; a fill of -inf. Key 0 of every row
            is kept, so that no row is wholly masked.
        sharpness: standard deviation of the logits' product term; 30 leaves one key in a softmax.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    left_out = (torch.rand((B, R, J), generator=generator) < 0.3).to(device)
    left_out[..., :1] = False
    return Inputs(
        q=normal(B, R, I, H, D),
        k=normal(B, R, J, H, D),
        v=normal(B, R, J, H, D),
        bias=normal(B, H, I, J) if has_bias else None,
        key_bias=(-1e9 * left_out.float()).to(dtype) if key_term == "additive" else None,
        key_mask=left_out if key_term in ("mask", "-inf mask") else None,
        scale=sharpness * D**-0.5,
        fill=torch.finfo(dtype).min if key_term == "mask" else float("-inf"),
        key_term_first=key_term_first,
        grad_out=normal(B, R, I, H, D),
    )


def assert_within_budget(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    name: str = "result",
    times: float = 2.0,
    floor: float | Tensor = 0.0,
) -> None:
    """Fail unless `actual` is at most twice as far from `exact` as `eager`, plus one rounding of the result.

    Distances are taken over the whole tensor, once as the largest difference and once as the root of the mean
    square. An element alone is no measure: eager is exact on some by luck. The largest difference finds one
    wrong tile, the mean square a small error everywhere. NaN and infinity must stand where float64 has them.

    Args:
        actual: what the kernel gave; its dtype sets the size of a rounding.
        eager: the same computation in eager torch, in the dtype of `actual`.
        exact: the same in float64, from the inputs as rounded to that dtype.
        times: how many times eager's error is allowed.
        floor: an absolute error allowed besides, for a result that cancels to less than its terms' roundings; of
            every element alone where it is a tensor.
    """
    actual64, eager64, exact64 = (t.detach().double() for t in (actual, eager, exact))
    finite = exact64.isfinite()
    torch.testing.assert_close(
        actual64[~finite],
        exact64[~finite],
        equal_nan=True,
        msg=lambda text: f"{name}: NaN or infinite at other places than in float64\n{text}",
    )
    assert actual64[finite].isfinite().all(), f"{name}: NaN or infinite where float64 is finite"
    if not finite.any():
        return
    values = exact64[finite]
    error, allowed = actual64[finite] - values, (eager64[finite] - values).nan_to_num(0.0)
    rounding = torch.finfo(actual.dtype).eps / 2
    floors = floor.double()[finite] if isinstance(floor, Tensor) else values.new_tensor([floor])
    for measure, norm in (("largest", torch.max), ("root mean square", _root_mean_square)):
        budget = times * norm(allowed.abs()) + rounding * norm(values.abs()) + norm(floors)
        off = norm(error.abs())
        assert off <= budget, (
            f"{name}: {measure} error {off:.3g} exceeds the budget {budget:.3g} "
            f"({times:g} times eager's {norm(allowed.abs()):.3g} and one rounding in {actual.dtype})"
        )


def assert_attention_within_budget(
    attend: Callable[..., Tensor], x: Inputs, *, times: float = 2.0, rereads_output: bool = False
) -> None:
    """Fail unless an attention keeps the budget in its output and in the gradients of q, k, v and bias.

    attend(q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first) -> out, differentiable, as `eager` is:

        out[b,r,i,h] = Σ_j softmax_j(scale·⟨q[b,r,i,h], k[b,r,j,h]⟩ + bias[b,h,i,j] (⊕ key term[b,r,j])) · v[b,r,j,h]

    Beyond `assert_within_budget` it allows what `error_floors` describes.

    Args:
        x: of `random_inputs`, or your own; float32, bfloat16 or float16.
        times: how many times eager's error is allowed.
        rereads_output: the backward takes δ = Σ_d g·out from the output as it was rounded, as FlashAttention does.
    """
    exact, rounded, actual = results(eager, x.to(torch.float64)), results(eager, x), results(attend, x)
    floors = error_floors(x, exact, rereads_output=rereads_output)
    for name, value in exact.items():
        assert_within_budget(actual[name], rounded[name], value, name=name, times=times, floor=floors[name])


def eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
) -> Tensor:
    """What a model writes: a product, adds, a softmax and a product, rounded to the dtype at every step."""
    x = reference.logits(q, k, bias, key_bias, key_mask, scale, fill, key_term_first)
    return torch.einsum("brhij,brjhd->brihd", torch.softmax(x, -1), v)


def results(attend: Callable[..., Tensor], x: Inputs) -> dict[str, Tensor]:
    """`out` and, by autograd with x.grad_out, `dq`, `dk`, `dv` and, where there is a bias, `dbias`."""
    named = {"dq": x.q, "dk": x.k, "dv": x.v, "dbias": x.bias}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    out = attend(*(leaves.get(name) for name in named), *x.op[4:])
    gradients = torch.autograd.grad(out, list(leaves.values()), x.grad_out)
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


def error_floors(x: Inputs, exact: dict[str, Tensor], *, rereads_output: bool = False) -> dict[str, Tensor]:
    """What a fused kernel may be off by where eager is exact by luck: by name of a result, of each element.

    Eager is no measure where one key takes all the weight: its probabilities are then 1 and 0 exactly. Allowed to any
    kernel that sums in float32, with u = 2⁻²⁴ and all maxima over the tensors:

        a weight is off by u·max Σ_d |q·k|·scale of itself (`logits_rounding`), and with it the output; by twice that in
            a backward that sums the logits again, less a maximum that the forward summed, and with it each gradient;
        dp - δ cancels to no less than 2u·max Σ_d |g·v|, which reaches dq, dk and dbias.

    With `rereads_output`, δ is besides off by e = ½·eps·√Σ_d (g·out)², the sum of D roundings of the output:

        dq by scale·e_i·|Σ_j p_ij·k_j|,  dk by scale·√Σ_i (e_i·p_ij·q_i)²,  dbias by √Σ_r (e_i·p_ij)².
    """
    floors = {name: torch.zeros_like(value) for name, value in exact.items()}
    if 0 in x.grad_out.shape or 0 in x.k.shape:
        return floors
    weight = logits_rounding(x)
    for name, value in exact.items():
        floors[name] += weight * _largest(x.v) if name == "out" else 2 * weight * _largest(value)
    wide = x.to(torch.float64)
    products = torch.einsum("brihd,brjhd->brhij", wide.grad_out.abs(), wide.v.abs())
    left = torch.finfo(torch.float32).eps * products.max().item()
    floors["dq"] += left * x.scale * _largest(x.k)
    floors["dk"] += left * x.scale * _largest(x.q)
    if x.bias is not None:
        floors["dbias"] += left * x.q.shape[1]
    if rereads_output:
        p = torch.softmax(reference.logits(*wide.op[:2], *wide.op[3:]), -1)
        off = torch.finfo(x.q.dtype).eps / 2 * (wide.grad_out * exact["out"]).norm(dim=-1).transpose(2, 3)[..., None]
        of_dk = torch.einsum("brhij,brihd->brjhd", (off * p).square(), wide.q.square()).sqrt()
        floors["dq"] += x.scale * torch.einsum("brhij,brjhd->brihd", off * p, wide.k).abs()
        floors["dk"] += x.scale * of_dk
        if x.bias is not None:
            floors["dbias"] += (off * p).square().sum(1).sqrt()
    return floors


def logits_rounding(x: Inputs) -> float:
    """Relative error of a softmax weight whose logit was summed in float32 in some other order than eager's.

    Half a unit in the last place of Σ_d |q·k|·scale. It matters where eager is exact by having one key only.
    """
    if 0 in x.q.shape or 0 in x.k.shape:
        return 0.0
    terms = torch.einsum("brihd,brjhd->brhij", x.q.double().abs(), x.k.double().abs())
    return torch.finfo(torch.float32).eps / 2 * x.scale * terms.max().item()


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()


def _largest(t: Tensor) -> float:
    return t.detach().double().abs().nan_to_num(0.0, posinf=0.0).max().item()
