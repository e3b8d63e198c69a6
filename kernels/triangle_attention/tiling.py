"""Tile choice for every kernel: shipped heuristics, apart from what the kernels mean.

Every entry was compiled for sm_90 and sm_80: on sm_90 no register is spilled (two of the float32 entries spill
8 bytes), and shared memory stays under the 99 KiB that one program may have on sm_86 and sm_89. Figures beside an
entry are for sm_90: registers a thread, KiB of shared memory, instructions a logit in the inner loop. Milliseconds
are of one H200 (torch 2.11, Triton 3.6), N=512, H=4, bf16, with a float key term: of the forward, or of the whole
backward with only that kernel's tile changed.
"""

import sys
from dataclasses import dataclass, replace

import torch

from trifast_inductor.kernels.triangle_attention import tuning


@dataclass(frozen=True)
class Tile:
    """One kernel's tile, named as the kernel's and the compiler's parameters are."""

    BLOCK_I: int
    BLOCK_J: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class CappedTile(Tile):
    """`maxnreg` caps the registers, so that more programs fit a multiprocessor; None leaves them to the compiler."""

    maxnreg: int | None = None

    @property
    def programs(self) -> int:
        """As many as the registers of a multiprocessor hold."""
        return 65536 // (32 * self.num_warps * (self.maxnreg or 255))


# By how products are made and by columns of a tile. 16 bits and tf32 run on tensor cores; ieee float32 keeps
# both operands in registers, which limits it to small tiles.
_Table = dict[str, dict[int, Tile]]

_FORWARD: _Table = {
    "16 bit": {
        32: Tile(128, 32, 4, 3),  # 134, 36 KiB, 16.7; 0.459 ms, 64 x 64 0.475, 128 x 64 0.549
        64: Tile(64, 32, 4, 3),  # 116, 40 KiB, 22.6; 0.667 ms, 64 x 64 0.685, 128 x 64 0.701
        128: Tile(64, 32, 4, 3),  # 164, 72 KiB, 26.7; 1.005 ms, 64 x 64 1.030
    },
    "3xtf32": {
        32: Tile(128, 32, 8, 2),  # 128, 64 KiB, 28.3; 1.63 ms, 128 x 64 1.70, 64 x 64 1.79, 64 x 32 1.87
        64: Tile(64, 32, 4, 2),  # 167, 72 KiB, 42; at N=256 0.46 ms, 64 x 16 0.59
    },
    "tf32": {
        32: Tile(64, 64, 4, 2),  # 143, 56 KiB, 19.8
        64: Tile(64, 64, 4, 2),  # 162, 96 KiB, 22.3
        128: Tile(32, 64, 4, 2),  # 140, 96 KiB, 43.5; 64 x 32 has 35.7 but takes 104 KiB
    },
    "ieee": {
        32: Tile(64, 32, 4, 2),  # 168, 32 KiB, 92
        64: Tile(32, 32, 4, 2),  # 102, 32 KiB, 181
        128: Tile(64, 32, 8, 2),  # 144, 80 KiB, 331; four warps spill at 32 x 32 and above
    },
}

_DQ: _Table = {
    "16 bit": {
        32: Tile(64, 32, 4, 3),  # 93, 28 KiB, 15.3; alone at N=256 0.081 ms, 128 x 32 0.085
        64: Tile(64, 32, 4, 2),  # 128, 36 KiB, 18.6; 3.187 ms, 64 x 64 3.337
        128: Tile(64, 32, 4, 2),  # 168, 68 KiB, 22.6; 4.681 ms, 128 x 32 5.026
    },
    "3xtf32": {
        32: Tile(128, 32, 8, 2),  # 128, 96 KiB, 30.1; 2.09 ms, 64 x 64 2.20, 64 x 32 2.40
        64: Tile(64, 32, 4, 1),  # 221, 45; at N=256 0.68 ms, 64 x 16 in two stages 0.92
    },
    "tf32": {
        32: Tile(64, 64, 4, 2),  # 170, 64 KiB, 18.9
        64: Tile(64, 32, 4, 2),  # 166, 72 KiB, 27.9; 64 x 64 takes 112 KiB
        128: Tile(16, 32, 4, 2),  # 126, 66 KiB, 86; 32 x 32 spills
    },
    "ieee": {
        32: Tile(32, 32, 4, 2),  # 110, 24 KiB, 135
        64: Tile(32, 32, 8, 2),  # 86, 40 KiB, 267; four warps spill
        128: Tile(32, 32, 4, 2),  # 138, 72 KiB, 467
    },
}

