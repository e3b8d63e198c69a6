"""When the Hopper kernels for all gradients of a row may run, which of them, and over how many rows."""

from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, tiling
from trifast_inductor.kernels.triangle_attention.hopper import choice

LONGEST = 192  # queries and keys: beyond, dbias does not fit the registers of a multiprocessor
_LONGEST_BY_KEY = 128  # queries and keys of `whole_by_key.py`: docs/benchmarks/log-backward.md, step 21
_SHORTEST = 65  # queries, two tiles of them: docs/benchmarks/log-backward.md, step 19
_HEADS = (16, 32)  # columns D; at 64 two rows do not fit beside the bias


def rows_of_a_program(R: int, heads: int, processors: int) -> int:
    """Such that programs, of which a multiprocessor holds one, end together.

    Counted in rows, a microsecond at most for each tile: a program takes two more to begin and to leave its dbias, and
    to read that again, 16 KiB a tile, takes 1/180 of one.
    """
    return tiling.rows_of_a_group(R, heads, processors, extra=2, part=heads / 180, most=processors)


def is_by_key(I: int, J: int) -> bool:
    """Whether `whole_by_key.py` serves a call that is not refused, in three quarters of the time."""
    return min(I, J) >= _SHORTEST and max(I, J) <= _LONGEST_BY_KEY


def refusal(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
) -> str | None:
    """Why other kernels serve a call, or None."""
    I, J, D = q.shape[2], k.shape[2], q.shape[-1]
    if I < _SHORTEST or max(I, J) > LONGEST:
        return f"{I} queries by {J} keys are not {_SHORTEST} to {LONGEST}"
    if D not in _HEADS:
        return f"D={D} is not in {_HEADS}"
    if (why := choice.operand_refusal(q, k, v, bias)) is not None:
        return why
    if (why := choice.gradient_refusal(grad_out, q)) is not None:
        return why
    assert bias is not None
    if is_by_key(I, J):
        return choice.gluon_refusal()
    if arguments.bias_is_aligned(bias) and not choice.copied_by_engine(bias):
        return "the bias repeats itself along an axis"
    if key_mask is None and key_bias is not None and key_bias.itemsize > 2 and D > 16 and min(I, J) > 128:
        return f"there is no room for a key term of {key_bias.dtype}"
    return choice.gluon_refusal()
