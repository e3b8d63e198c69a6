"""The definition of triangle attention: plain torch, no fusion, right in float64.

    x[b,r,h,i,j] = scale·⟨q[b,r,i,h], k[b,r,j,h]⟩ + bias[b,h,i,j]  (⊕ key term[b,r,j])
    out[b,r,i,h] = Σ_j softmax_j(x[b,r,h,i,j]) · v[b,r,j,h]

Every other implementation is tested against this one. It holds the N³ logits, so it is for tests, for float64
and for reading. Shapes and the key term are described in `op.py`.
"""

import torch
from torch import Tensor


def logits(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
) -> Tensor:
    """`[B, R, H, I, J]`: what the softmax reads."""

    def with_key_term(x: Tensor) -> Tensor:
        if key_bias is not None:
            return x + key_bias[:, :, None, None, :].to(x.dtype)
        if key_mask is not None:
            return x.masked_fill(key_mask[:, :, None, None, :], fill)
        return x

    def with_bias(x: Tensor) -> Tensor:
        return x if bias is None else x + bias[:, None].to(x.dtype)

    x = torch.einsum("brihd,brjhd->brhij", q, k) * scale
    return with_bias(with_key_term(x)) if key_term_first else with_key_term(with_bias(x))


def forward(
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
    """Output `[B, R, I, H, D]`, row maximum and row sum `[B, R, H, I]`, all in the dtype of q."""
    x = logits(q, k, bias, key_bias, key_mask, scale, fill, key_term_first)
    row_max = x.amax(-1)
    # A row of -inf keeps exp(-inf) = 0 here and becomes 0/0 = NaN below, as softmax has it.
    weights = torch.exp(x - torch.where(row_max == float("-inf"), 0.0, row_max)[..., None])
    row_sum = weights.sum(-1)
    out = torch.einsum("brhij,brjhd->brihd", weights / row_sum[..., None], v)
    return out, row_max, row_sum


def backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and bias, written out: dS = P ∘ (dP - δ), δ = Σ_j P ∘ dP."""
    x = logits(q, k, bias, key_bias, key_mask, scale, fill, key_term_first)
    p = torch.softmax(x, -1)
    dp = torch.einsum("brihd,brjhd->brhij", grad_out, v)
    dbias_rows = p * (dp - (p * dp).sum(-1, keepdim=True))
    ds = dbias_rows
    if key_mask is not None:
        ds = ds.masked_fill(key_mask[:, :, None, None, :], 0.0)
    dq = torch.einsum("brhij,brjhd->brihd", ds, k) * scale
    dk = torch.einsum("brhij,brihd->brjhd", ds, q) * scale
    dv = torch.einsum("brhij,brihd->brjhd", p, grad_out)
    if bias is None:
        return dq, dk, dv, None
    # The select cuts the bias off only when it came after the bias.
    return dq, dk, dv, (dbias_rows if key_term_first else ds).sum(1)