_DKDV: _Table = {
    "16 bit": {
        32: Tile(64, 64, 4, 2),  # 151, 27 KiB, 17.6; alone 0.716 ms, 32 x 64 0.736, three stages 0.730
        64: Tile(32, 64, 4, 2),  # 158, 34 KiB, 23.0; 3.273 ms, 64 x 64 3.319
        128: Tile(32, 64, 4, 2),  # 238, 66 KiB, 26.6; 4.665 ms, 32 x 128 5.228; 64 x 64 spills
    },
    "3xtf32": {
        32: Tile(32, 64, 4, 1),  # 209, 49.4; 3.51 ms, two stages 4.24, 32 x 128 3.72, 16 x 64 4.97
        64: Tile(16, 64, 4, 1),  # 254, 86; at N=256 1.21 ms, two stages 1.25
    },
    "tf32": {
        32: Tile(32, 64, 4, 2),  # 155, 36 KiB, 27.9
        64: Tile(32, 64, 4, 2),  # 208, 64 KiB, 33.8
        128: Tile(32, 32, 4, 2),  # 166, 88 KiB, 74.5; 32 x 64 spills
    },
    "ieee": {
        32: Tile(16, 32, 4, 2),  # 88, 16 KiB, 185; 32 x 32 has 176 with 248 registers
        64: Tile(16, 32, 4, 2),  # 132, 28 KiB, 334; 32 x 32 spills
        128: Tile(16, 32, 4, 2),  # 202, 52 KiB, 634
    },
}

_DBIAS: _Table = {
    "16 bit": {
        32: Tile(64, 32, 4, 3),  # 127, 36 KiB, 16.6
        64: Tile(64, 64, 4, 2),  # 243, 64 KiB, 14.3; 2.568 ms, 64 x 32 3.023
        128: Tile(64, 32, 4, 2),  # 178, 96 KiB, 27.9; 4.669 ms, 64 x 64 4.432 but it spills
    },
    "3xtf32": {
        32: Tile(64, 64, 4, 3),  # 254, 64 KiB, 19.7; 1.11 ms, two stages 1.17, 128 x 64 1.26, 64 x 32 1.51
        64: Tile(64, 32, 4, 2),  # 208, 64 KiB, 43; at N=256 0.34 ms, 64 x 16 0.49
    },
    "tf32": {
        32: Tile(64, 32, 4, 2),  # 144, 48 KiB, 20.1
        64: Tile(64, 32, 4, 2),  # 182, 96 KiB, 27.7
        128: Tile(16, 32, 4, 2),  # 138, 48 KiB, 85; 32 x 32 spills
    },
    "ieee": {
        32: Tile(32, 32, 4, 2),  # 116, 16 KiB, 95
        64: Tile(32, 32, 4, 2),  # 148, 32 KiB, 180
        128: Tile(32, 32, 8, 2),  # 94, 64 KiB, 368
    },
}


_SHIPPED = {"forward": _FORWARD, "dq": _DQ, "dkdv": _DKDV, "dbias": _DBIAS}

# Of queries and keys, up to which one launch of the portable kernels for a backward serves, or one after dq's:
# docs/benchmarks/log-backward.md, step 9.
LONGEST_TOGETHER = 64
LONGEST_AFTER_DQ = 192

# 16 bits, by columns of a tile: the lengths of another tile, and that. One launch after dq's has the registers of the
# largest that share it, and its milliseconds are of the whole backward at N=128; else alone, at N=512 and N=256.
_AT_LENGTHS: dict[tuple[str, int], tuple[range, Tile]] = {
    ("dq", 32): (range(384, sys.maxsize), Tile(128, 32, 4, 3)),  # 0.454 and 0.085 ms, 64 x 32 0.493 and 0.081
    # Six groups of rows: 0.452 and 0.075 ms, 64 x 32 0.502 and 0.079.
    ("dbias", 32): (range(256, sys.maxsize), Tile(64, 64, 4, 3)),
    # 0.0423 ms, 64 x 64 0.0450.
    ("dkdv", 32): (range(LONGEST_TOGETHER + 1, LONGEST_AFTER_DQ + 1), Tile(32, 64, 4, 2)),
    # 0.0674 ms, 64 x 64 0.0750, 32 x 64 0.0792.
    ("dbias", 64): (range(LONGEST_TOGETHER + 1, LONGEST_AFTER_DQ + 1), Tile(64, 32, 4, 2)),
}


