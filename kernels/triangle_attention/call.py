"""The direct call: triangle attention asked for by name."""

import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import op, validation


def triangle_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention along one axis of a pair representation, biased by the other.

    out[b,h,r,i] = Σ_j softmax_j(scale·⟨q[b,h,r,i], k[b,h,r,j]⟩ + bias[b,h,i,j]) · v[b,h,r,j]

    Source: Jumper et al. 2021, Supplementary Algorithm 13 (starting node); transpose the pair axes for the ending
    node of Algorithm 14.

    Args:
        q: `[B, H, R, I, D]`; float32, bfloat16, float16 or float64; any strides. R = I = J = N in a pair stack.
        k, v: `[B, H, R, J, D]`, dtype and device of q.
        bias: `[B, H, I, J]`, any float dtype, added in float32, in natural-log units; None for none.
        mask: bool `[B, R, J]`, True where key j of row r is left out.
        scale: `D ** -0.5` when None; a number that is finite and not negative.

    Returns:
        `[B, H, R, I, D]`, dtype of q, stored as `[B, R, I, H, D]`; sums are kept in float32. Memory grows with N²,
        not N³.

    Raises:
        ShapeError, DtypeError, DeviceError, ScaleError: see the message; nothing has been computed.

    Differentiable once in q, k, v and bias. A row whose keys are all left out attends uniformly, as
    `logits.masked_fill(mask, torch.finfo(torch.float32).min)` does in eager; its gradient reaches v alone.
    """
    validation.check_call(q, k, v, bias, mask, scale)
    out, _, _ = op.triangle_attention(
        q.permute(0, 2, 3, 1, 4),
        k.permute(0, 2, 3, 1, 4),
        v.permute(0, 2, 3, 1, 4),
        bias,
        None,
        mask,
        float(q.shape[-1]) ** -0.5 if scale is None else float(scale),
        torch.finfo(torch.float32).min,
        False,
    )
    return out.permute(0, 3, 1, 2, 4)
