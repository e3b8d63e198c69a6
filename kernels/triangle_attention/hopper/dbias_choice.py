"""When the Hopper kernel for dbias may run instead of the portable one, in which shape and over how many rows."""

import functools
from dataclasses import dataclass

from torch import Tensor

from trifast_inductor.kernels.triangle_attention import tiling
from trifast_inductor.kernels.triangle_attention.hopper import choice

TILE = 128  # queries, and keys, of a program
# Where the whole backward takes less, padding of tiles and all: docs/benchmarks/log-backward.md, step 27.
_FEWEST_LOGITS = 4 * 192**3
_SHORTEST = 193  # keys


@dataclass(frozen=True)
class Shape:
    """Parameters of `_triangle_attention_bwd_dbias_hopper`, named as they are there.

    Four partitions of 64 by 64, or two of 64 by 128: in one product, or in two HALVES.
    """

    COLUMNS: int = 64
    HALVES: int = 1
    STAGES: int = 6

    @property
    def REGISTERS(self) -> int:
        """Of a thread, in the partitions but the first, which has what they leave: 120 and 240."""
        return 112 if self.COLUMNS * self.HALVES == 64 else 240

    def shared_memory(self, D: int) -> int:
        """Bytes for q, k, v, grad_out and two tiles of terms; barriers, and what partitions are given, come on top."""
        return self.STAGES * (4 * 2 * TILE * D + 2 * 1024)


def shape_for(D: int) -> Shape:
    """Six rows in shared memory, three where they are twice as wide."""
    return Shape(STAGES=6 if D <= 32 else 3)


@functools.cache
def rows_of_a_part(R: int, tiles: int, processors: int) -> int:
    """Rows of a group, such that programs fill the multiprocessors (one each) and their last wave is not a short one.

    Counted in rows of a tile, about 0.7 µs each on an H200: a program takes 8 more to begin and to end, and a part is
    written and read again, 128 KiB a tile.
    """
    return tiling.rows_of_a_group(R, tiles, processors, extra=8, part=tiles / 16, most=64)


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
    """Why only the portable kernel serves this call, or None where the Hopper one can."""
    if bias is None:
        return "there is no bias"
    if (why := choice.gradient_refusal(grad_out, q)) is not None:
        return why
    # Any dtype will do for the bias: it is read as it is.
    as_read = bias.to("meta").to(q.dtype)
    why = choice.refusal(q, k, v, as_read, key_mask, scale, fill, key_term_first, _SHORTEST)
    logits = q.shape[1] * bias.numel()
    if why is None and logits < _FEWEST_LOGITS:
        why = f"{logits} logits are fewer than {_FEWEST_LOGITS}"
    return why
