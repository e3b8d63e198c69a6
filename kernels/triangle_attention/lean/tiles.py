"""Tiles of the kernels of this directory, apart from what the kernels mean.

Compiled for sm_90 by Triton 3.6.0: registers a thread, KiB of shared memory, instructions a logit in the inner loop.
Milliseconds are of one H200 at N=512 and N=256, H=4, bfloat16, D=32, no key term; D=64: log-backward.md, as a whole.
"""

from dataclasses import dataclass, replace

from trifast_inductor.kernels.triangle_attention.tiling import CappedTile


@dataclass(frozen=True)
class Tiles:
    """Four warps share 64 rows of logits: BLOCK_I of dq and dbias, BLOCK_J of dkdv."""

    dq: CappedTile
    dkdv: CappedTile
    dbias: CappedTile
    marked_registers: int  # what is kept over the loop of blocks wants more

    @property
    def marked(self) -> CappedTile:
        return replace(self.dkdv, maxnreg=self.marked_registers)


_TILES = {
    32: Tiles(
        dq=CappedTile(64, 64, 4, 3, 128),  # 127, 48 KiB, 9.7; 0.389 and 0.071 ms, 64 x 32 0.400 and 0.069
        dkdv=CappedTile(32, 64, 4, 3, 128),  # 119, 28 KiB, 13.7; 0.495 and 0.081 ms, 64 x 64 0.549 and 0.094
        dbias=CappedTile(64, 64, 4, 3, 168),  # 168, 48 KiB, 8.7; 0.341 and 0.053 ms, 64 x 32 0.381 and 0.068
        marked_registers=168,
    ),
    64: Tiles(
        dq=CappedTile(64, 64, 4, 2, 168),  # 168, 56 KiB, 10.0
        dkdv=CappedTile(32, 64, 4, 3, 168),  # 168, 48 KiB, 14.4
        dbias=CappedTile(64, 64, 4, 3),  # 230, 96 KiB, 10.0
        marked_registers=232,  # with 168 it spills eight times as much
    ),
}


def tiles(D: int) -> Tiles:
    return _TILES[32 if D <= 32 else 64]
