"""The gradient of the bias for Hopper, in Gluon: warpgroups that hold their sums and share what a loading warp brings.

    dbias[b,h,i,j] = Σ_r p·(dp - δ)     p = exp(x - row_max) / row_sum     dp = ⟨grad_out, v⟩     x as in `logits.py`

**The bias is a factor.** It is the same for all rows r, so

    dbias = exp(bias)·Σ_r exp(scale·⟨q, k⟩ + key term - row_max - log(row_sum))·(dp - δ)

and this kernel, which takes the sum, does not read it: four instructions a logit, one of them the exponential.
`query_terms.py` and `lists.py` make what it reads of the row statistics and the key term; the pass after it, in
`dbias_passes.py`, multiplies by exp(bias), adds the groups of rows in order, and takes the rows and tiles for which the
factors leave float32.

**Sharing.** A program owns 128 queries by 128 keys for its share of the rows, without those that add nothing. Its
partitions, of four warps, keep sums of 64 queries by 64 or 128 keys in registers. One more warp brings q, grad_out, k
and v of a row, its δ and shifts, and its key term, through a ring in shared memory. No atomics: two runs agree to the
bit.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trifast_inductor.kernels.triangle_attention import arguments, memory
from trifast_inductor.kernels.triangle_attention.hopper import choice, dbias_choice
from trifast_inductor.kernels.triangle_attention.hopper import dbias_passes as passes
from trifast_inductor.kernels.triangle_attention.hopper.dbias_choice import Shape, rows_of_a_part, shape_for
from trifast_inductor.kernels.triangle_attention.hopper.descriptors import CopyingLaunch
from trifast_inductor.kernels.triangle_attention.hopper.handing import FLAT, hand, handed
from trifast_inductor.kernels.triangle_attention.hopper.lists import OfDbias
from trifast_inductor.kernels.triangle_attention.hopper.registers import LOG2E, exp2
from trifast_inductor.kernels.triangle_attention.hopper.ring import advance
from trifast_inductor.kernels.triangle_attention.hopper.versions import async_load, barrier

TILE = gl.constexpr(dbias_choice.TILE)


@gluon.jit
def _row(summed_ptr, n, R):
    """The n-th row of those that are summed, and any row for an n past the end."""
    return gl.load(summed_ptr + 1 + gl.minimum(n, R - 1))


@gluon.jit
def _copy(shared, KEY_TERM: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr):
    """The loading warp: rows, as far ahead of the others as there are stages."""
    (
        q_desc, do_desc, k_desc, v_desc, terms_desc, key_desc,
        q_smem, do_smem, k_smem, v_smem, terms_smem, key_smem, masked_smem, full, empty,
        summed_ptr, key_bits_ptr, b, h, first, last, tile_i, tile_j, R, H, tiles_i, tiles_j, words,
    ) = shared  # fmt: skip
    if KEY_TERM != "none":
        key_bits_ptr += (b * tiles_j + tile_j) * words
    slot = 0
    phase = 1
    # What is read of memory for a row is asked for a row earlier.
    r = _row(summed_ptr, first, R)
    next_r = _row(summed_ptr, first + 1, R)
    bits = 0
    if KEY_TERM != "none":
        bits = gl.load(key_bits_ptr + (r >> 5), mask=first < last, other=0)
    for n in range(first, last):
        row_after = _row(summed_ptr, n + 2, R)
        mbarrier.wait(empty.index(slot), phase)
        bar = full.index(slot)
        if KEY_TERM != "none":
            hand(masked_smem.index(slot), bits >> (r & 31) & 1)
            barrier()
            bits = gl.load(key_bits_ptr + (next_r >> 5), mask=n + 1 < last, other=0)
        mbarrier.expect(bar, 4 * 2 * TILE * D + (1024 if KEY_TERM == "none" else 2048))
        i_at = [b, r, tile_i * TILE, h, 0]
        j_at = [b, r, tile_j * TILE, h, 0]
        async_load(q_desc, i_at, bar, q_smem.index(slot))
        async_load(k_desc, j_at, bar, k_smem.index(slot))
        async_load(terms_desc, [(((b * R + r) * H + h) * tiles_i + tile_i) * 8, 0], bar, terms_smem.index(slot))
        if KEY_TERM != "none":
            async_load(key_desc, [((b * R + r) * tiles_j + tile_j) * 8, 0], bar, key_smem.index(slot))
        async_load(do_desc, i_at, bar, do_smem.index(slot))
        async_load(v_desc, j_at, bar, v_smem.index(slot))
        r = next_r
        next_r = row_after
        slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _load_terms(smem, M: gl.constexpr, X: gl.constexpr):
    """(shift, δ) of a partition's queries, as `dbias_passes` stored them: 16 bytes a thread."""
    ROWS: gl.constexpr = gl.SliceLayout(1, X)
    STORED: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [4, 0]], [[0, 0], [0, 0], [0, 4], [0, 8], [0, 16]], [[1, 0], [2, 0]], [], [8, 32]
    )
    # [partition, warp, lane // 4, (shift, δ), (i, i + 8)]; what is loaded for the other partition is dropped.
    terms = smem.load(STORED).reshape([2, 4, 8, 2, 2]).permute([1, 4, 2, 3, 0]).reshape([64, 2, 2])
    of_first, of_second = terms.split()
    shift, delta = (of_second if M else of_first).split()
    return gl.convert_layout(shift, ROWS, assert_trivial=True), gl.convert_layout(delta, ROWS, assert_trivial=True)


