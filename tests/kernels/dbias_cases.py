"""What a backward has at hand when it comes to dbias, what is expected of it, and inputs that try it."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.testing import Inputs, random_inputs


@dataclass
class Given:
    """Inputs, and what a forward gave for them."""

    x: Inputs
    out: Tensor
    row_max: Tensor
    row_sum: Tensor

    @property
    def key(self) -> Tensor | None:
        return self.x.key_bias if self.x.key_mask is None else self.x.key_mask.view(torch.uint8)

    @property
    def terms(self) -> Tensor:
        delta = (self.out.float() * self.x.grad_out.float()).sum(-1).transpose(2, 3)
        return torch.stack((self.row_max / math.log(2) + self.row_sum.log2(), delta), -1)

    @property
    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.row_max, self.row_sum, self.terms

    @property
    def expected(self) -> Tensor:
        return self.expected_of(list(range(self.x.q.shape[1])))

    def expected_of(self, rows: list[int]) -> Tensor:
        """In float32 and in the order of the portable kernel, summed over these rows."""
        x = self.x.to(torch.float32)
        logits = reference.logits(*x.op[:2], *x.op[3:])
        p = torch.exp(logits - self.row_max[..., None]) / self.row_sum[..., None]
        dp = torch.einsum("brihd,brjhd->brhij", x.grad_out, x.v)
        ds = p * (dp - self.terms[..., 1, None])
        if x.key_mask is not None and not x.key_term_first:
            ds = ds.masked_fill(x.key_mask[:, :, None, None, :], 0.0)
        return ds[:, rows].sum(1)


def given(x: Inputs) -> Given:
    out, row_max, row_sum = reference.forward(*x.to(torch.float32).op)
    return Given(x, out.to(x.q.dtype), row_max, row_sum)


def inputs(device: str, key_term: str, *, R: int = 3, key_term_first: bool = False, **kwargs) -> Inputs:
    """Two tiles by two, and R rows; the bias in float32, so that its gradient is not rounded."""
    sizes = {"I": 130, "J": 140, "D": 16, "H": 2, **kwargs}
    x = random_inputs(
        R=R, dtype=torch.bfloat16, device=device, key_term=key_term, key_term_first=key_term_first, **sizes
    )
    return replace(x, bias=x.bias.float())


def wholly_left_out(x: Inputs) -> Inputs:
    """A row whose logits are all -1e9: each is rounded there, and its probabilities are uniform."""
    x.key_bias[:, 1] = -1e9
    return x


def wholly_filled(x: Inputs) -> Inputs:
    x.key_mask[:, 1] = True
    return x


def _far(x: Inputs) -> Inputs:
    """The bias takes one query far from zero."""
    x.bias[..., 2, :] -= 20000.0
    return x


def _masked_in_the_bias(x: Inputs) -> Inputs:
    x.bias[..., 5:9, 20:40] = float("-inf")
    x.bias[..., 70:80, 20:40] = -1e9
    return x


def _all_at_minus_infinity(x: Inputs) -> Inputs:
    x.bias[..., 2, :] = float("-inf")
    return x


def _large(x: Inputs) -> Inputs:
    """Beyond what stays a factor, and within it."""
    x.bias[..., :64, :] *= 20.0
    x.bias[..., 64:, :] *= 8.0
    return x


def _nan_in_q(x: Inputs) -> Inputs:
    x.q[0, 1, 2] = float("nan")
    return x


def _nan_in_a_masked_key(x: Inputs) -> Inputs:
    x.key_mask[0, 1, 77] = True
    x.k[0, 1, 77] = float("nan")
    return x


CHANGES = {
    "wholly left out": (wholly_left_out, "additive"),
    "wholly filled": (wholly_filled, "mask"),
    "far from zero": (_far, "none"),
    "masked in the bias": (_masked_in_the_bias, "additive"),
    "all at -inf": (_all_at_minus_infinity, "none"),
    "large bias": (_large, "none"),
    "NaN in q": (_nan_in_q, "none"),
    "NaN in a masked key": (_nan_in_a_masked_key, "mask"),
}
