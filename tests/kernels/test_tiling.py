"""Tile choice: what the kernels need of a tile, whatever the shape."""

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import tiling, tuning


@pytest.mark.parametrize("kernel", tuning.KERNELS)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float32, "ieee"),
        (torch.float32, "tf32"),
        (torch.float32, "3xtf32"),
        (torch.bfloat16, "ieee"),
        (torch.bfloat16, "upcast"),
    ],
)
@pytest.mark.parametrize("D", [1, 8, 32, 33, 64, 65, 96, 128])
def test_blocks_suit_a_dot_and_the_lengths(kernel, dtype, precision, D):
    if precision == "3xtf32" and D > 64:
        pytest.skip("not used: see arguments.dot_precision")
    for I, J in ((1, 1), (17, 300), (300, 17), (64, 64), (4096, 4096)):
        tile = tiling.choose(kernel, dtype, D, I, J, precision)
        for block, length in ((tile.BLOCK_I, I), (tile.BLOCK_J, J)):
            assert block >= 16
            assert block & (block - 1) == 0
            assert block < 2 * max(16, length)


def test_few_tiles_of_dbias_are_split_over_rows():
    assert tiling.dbias_groups(R=256, programs=2048) == 1
    assert tiling.dbias_groups(R=256, programs=128) > 1
    # 16 rows to a group at least, and one group however few there are.
    assert tiling.dbias_groups(R=64, programs=1) == 4
    assert tiling.dbias_groups(R=1, programs=1) == 1


@pytest.mark.parametrize(
    ("I", "BLOCK_I"),
    [(64, 64), (96, 128), (128, 128), (129, 64), (192, 64), (193, 128), (320, 64), (448, 128), (4096, 128)],
)
def test_the_forward_has_no_tile_that_is_mostly_padding(I, BLOCK_I):
    tile = tiling.choose("forward", torch.bfloat16, 32, I, 4096, "ieee")
    assert tile.BLOCK_I == BLOCK_I
    # On Hopper four programs of the longer ones share a multiprocessor; elsewhere a cap would spill.
    assert getattr(tiling.capped(tile, torch.bfloat16, 32, 90), "maxnreg", None) == (128 if BLOCK_I == 128 else None)
    assert tiling.capped(tile, torch.bfloat16, 32, 80) is tile
    assert tiling.capped(tile, torch.bfloat16, 64, 90) is tile