@gluon.jit
def _load_key(smem, n: gl.constexpr, X: gl.constexpr):
    """The key term of the n-th columns, in units of ⟨q, k⟩: 16 bytes a thread at a time."""
    COLUMNS: gl.constexpr = X.instr_shape[1]
    # Lanes that differ in their last two bits hold different pairs of columns. Half of the tile is not used.
    STORED: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [2, 0], [4, 0]],
        [[0, 16], [1, 0], [0, 0], [0, 0], [0, 0]],
        [[0, 0], [0, 0]],
        [],
        [8, 32],
    )
    key = smem.load(STORED).reshape([2, 2, 4, 8, 2]).permute([1, 3, 2, 4, 0])  # [half, 8, lane % 4, pair, unused]
    key, _ = key.split()
    if COLUMNS == 64:
        first, second = key.permute([1, 2, 3, 0]).split()
        key = second if n else first
    return gl.expand_dims(gl.convert_layout(key.reshape([COLUMNS]), gl.SliceLayout(0, X), assert_trivial=True), 0)


@gluon.jit
def _product(a, b, m: gl.constexpr, n: gl.constexpr, X: gl.constexpr):
    """a·bᵀ of 64 queries and some keys, under way."""
    COLUMNS: gl.constexpr = X.instr_shape[1]
    a = a.reshape([TILE, a.shape[4]]).slice(64 * m, 64)
    b = b.reshape([TILE, b.shape[4]]).slice(COLUMNS * n, COLUMNS).permute((1, 0))
    return warpgroup_mma(a, b, gl.zeros([64, COLUMNS], gl.float32, X), use_acc=False, is_async=True)


@gluon.jit
def _probabilities(x, shift, factor, key_smem, masked, n: gl.constexpr, KEY_TERM: gl.constexpr):
    X: gl.constexpr = x.type.layout
    if KEY_TERM != "none" and masked != 0:
        key = _load_key(key_smem, n, X)
        # Of two numbers, of which one is NaN, the other is taken.
        x = x + key if KEY_TERM == "add" else gl.minimum(x, key)
    return exp2(x * factor - gl.expand_dims(shift, 1))