def choose(
    kernel: str,
    dtype: torch.dtype,
    D: int,
    I: int,
    J: int,
    precision: str,
    H: int = 1,
    mask: bool = False,
    bias: bool = True,
    device: int = -1,
) -> Tile:
    """Tile of one launch: what has been tuned on the device goes before the shipped table.

    Args:
        kernel: one of `tuning.KERNELS`.
        precision: `arguments.dot_precision(dtype, D)`.
        mask: whether there is a key term.
        device: `Tensor.get_device()`; -1 for the shipped table alone.
    """
    sizes = tuning.tuned(device, kernel, dtype, precision, D, H, max(I, J), mask, bias)
    tile = heuristic(kernel, dtype, D, precision, min(I, J)) if sizes is None else Tile(**sizes)
    tile = replace(tile, BLOCK_I=_clip(tile.BLOCK_I, I), BLOCK_J=_clip(tile.BLOCK_J, J))
    return _halved(tile, I) if kernel == "forward" and _is_narrow(dtype, D) else tile


def _is_narrow(dtype: torch.dtype, D: int) -> bool:
    return dtype != torch.float32 and D <= 32


def _halved(tile: Tile, I: int) -> Tile:
    """Half as many queries for four warps where the last tile would be mostly padding, also of a tile that was tuned.

    That was measured at the longest sequence of its bucket. One H200, with a key mask: N=160 0.025 ms in tiles of 64
    for 0.034, 192 0.034 for 0.048; but 224 0.058 for 0.054.
    """
    spared = -(-I // 64) * 64 <= 0.85 * (-(-I // 128) * 128)
    return replace(tile, BLOCK_I=64) if spared and (tile.BLOCK_I, tile.num_warps) == (128, 4) else tile


def capped(tile: Tile, dtype: torch.dtype, D: int, arch: int) -> Tile:
    """The forward's tile, of 128 registers on Hopper, so that four programs share a multiprocessor.

    Nothing spills there, as it would on sm_80. One H200, with a key mask: N=128 with 32 heads 0.078 ms for 0.087, 224
    0.054 for 0.066.
    """
    is_that = (tile.BLOCK_I, tile.BLOCK_J, tile.num_warps) == (128, 32, 4)
    if arch == 90 and _is_narrow(dtype, D) and is_that:
        return CappedTile(**vars(tile), maxnreg=128)
    return tile


def heuristic(kernel: str, dtype: torch.dtype, D: int, precision: str, length: int) -> Tile:
    """The shipped tile for axes of this length, if they are not shorter than it; the kernel as in `tuning.KERNELS`."""
    columns = 32 if D <= 32 else 64 if D <= 64 else 128
    tile = _SHIPPED[kernel][precision if dtype == torch.float32 else "16 bit"][columns]
    lengths, other = _AT_LENGTHS.get((kernel, columns), (range(0), tile))
    return other if dtype != torch.float32 and length in lengths else tile


def dbias_groups(R: int, programs: int, beside_others: bool = False) -> int:
    """Into how many groups of rows dbias is split when one group takes this many programs.

    A group costs a float32 copy of dbias. On an H200 (132 multiprocessors, 2 to 4 programs each) at N=256 six groups
    took 0.075 ms, two 0.141; at N=512 0.452 and 0.570. A GPU that is nearly empty wants more, shorter ones, as does
    one that has dq, dk and dv to do beside them.
    """
    shortest = (8 if beside_others else 16) if programs < 64 else 40
    return max(1, min(R // shortest, -(-(256 if beside_others else 1536) // programs)))


def rows_of_a_group(R: int, programs: int, at_once: int, extra: int, part: float, most: int) -> int:
    """Rows of a group, of which each takes so many programs, such that their last wave is not a short one.

    Counted in the time of a row: `extra` is what a program takes besides its rows, `part` what it takes to add up one
    group more.

    Args:
        at_once: programs that run at a time.
        most: groups there may be.
    """

    def cost(groups: int) -> float:
        return -(-programs * groups // at_once) * (-(-R // groups) + extra) + groups * part

    return -(-R // min(range(1, min(R, most) + 1), key=cost))


def _clip(block: int, length: int) -> int:
    """No longer than the axis needs, and 16 at least, which is the shortest that `tl.dot` takes."""
    return min(block, max(16, 1 << (length - 1).bit_length()))
