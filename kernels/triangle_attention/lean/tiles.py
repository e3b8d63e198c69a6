"""Tiles of the kernels of this directory, apart from what the kernels mean.

Compiled for sm_90 by Triton 3.6.0: registers a thread, KiB of shared memory, instructions a logit in the inner loop.
None was measured.
"""

from dataclasses import dataclass

from trifast_inductor.kernels.triangle_attention import tiling


@dataclass(frozen=True)
class Tile(tiling.Tile):
    """`maxnreg` caps the registers, so that three programs fit a multiprocessor; None leaves them to the compiler."""

    maxnreg: int | None = None


_DQKV = {
    32: Tile(64, 64, 4, 2, 168),  # 168, 41 KiB, 13.0; without a cap 248, 11.8, but two programs
    64: Tile(64, 64, 4, 2),  # 255, 65 KiB, 13.3
}
_DBIAS = {
    32: Tile(64, 64, 4, 2, 168),  # 168, 32 KiB, 8.5
    64: Tile(64, 64, 4, 2),  # 249, 64 KiB, 10.0
}


def dqkv_tile(D: int) -> Tile:
    return _DQKV[32 if D <= 32 else 64]


def dbias_tile(D: int) -> Tile:
    return _DBIAS[32 if D <= 32 else 64]