@gluon.jit
def _sum_rows(
    shared,
    WHICH: gl.constexpr,  # of the partitions
    COLUMNS: gl.constexpr,
    HALVES: gl.constexpr,
    STAGES: gl.constexpr,
    KEY_TERM: gl.constexpr,
):
    """64 queries by COLUMNS keys (twice as many in two HALVES), over the rows of the program."""
    (
        q_smem, do_smem, k_smem, v_smem, terms_smem, key_smem, masked_smem, full, empty,
        parts_ptr, b, h, part, rows, tile_i, tile_j, B, H, I, J, scale,
    ) = shared  # fmt: skip
    M: gl.constexpr = WHICH % 2
    N: gl.constexpr = WHICH // 2
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    factor = scale * LOG2E
    masked = 0
    key = terms_smem.index(0)

    acc = gl.zeros([64, COLUMNS], gl.float32, X)
    later_acc = gl.zeros([64, COLUMNS], gl.float32, X)
    slot = 0
    phase = 0
    for _ in range(rows):
        mbarrier.wait(full.index(slot), phase)
        x = _product(q_smem.index(slot), k_smem.index(slot), M, N * HALVES, X)
        dp = _product(do_smem.index(slot), v_smem.index(slot), M, N * HALVES, X)
        if HALVES == 2:
            later_x = _product(q_smem.index(slot), k_smem.index(slot), M, N * HALVES + 1, X)
            later_dp = _product(do_smem.index(slot), v_smem.index(slot), M, N * HALVES + 1, X)
        if KEY_TERM != "none":
            masked = handed(masked_smem.index(slot), 4)
            key = key_smem.index(slot)
        shift, delta = _load_terms(terms_smem.index(slot), M, X)
        x = warpgroup_mma_wait(2 * HALVES - 1, deps=(x,))
        p = _probabilities(x, shift, factor, key, masked, N * HALVES, KEY_TERM)
        dp = warpgroup_mma_wait(2 * HALVES - 2, deps=(dp,))
        acc = acc + p * (dp - gl.expand_dims(delta, 1))
        if HALVES == 2:
            later_x, later_dp = warpgroup_mma_wait(0, deps=(later_x, later_dp))
            p = _probabilities(later_x, shift, factor, key, masked, N * HALVES + 1, KEY_TERM)
            later_acc = later_acc + p * (later_dp - gl.expand_dims(delta, 1))
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = advance(slot, phase, STAGES)

    i = tile_i * TILE + 64 * M + gl.arange(0, 64, layout=gl.SliceLayout(1, X))
    j = tile_j * TILE + COLUMNS * N + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, X))
    ptrs = parts_ptr + ((part * B + b) * H + h).to(gl.int64) * I * J + gl.expand_dims(i.to(gl.int64) * J, 1)
    i_in_range = gl.expand_dims(i < I, 1)
    gl.store(ptrs + gl.expand_dims(j, 0), acc, mask=i_in_range & gl.expand_dims(j < J, 0))
    if HALVES == 2:
        j += COLUMNS
        gl.store(ptrs + gl.expand_dims(j, 0), later_acc, mask=i_in_range & gl.expand_dims(j < J, 0))


