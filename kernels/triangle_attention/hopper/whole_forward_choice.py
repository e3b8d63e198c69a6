"""When the Hopper forward of short sequences may run, in which shape, and over how many rows."""

from dataclasses import dataclass

import triton
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, tiling
from trifast_inductor.kernels.triangle_attention.hopper import choice

LONGEST = 192  # queries and keys: beyond, two rows have no room beside the bias
_SHORTEST = 112  # queries and keys: shorter ones are mostly padding of tiles
_FEWEST_ROWS = {2: 1024, 3: 768}  # of all heads, by tiles of the longer side: docs/benchmarks/log.md
_HEADS = (16, 32)  # columns D
SIDE = 64  # queries, and keys, of a tile
_REGISTERS = {3: 160, 4: 120}  # by partitions: of all but the first, which has what they leave


@dataclass(frozen=True)
class Shape:
    """Parameters of `_triangle_attention_fwd_whole_hopper`, named as they are there."""

    ROWS: int  # at a time
    TI: int  # tiles of queries
    TJ: int  # tiles of keys
    STAGES: int
    REGISTERS: int

    def rows_of_a_program(self, R: int, heads: int, processors: int) -> int:
        """Such that programs, of which a multiprocessor holds one, end together.

        Counted in turns: a program takes about two more to begin.
        """
        turns = tiling.rows_of_a_group(-(-R // self.ROWS), heads, processors, extra=2, part=0.0, most=processors)
        return turns * self.ROWS


def shape_for(I: int, J: int, D: int) -> Shape:
    """Four partitions, or three, and as many turns of rows in shared memory as there is room for, four at most."""
    TI, TJ = triton.cdiv(I, SIDE), triton.cdiv(J, SIDE)
    ROWS = 4 // TI
    left = choice.SHARED_MEMORY - 2 * SIDE * (SIDE * TI * TJ + ROWS * TI * D) - 1024  # barriers, and what Triton adds
    stages = min(4, left // (2 * SIDE * ROWS * (D * (TI + 2 * TJ) + 2 * TJ)))
    return Shape(ROWS, TI, TJ, stages, _REGISTERS[ROWS * TI])


def refusal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> str | None:
    """Why other kernels serve a call, or None."""
    B, R, I, H, D = q.shape
    J = k.shape[2]
    if min(I, J) < _SHORTEST or max(I, J) > LONGEST:
        return f"{I} queries by {J} keys are not {_SHORTEST} to {LONGEST}"
    if (fewest := _FEWEST_ROWS[triton.cdiv(max(I, J), SIDE)]) > B * R * H:
        return f"{B * R * H} rows of all heads are fewer than {fewest}"
    if D not in _HEADS:
        return f"D={D} is not in {_HEADS}"
    if (why := choice.operand_refusal(q, k, v, bias)) is not None:
        return why
    assert bias is not None
    if arguments.bias_is_aligned(bias) and not choice.copied_by_engine(bias):
        return "the bias repeats itself along an axis"
    return choice.gluon_refusal()
