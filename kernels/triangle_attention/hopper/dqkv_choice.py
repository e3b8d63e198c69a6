"""When the Hopper kernel for dq, dk and dv may run instead of the lean ones, and in which shape."""

from dataclasses import dataclass

from torch import Tensor

from trifast_inductor.kernels.triangle_attention.hopper import choice

_SHORTEST = 192  # queries and keys: docs/benchmarks/log-backward.md, step 17
_HEADS = (16, 32)  # columns D; at 64 dk and dv do not fit beside two tiles of logits


@dataclass(frozen=True)
class Shape:
    """Parameters of `_triangle_attention_bwd_dqkv_hopper`, named as they are there."""

    STAGES: int = 3  # of 64 queries, and the words of their bias
    KV_STAGES: int = 2
    DS_STAGES: int = 2
    REGISTERS: int = 208  # of the second partition that walks; the first has what is left, as many
    DQ_REGISTERS: int = 64


def refusal(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    key_term_first: bool,
) -> str | None:
    """Why only the lean kernels serve this call, or None where the Hopper one can."""
    if q.shape[-1] not in _HEADS:
        return f"D={q.shape[-1]} is not in {_HEADS}"
    if min(q.shape[2], k.shape[2]) < _SHORTEST:
        return f"{q.shape[2]} queries by {k.shape[2]} keys are fewer than {_SHORTEST}"
    if (why := choice.gradient_refusal(grad_out, q)) is not None:
        return why
    return choice.refusal(q, k, v, bias, key_mask, scale, fill, key_term_first, _SHORTEST)
