"""Tile choice for every kernel: shipped heuristics, apart from what the kernels mean."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """One kernel's tile, named as the kernel's and the compiler's parameters are."""

    BLOCK_I: int
    BLOCK_J: int
    num_warps: int
    num_stages: int


def forward_tile(dtype: torch.dtype, D: int, I: int, J: int) -> Tile:
    return _clip(Tile(64, 64, 4, 2) if dtype != torch.float32 else Tile(32, 32, 4, 2), I, J)


def dq_tile(dtype: torch.dtype, D: int, I: int, J: int) -> Tile:
    return _clip(Tile(64, 64, 4, 2) if dtype != torch.float32 else Tile(32, 32, 4, 2), I, J)


def dkdv_tile(dtype: torch.dtype, D: int, I: int, J: int) -> Tile:
    return _clip(Tile(64, 64, 4, 2) if dtype != torch.float32 else Tile(32, 32, 4, 2), I, J)


def dbias_tile(dtype: torch.dtype, D: int, I: int, J: int) -> Tile:
    return _clip(Tile(64, 64, 4, 2) if dtype != torch.float32 else Tile(32, 32, 4, 2), I, J)


def _clip(tile: Tile, I: int, J: int) -> Tile:
    """No longer than the axis, and 16 at least, which is the shortest that `tl.dot` takes."""

    def shortest(block: int, length: int) -> int:
        return min(block, max(16, 1 << (length - 1).bit_length()))

    return Tile(shortest(tile.BLOCK_I, I), shortest(tile.BLOCK_J, J), tile.num_warps, tile.num_stages)
