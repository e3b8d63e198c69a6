"""When the Hopper kernel for dq, dk and dv may run instead of the lean ones, and in which shape."""

from dataclasses import dataclass

from torch import Tensor

from trifast_inductor.kernels.triangle_attention.hopper import choice

# Queries and keys, by D, of the lean kernels, too: docs/benchmarks/log-backward.md, steps 17 and 24.
SHORTEST = {16: 192, 32: 192, 64: 128}


@dataclass(frozen=True)
class Shape:
    """Parameters of `_triangle_attention_bwd_dqkv_hopper`, named as they are there."""

    STAGES: int = 4  # of 64 queries, and the words of their bias
    KV_STAGES: int = 2
    DS_STAGES: int = 2
    REGISTERS: int = 208  # of the second partition that walks; the first has what is left, as many
    DQ_REGISTERS: int = 72
    KEYS_STAY: bool = True  # k and v in registers


def shape_for(D: int) -> Shape:
    """At D=64 dk and dv leave no room: products read k and v from shared memory, which holds a stage less."""
    return Shape() if D <= 32 else Shape(STAGES=3, KEYS_STAY=False)


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
    shortest = SHORTEST.get(q.shape[-1])
    if shortest is None:
        return f"D={q.shape[-1]} is not in {tuple(SHORTEST)}"
    if min(q.shape[2], k.shape[2]) < shortest:
        return f"{q.shape[2]} queries by {k.shape[2]} keys are fewer than {shortest}"
    if (why := choice.gradient_refusal(grad_out, q)) is not None:
        return why
    return choice.refusal(q, k, v, bias, key_mask, scale, fill, key_term_first, shortest)