# Compiled once for all lengths.
@gluon.jit(do_not_specialize=["B", "R", "H", "I", "J", "parts", "tiles_i", "tiles_j", "words"])
def _triangle_attention_bwd_dbias_hopper(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    terms_desc,  # of `query_terms.py`
    key_desc,  # of `lists.py`
    summed_ptr,  # of `lists.py`
    key_bits_ptr,  # of `lists.py`
    parts_ptr,  # [parts, B, H, I, J] contiguous, float32: the sums over groups of rows, not yet times exp(bias)
    B,
    R,
    H,
    I,
    J,
    parts,  # into which the rows are shared out
    tiles_i,
    tiles_j,
    words,  # of bits, for 32 rows each
    scale,
    D: gl.constexpr,
    KEY_TERM: gl.constexpr,
    COLUMNS: gl.constexpr,
    HALVES: gl.constexpr,  # 2: products of later columns run on under the exponentials of the first
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    gl.static_assert(COLUMNS * HALVES == 64 or COLUMNS * HALVES == 128, "half of the keys to a partition, or all")
    COUNT: gl.constexpr = 256 // (COLUMNS * HALVES)  # of partitions
    # Keys innermost: neighbours share the queries of a row.
    tile = gl.program_id(0)
    tile_j = tile % tiles_j
    tile_i = tile // tiles_j % tiles_i
    head = tile // (tiles_j * tiles_i)
    h = head % H
    b = head // H % B
    part = head // H // B
    summed_ptr += ((b * H + h) * tiles_i + tile_i) * (R + 1)
    summed = gl.load(summed_ptr)
    first = summed * part // parts
    last = summed * (part + 1) // parts

    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, 1, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, 1, D], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, TILE, 1, D], v_desc.layout)
    terms_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 8, 32], terms_desc.layout)
    key_smem = terms_smem
    masked_smem = terms_smem
    if KEY_TERM != "none":
        key_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 8, 32], key_desc.layout)
        masked_smem = gl.allocate_shared_memory(gl.int32, [STAGES, 1], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=COUNT)
    fence_async_shared()
    barrier()
    to_copy = (
        q_desc, do_desc, k_desc, v_desc, terms_desc, key_desc,
        q_smem, do_smem, k_smem, v_smem, terms_smem, key_smem, masked_smem, full, empty,
        summed_ptr, key_bits_ptr, b, h, first, last, tile_i, tile_j, R, H, tiles_i, tiles_j, words,
    )  # fmt: skip
    to_sum = (
        q_smem, do_smem, k_smem, v_smem, terms_smem, key_smem, masked_smem, full, empty,
        parts_ptr, b, h, part, last - first, tile_i, tile_j, B, H, I, J, scale,
    )  # fmt: skip
    if COUNT == 2:
        gl.warp_specialize([
            (_sum_rows, (to_sum, 0, COLUMNS, HALVES, STAGES, KEY_TERM)),
            (_sum_rows, (to_sum, 1, COLUMNS, HALVES, STAGES, KEY_TERM)),
            (_copy, (to_copy, KEY_TERM, STAGES, D)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_sum_rows, (to_sum, 0, COLUMNS, HALVES, STAGES, KEY_TERM)),
            (_sum_rows, (to_sum, 1, COLUMNS, HALVES, STAGES, KEY_TERM)),
            (_sum_rows, (to_sum, 2, COLUMNS, HALVES, STAGES, KEY_TERM)),
            (_sum_rows, (to_sum, 3, COLUMNS, HALVES, STAGES, KEY_TERM)),
            (_copy, (to_copy, KEY_TERM, STAGES, D)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 32])  # fmt: skip


class Plan:
    """dbias `[B, H, I, J]` in the dtype of the bias, contiguous, of calls that `dbias_choice.refusal` lets through."""

    def __init__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
        shape: Shape | None = None,
    ) -> None:
        B, R, I, H, D = q.shape
        J = k.shape[2]
        shape = shape or shape_for(D)
        shared = arguments.shared(q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first)
        tiles_i, tiles_j = (triton.cdiv(length, dbias_choice.TILE) for length in (I, J))
        tiles = B * H * tiles_i * tiles_j
        group = rows_of_a_part(R, tiles, choice.multiprocessors(q.get_device()))
        parts = triton.cdiv(R, group)
        self._parts_shape = (parts, B, H, I, J)
        given = {
            **shared,
            "B": B,
            "parts": parts,
            "tiles_i": tiles_i,
            "tiles_j": tiles_j,
            "words": triton.cdiv(R, 32),
            **vars(shape),
            "REGISTERS": shape.REGISTERS,
        }
        rows_of_tile = (1, 1, dbias_choice.TILE, 1, D)
        boxes: dict[str, tuple[int, ...]] = {f"{name}_desc": rows_of_tile for name in ("q", "do", "k", "v")}
        boxes |= {"terms_desc": (8, 32), "key_desc": (8, 32)}
        self._sum_rows = CopyingLaunch(_triangle_attention_bwd_dbias_hopper, parts * tiles, given, 4, boxes)
        self._finish = passes.Finish(grad_out, q, k, v, bias, parts, shared)

    def __call__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        key: Tensor | None,
        row_max: Tensor,
        row_sum: Tensor,
        terms: Tensor,
        row_tiles: Tensor,
        listed: OfDbias,
        empty: memory.Empty = memory.empty,
    ) -> Tensor:
        """
        Args:
            key: the key term, or the mask.
            terms: `[B, R, H, I, 2]`, float32, contiguous: log2(e)·row maximum + log2 of the row sum, and δ, as
                `lean/operands.py` leaves them.
            row_tiles: of `query_terms.py`.
            empty: makes what is wanted here alone.
        """
        key = arguments.bytes_of_mask(key)
        parts = empty(self._parts_shape, torch.float32, q)
        self._sum_rows(q, grad_out, k, v, row_tiles, listed.key_tiles, listed.summed, listed.key_bits, parts)
        return self._finish(grad_out, q, k, v, bias, key, row_max, row_sum, terms, listed.walked, parts)
