"""Which heads and rows the kernels of a backward go through, and key terms in tiles: all that is short, in one launch.

A launch apart for each takes 3 to 7 µs of a GPU that is nearly empty.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.hopper.dbias_passes import leave_tiles_of_keys, list_rows
from trifast_inductor.kernels.triangle_attention.launching import Launch
from trifast_inductor.kernels.triangle_attention.lean.marked import list_marked
from trifast_inductor.kernels.triangle_attention.tiling import Tile

_TILE = Tile(BLOCK_I=1, BLOCK_J=1, num_warps=8, num_stages=1)


@triton.jit(do_not_specialize=["heads", "H", "R", "J", "flags", "tiles"])
def _triangle_attention_bwd_lists(
    huge_ptr,  # [heads, flags], of `query_terms.py`
    spans_ptr,  # [B, R, 2], of `lean/keys.py`
    marked_ptr,  # [2 + 2·heads], of `lean/marked.py`
    flags_ptr,  # [tiles, 2, R], of `query_terms.py`
    summed_ptr,  # [tiles, R + 1]
    walked_ptr,  # [tiles, R + 2]
    key_ptr,
    key_tiles_ptr,  # [B, R, blocks of 128 keys, 8, 32]
    key_bits_ptr,  # [B, blocks of 128 keys, words for 32 rows]
    stride_key_b: tl.int64,
    stride_key_r: tl.int64,
    stride_key_j: tl.int64,
    heads,  # B·R·H
    H,
    R,
    J,
    flags,
    tiles,  # of 128 queries, of each head of each item of the batch
    scale,
    KEY_TERM: tl.constexpr,
    TILED: tl.constexpr,  # for `dbias.py`
    FLAGS: tl.constexpr,  # at least `flags`, a power of two
    HEADS_SEEN: tl.constexpr,  # looked at together
    SEEN: tl.constexpr,  # rows looked at together
):
    program = tl.program_id(0)
    if program == 0:
        list_marked(huge_ptr, spans_ptr, marked_ptr, heads, H, flags, KEY_TERM, FLAGS, HEADS_SEEN)
    elif TILED:
        if program <= tiles:
            list_rows(program - 1, flags_ptr, summed_ptr, walked_ptr, R, SEEN)
        elif KEY_TERM != "none":
            leave_tiles_of_keys(
                program - 1 - tiles,
                key_ptr,
                key_tiles_ptr,
                key_bits_ptr,
                stride_key_b,
                stride_key_r,
                stride_key_j,
                R,
                J,
                scale,
                KEY_TERM,
            )


class OfDbias(NamedTuple):
    """What `dbias.py` takes."""

    summed: Tensor
    walked: Tensor
    key_tiles: Tensor | None
    key_bits: Tensor | None


class Listed(NamedTuple):
    marked: Tensor  # of `lean/marked.py`
    of_dbias: OfDbias | None


class Lists:
    """Makes the lists of calls of one shape and layout; `tiled` where `dbias.py` takes part."""

    def __init__(
        self, B: int, R: int, H: int, I: int, J: int, key: Tensor | None, scale: float, *, tiled: bool
    ) -> None:
        flags, tiles = triton.cdiv(I, 64), B * H * triton.cdiv(I, 128)
        tiles_j, words = triton.cdiv(J, 128), triton.cdiv(R, 32)
        FLAGS = triton.next_power_of_2(flags)
        self._marked_shape = (2 + 2 * B * R * H,)
        self._rows_shapes = ((tiles, R + 1), (tiles, R + 2)) if tiled else None
        # The copy engine takes half a tile more than is used.
        self._keys_shapes = None if key is None else ((B * R * tiles_j * 8, 32), (B, tiles_j, words))
        given = {
            **arguments.strides("key_", key, "brj"),
            "heads": B * R * H,
            "H": H,
            "R": R,
            "J": J,
            "flags": flags,
            "tiles": tiles,
            "scale": scale,
            "KEY_TERM": arguments.key_term(key),
            "TILED": tiled,
            "FLAGS": FLAGS,
            "HEADS_SEEN": max(1, 8192 // FLAGS),
            "SEEN": 1024,
        }
        programs = 1
        if tiled:
            programs += tiles + (0 if key is None else B * tiles_j * words)
        self._make = Launch(_triangle_attention_bwd_lists, programs, given, _TILE)

    def __call__(
        self,
        huge: Tensor,
        spans: Tensor | None,
        flags: Tensor | None,
        key: Tensor | None,
        empty: memory.Empty = memory.empty,
    ) -> Listed:
        """What is for `dbias.py` from `empty`."""
        marked = memory.empty(self._marked_shape, torch.int32, huge)
        of_dbias = None
        if self._rows_shapes is not None:
            tiles = bits = None
            if self._keys_shapes is not None:
                tiles = empty(self._keys_shapes[0], torch.float32, huge)
                bits = empty(self._keys_shapes[1], torch.int32, huge)
            summed, walked = (empty(shape, torch.int32, huge) for shape in self._rows_shapes)
            of_dbias = OfDbias(summed, walked, tiles, bits)
        rows, keys = (of_dbias[:2], of_dbias[2:]) if of_dbias is not None else ((None,) * 2,) * 2
        self._make(huge, spans, marked, flags, *rows, arguments.bytes_of_mask(key), *keys)
        return Listed(marked, of_dbias)
