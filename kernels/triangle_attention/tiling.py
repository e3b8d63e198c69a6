"""Tile choice for every kernel: shipped heuristics, apart from what the kernels mean.

Every entry was compiled for sm_90 and sm_80: no register is spilled on sm_90 where strides are aligned, and
shared memory stays under the 99 KiB that one program may have on sm_86 and sm_89. Figures beside an entry are
for sm_90: registers a thread, KiB of shared memory, and instructions a logit in the inner loop.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tile:
    """One kernel's tile, named as the kernel's and the compiler's parameters are."""

    BLOCK_I: int
    BLOCK_J: int
    num_warps: int
    num_stages: int


# By how products are made and by columns of a tile. 16 bits and tf32 run on tensor cores, which want 64 rows
# for four warps; ieee float32 keeps both operands in registers, which limits it to small tiles.
_Table = dict[str, dict[int, Tile]]

_FORWARD: _Table = {
    "16 bit": {
        32: Tile(
            64, 64, 4, 3
        ),  # 128 regs, 44 KiB, 15.5; 128 x 64 has 13.7 but half the warps on a multiprocessor
        64: Tile(64, 64, 4, 3),  # 150 regs, 72 KiB, 18.2
        128: Tile(64, 64, 4, 2),  # 226 regs, 88 KiB, 19.0
    },
    "tf32": {
        32: Tile(64, 64, 4, 2),  # 168 regs, 56 KiB, 19.7
        64: Tile(64, 64, 4, 2),  # 198 regs, 96 KiB, 22.2
        128: Tile(32, 64, 4, 2),  # 140 regs, 96 KiB, 43.7; 64 x 32 has 35.7 but takes 104 KiB
    },
    "ieee": {
        32: Tile(64, 32, 4, 2),  # 168 regs, 32 KiB, 92
        64: Tile(32, 32, 4, 2),  # 102 regs, 32 KiB, 181
        128: Tile(64, 32, 8, 2),  # 144 regs, 80 KiB, 331; four warps spill at any tile of 32 x 32 or more
    },
}

_DQ: _Table = {
    "16 bit": {
        32: Tile(64, 64, 4, 2),  # 168 regs, 32 KiB, 14.7
        64: Tile(64, 64, 4, 2),  # 174 regs, 56 KiB, 15.8
        128: Tile(64, 32, 4, 2),  # 186 regs, 68 KiB, 22.0; 64 x 64 takes 104 KiB
    },
    "tf32": {
        32: Tile(64, 64, 4, 2),  # 182 regs, 64 KiB, 18.6
        64: Tile(64, 32, 4, 2),  # 166 regs, 72 KiB, 27.9; 64 x 64 takes 112 KiB
        128: Tile(16, 32, 4, 2),  # 128 regs, 66 KiB, 86; 32 x 32 spills
    },
    "ieee": {
        32: Tile(32, 32, 4, 2),  # 110 regs, 24 KiB, 135
        64: Tile(32, 32, 8, 2),  # 86 regs, 40 KiB, 267; four warps spill
        128: Tile(32, 32, 4, 2),  # 138 regs, 72 KiB, 467
    },
}

_DKDV: _Table = {
    "16 bit": {
        32: Tile(64, 64, 4, 2),  # 168 regs, 26 KiB, 18.4
        64: Tile(64, 64, 4, 2),  # 224 regs, 50 KiB, 19.7
        128: Tile(32, 64, 4, 2),  # 248 regs, 66 KiB, 27.0; 64 x 64 spills
    },
    "tf32": {
        32: Tile(32, 64, 4, 2),  # 155 regs, 36 KiB, 27.9
        64: Tile(32, 64, 4, 2),  # 213 regs, 64 KiB, 33.8
        128: Tile(32, 32, 4, 2),  # 168 regs, 88 KiB, 74.9; 32 x 64 spills
    },
    "ieee": {
        32: Tile(16, 32, 4, 2),  # 88 regs, 16 KiB, 185; 32 x 32 has 176 with 248 regs
        64: Tile(16, 32, 4, 2),  # 132 regs, 28 KiB, 334; 32 x 32 spills
        128: Tile(16, 32, 4, 2),  # 202 regs, 52 KiB, 634
    },
}

_DBIAS: _Table = {
    "16 bit": {
        32: Tile(
            64, 32, 4, 2
        ),  # 126 regs, 24 KiB, 16.1; 64 x 64 has 11.9, with half the programs and 230 regs
        64: Tile(64, 32, 4, 2),  # 151 regs, 48 KiB, 19.2
        128: Tile(64, 32, 4, 2),  # 168 regs, 96 KiB, 25.8
    },
    "tf32": {
        32: Tile(64, 32, 4, 2),  # 144 regs, 48 KiB, 20.1
        64: Tile(64, 32, 4, 2),  # 182 regs, 96 KiB, 27.7
        128: Tile(16, 32, 4, 2),  # 138 regs, 48 KiB, 85; 32 x 32 spills
    },
    "ieee": {
        32: Tile(32, 32, 4, 2),  # 116 regs, 16 KiB, 95
        64: Tile(32, 32, 4, 2),  # 148 regs, 32 KiB, 180
        128: Tile(32, 32, 8, 2),  # 94 regs, 64 KiB, 368
    },
}


# A key tile this short where the rows of the bias are not aligned and every element is loaded through its own
# pointer: 31 instructions a logit at 64 x 32, against 62 and spills at 64 x 64 (forward, D=32, bf16, sm_90).
_UNALIGNED = 32


def forward_tile(dtype: torch.dtype, D: int, I: int, J: int, precision: str) -> Tile:
    """Tile of `_triangle_attention_fwd`; precision is `arguments.dot_precision(dtype)`, here and below."""
    tile = _entry(_FORWARD, dtype, D, precision)
    return _clip(tile if J % 16 == 0 else replace(tile, BLOCK_J=min(tile.BLOCK_J, _UNALIGNED)), I, J)


def dq_tile(dtype: torch.dtype, D: int, I: int, J: int, precision: str) -> Tile:
    """Tile of `_triangle_attention_bwd_dq`."""
    tile = _entry(_DQ, dtype, D, precision)
    return _clip(tile if J % 16 == 0 else replace(tile, BLOCK_J=min(tile.BLOCK_J, _UNALIGNED)), I, J)


def dkdv_tile(dtype: torch.dtype, D: int, I: int, J: int, precision: str) -> Tile:
    """Tile of `_triangle_attention_bwd_dkdv`, which walks the queries and so shortens those."""
    tile = _entry(_DKDV, dtype, D, precision)
    return _clip(tile if J % 16 == 0 else replace(tile, BLOCK_I=min(tile.BLOCK_I, _UNALIGNED)), I, J)


def dbias_tile(dtype: torch.dtype, D: int, I: int, J: int, precision: str) -> Tile:
    """Tile of `_triangle_attention_bwd_dbias`, which loads the bias once."""
    return _clip(_entry(_DBIAS, dtype, D, precision), I, J)


def _entry(table: _Table, dtype: torch.dtype, D: int, precision: str) -> Tile:
    tiles = table[precision if dtype == torch.float32 else "16 bit"]
    return tiles[32 if D <= 32 else 64 if D <= 64 else 128]


def _clip(tile: Tile, I: int, J: int) -> Tile:
    """No longer than an axis needs, and 16 at least, which is the shortest that `tl.dot` takes."""

    def clip(block: int, length: int) -> int:
        return min(block, max(16, 1 << (length - 1).bit_length()))

    return replace(tile, BLOCK_I=clip(tile.BLOCK_I, I), BLOCK_J=clip(tile.BLOCK_J, J))
