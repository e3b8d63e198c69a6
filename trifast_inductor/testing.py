"""Random inputs and an error budget, for our tests and for yours.

A fused kernel rounds at other places than eager does, so neither is the measure of the other. Both are held
against float64: the kernel may be off by twice what eager is off by in the same dtype, plus one rounding of
the result.

    inputs = random_inputs(R=64, I=64, J=64, dtype=torch.bfloat16, key_term="mask")
    assert_within_budget(kernel(inputs), eager(inputs), eager(inputs.to(torch.float64)))
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

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
    floor: float = 0.0,
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
        floor: an absolute error allowed besides, for a result that cancels to less than its terms' roundings.
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
    for measure, norm in (("largest", torch.max), ("root mean square", _root_mean_square)):
        budget = times * norm(allowed.abs()) + rounding * norm(values.abs()) + floor
        off = norm(error.abs())
        assert off <= budget, (
            f"{name}: {measure} error {off:.3g} exceeds the budget {budget:.3g} "
            f"({times:g} times eager's {norm(allowed.abs()):.3g} and one rounding in {actual.dtype})"
        )


def logits_rounding(x: Inputs) -> float:
    """Relative error of a softmax weight whose logit was summed in float32 in some other order than eager's.

    Half a unit in the last place of Σ_d |q·k|·scale. It matters where eager is exact by having one key only,
    and in a backward, which need not sum the logits in the order of the forward that found the maximum.
    """
    if 0 in x.q.shape or 0 in x.k.shape:
        return 0.0
    terms = torch.einsum("brihd,brjhd->brhij", x.q.double().abs(), x.k.double().abs())
    return torch.finfo(torch.float32).eps / 2 * x.scale * terms.max().item()


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
