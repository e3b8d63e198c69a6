"""dq, dk and dv for Hopper in one pass, in Gluon: five products and one exponential a logit.

    p = exp(x - row_max) / row_sum     ds = p·(⟨grad_out, v⟩ - δ)     x as in `logits.py`
    dv = pᵀ·grad_out     dk = scale·dsᵀ·q     dq = scale·ds·k

**Roles.** A program works on a row r and two blocks of 64 keys at a time, a partition of four warps for each block,
which keeps its dk and dv in registers, up to D=32 k and v too, and walks the queries, 64 at a time. Tiles of logits are
`[j, i]`: p and ds are left operands of dv and dk as they come, in registers, and only ds goes to shared memory, where a
partition of its own multiplies it with k. What that gives of dq lacks the keys of the other passes of the program; it
adds them up in a slice of float32 that no other program touches, so there are no atomics and two runs agree to the bit.
One more warp copies what all of them read.

**Order.** While exponentials are taken, ⟨grad_out, v⟩ is under way; while ds is stored, dv and the next logits are;
while dk is, the next words of the bias are loaded. A product that begins anew is given the registers of the tile before
it: zeros of its own would have ptxas wait after every product.

**Terms of a query.** What is subtracted from the logits and from ⟨grad_out, v⟩ would be two additions a logit, and
differs from column to column of a tile. It is summed by the products instead: with 16 more columns, of which the left
operand has ones, and the copying warp writes -L / (scale·log2(e)) and -δ of each query, in three bfloat16 each, which
is all 24 bits. The key term goes the same way, the other way round.

    columns of a query     0, 2, 4: -L / (scale·log2(e))     1, 3, 5: -δ     6 to 8: 1     9 to 15: 0

Where this is not sound the head of the row is marked: it is left out here, and `lean/marked.py` does it.
Source of the roles: Shah et al. 2024 (FlashAttention-3), section 3.
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
from trifast_inductor.kernels.triangle_attention.hopper import choice, dqkv_choice
from trifast_inductor.kernels.triangle_attention.hopper.descriptors import CopyingLaunch
from trifast_inductor.kernels.triangle_attention.hopper.registers import LOG2E, exp2, unpacked_tile
from trifast_inductor.kernels.triangle_attention.hopper.ring import advance
from trifast_inductor.kernels.triangle_attention.hopper.versions import async_load, barrier, reinterpret

SIDE = gl.constexpr(64)  # queries, and keys, of a tile
BLOCKS = gl.constexpr(2)  # of keys, a partition each
# Of a key that is left out, in units of ⟨q, k⟩: no query that is not marked has a logit that could answer it.
LEFT_OUT = gl.constexpr(-1e30)


@gluon.jit
def _item(listed_ptr, n, items, heads):
    """The n-th head of a row to do, and the last one for any n past the end."""
    # With none to do, this reads the last place of the list and the loop is empty.
    return gl.load(listed_ptr + heads + 1 - gl.maximum(gl.minimum(n, items - 1), 0))


@gluon.jit
def _place(item, R, H):
    """Heads innermost: those of a row lie side by side in memory."""
    return item // (R * H), item // H % R, item % H


@gluon.jit
def _in_three(x):
    """x as the sum of three bfloat16."""
    high = x.to(gl.bfloat16)
    rest = x - high.to(gl.float32)
    middle = rest.to(gl.bfloat16)
    return high, middle, (rest - middle.to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def _side_by_side(a, b):
    """The upper halves of two float32, which are bfloat16, in one word."""
    upper = b.to(gl.int32, bitcast=True) & -65536
    return ((a.to(gl.int32, bitcast=True) >> 16) & 0xFFFF) | upper


@gluon.jit
def _after_cut(x):
    """What the upper half of a float32 leaves of it."""
    return x - (x.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _load_terms(terms_ptr, head, tile, I):
    """L and δ of 64 queries, side by side; 0 past the end."""
    place = gl.arange(0, 2 * SIDE, layout=gl.BlockedLayout([4], [32], [1], [0]))
    first = tile * SIDE
    return gl.load(terms_ptr + 2 * (head.to(gl.int64) * I + first) + place, mask=place < 2 * (I - first), other=0.0)


@gluon.jit
def _leave_terms(smem, pairs, per_unit):
    """A thread writes two queries, without a word from another; numbers are cut off after eight bits, not rounded."""
    WORDS: gl.constexpr = gl.BlockedLayout([2, 8], [32, 1], [1, 1], [1, 0])
    logsum, delta = pairs.reshape([SIDE, 2]).split()
    shift = logsum * per_unit
    minus_delta = -delta
    high = _side_by_side(shift, minus_delta)
    shift, minus_delta = _after_cut(shift), _after_cut(minus_delta)
    middle = _side_by_side(shift, minus_delta)
    low = _side_by_side(_after_cut(shift), _after_cut(minus_delta))
    ones = gl.full([SIDE], 0x3F803F80, gl.int32, low.type.layout)
    first = gl.join(gl.join(high, middle), gl.join(low, ones)).permute([0, 2, 1]).reshape([SIDE, 4])
    word = gl.expand_dims(gl.arange(0, 4, layout=gl.SliceLayout(0, first.type.layout)), 0)
    last = gl.where(word == 0, gl.full([SIDE, 4], 0x3F80, gl.int32, first.type.layout), 0)
    words = gl.join(first, last).permute([0, 2, 1]).reshape([SIDE, 8])
    smem = reinterpret(smem, gl.int32, [SIDE, 8], gl.NVMMASharedLayout(32, 32, rank=2))
    smem.store(gl.convert_layout(words, WORDS, assert_trivial=True))  # handed over by full


@gluon.jit
def _copy(shared, STAGES: gl.constexpr, KV_STAGES: gl.constexpr, D: gl.constexpr):
    """The loading warp: keys of an item, and its queries tile by tile, as far ahead of the others as there is room."""
    (
        q_desc, do_desc, k_desc, v_desc, words_desc, q_smem, do_smem, k_smem, v_smem, terms_smem, words_smem, full,
        empty, kv_full, kv_empty, terms_ptr, listed_ptr, R, H, I, tiles_i, tiles_j, groups_j, items, heads, scale,
    ) = shared  # fmt: skip
    per_unit = -1 / (scale * LOG2E)
    slot = 0
    phase = 1
    kv_slot = 0
    kv_phase = 1
    after = _item(listed_ptr, gl.program_id(0), items, heads)
    for turn in range(gl.program_id(0), items, gl.num_programs(0)):
        item = after
        after = _item(listed_ptr, turn + gl.num_programs(0), items, heads)
        b, r, h = _place(item, R, H)
        pairs = _load_terms(terms_ptr, item, 0, I)
        for group in range(groups_j):
            mbarrier.wait(kv_empty.index(kv_slot), kv_phase)
            bar = kv_full.index(kv_slot)
            mbarrier.expect(bar, 2 * 2 * BLOCKS * SIDE * D)
            for n in gl.static_range(BLOCKS):
                keys = [b, r, (group * BLOCKS + n) * SIDE, h, 0]
                async_load(k_desc, keys, bar, k_smem.index(kv_slot * BLOCKS + n))
                async_load(v_desc, keys, bar, v_smem.index(kv_slot * BLOCKS + n))
            kv_slot, kv_phase = advance(kv_slot, kv_phase, KV_STAGES)
            for tile in range(tiles_i):
                mbarrier.wait(empty.index(slot), phase)
                bar = full.index(slot)
                mbarrier.expect(bar, SIDE * 2 * 2 * D + BLOCKS * 2 * SIDE * SIDE)
                queries = [b, r, tile * SIDE, h, 0]
                async_load(q_desc, queries, bar, q_smem.index(slot))
                async_load(do_desc, queries, bar, do_smem.index(slot))
                for n in gl.static_range(BLOCKS):
                    # A block past the end reads the last one; all its keys are left out.
                    block = (b * H + h) * tiles_j + gl.minimum(group * BLOCKS + n, tiles_j - 1)
                    square = (block * tiles_i + tile) * SIDE
                    async_load(words_desc, [square, 0], bar, words_smem.index(slot * BLOCKS + n))
                _leave_terms(terms_smem.index(slot), pairs, per_unit)
                fence_async_shared()
                mbarrier.arrive(bar, count=1)
                # Of the next tile, which is the first one again after the last.
                pairs = _load_terms(terms_ptr, item, (tile + 1) % tiles_i, I)
                slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _left_of_logits(key, LAYOUT: gl.constexpr):
    """Ones for the three parts of -shift, and the key term in three parts for ones of the right operand."""
    column = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, LAYOUT)), 0)
    high, middle, low = _in_three(key)
    zero = gl.zeros([SIDE, 16], gl.bfloat16, LAYOUT)
    left = gl.where((column < 6) & (column % 2 == 0), zero + 1.0, zero)
    left = gl.where(column == 6, gl.expand_dims(high, 1), left)
    left = gl.where(column == 7, gl.expand_dims(middle, 1), left)
    return gl.where(column == 8, gl.expand_dims(low, 1), left)


@gluon.jit
def _left_of_dp(LAYOUT: gl.constexpr):
    """Ones for the three parts of -δ."""
    column = gl.expand_dims(gl.arange(0, 16, layout=gl.SliceLayout(0, LAYOUT)), 0)
    zero = gl.zeros([SIDE, 16], gl.bfloat16, LAYOUT)
    return gl.where((column < 6) & (column % 2 == 1), zero + 1.0, zero)


@gluon.jit
def _product(left, terms, a, b, before):
    """a·bᵀ and the terms, under way, in the registers of what was before."""
    x = warpgroup_mma(left, terms.permute((1, 0)), before, use_acc=False, is_async=True)
    return warpgroup_mma(a, b.permute((1, 0)), x, is_async=True)


@gluon.jit
def _walk(
    shared,
    WHICH: gl.constexpr,  # of the blocks
    STAGES: gl.constexpr,
    KV_STAGES: gl.constexpr,
    DS_STAGES: gl.constexpr,
    KEY_TERM: gl.constexpr,
    KEYS_STAY: gl.constexpr,
    D: gl.constexpr,
):
    """dk and dv of one block of keys of one row, for each group of keys of each item of the program."""
    (
        q_smem, do_smem, k_smem, v_smem, terms_smem, words_smem, ds_smem, left_smem, full, empty, kv_full, kv_empty,
        ds_full, ds_empty, listed_ptr, key_ptr, dk_ptr, dv_ptr, stride_key_b, stride_key_r, stride_key_j, R, H, J,
        tiles_i, groups_j, items, heads, scale,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = q_smem.dtype
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0])
    OF_OUT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    factor = scale * LOG2E
    OF_X: gl.constexpr = gl.DotOperandLayout(0, X, 2)
    left_smem_of_logits = left_smem.index(WHICH)
    left_smem.index(BLOCKS + WHICH).store(_left_of_dp(LEFT))
    barrier()
    left_of_dp = left_smem.index(BLOCKS + WHICH).load(OF_X)

    slot = 0
    phase = 0
    kv_slot = 0
    kv_phase = 0
    ds_slot = 0
    ds_phase = 1
    after = _item(listed_ptr, gl.program_id(0), items, heads)
    for turn in range(gl.program_id(0), items, gl.num_programs(0)):
        b, r, h = _place(after, R, H)
        after = _item(listed_ptr, turn + gl.num_programs(0), items, heads)
        for group in range(groups_j):
            j = (group * BLOCKS + WHICH) * SIDE + gl.arange(0, SIDE, layout=gl.SliceLayout(1, LEFT))
            key = gl.zeros([SIDE], gl.float32, gl.SliceLayout(1, LEFT))
            if KEY_TERM != "none":
                key_row = key_ptr + b.to(gl.int64) * stride_key_b + r.to(gl.int64) * stride_key_r
                term = gl.load(key_row + j.to(gl.int64) * stride_key_j, mask=j < J, other=0)
                if KEY_TERM == "add":
                    key = gl.maximum(term.to(gl.float32) / scale, LEFT_OUT)
                else:
                    key = gl.where(term != 0, LEFT_OUT, key)
            barrier()
            left_smem_of_logits.store(_left_of_logits(gl.where(j < J, key, LEFT_OUT), LEFT))
            barrier()
            left_of_logits = left_smem_of_logits.load(OF_X)

            mbarrier.wait(kv_full.index(kv_slot), kv_phase)
            k = k_smem.index(kv_slot * BLOCKS + WHICH).reshape([SIDE, D])
            v = v_smem.index(kv_slot * BLOCKS + WHICH).reshape([SIDE, D])
            if KEYS_STAY:
                k = k.load(OF_X)
                v = v.load(OF_X)
            mbarrier.wait(full.index(slot), phase)
            words = words_smem.index(slot * BLOCKS + WHICH).load(WORDS)
            x = _product(
                left_of_logits,
                terms_smem.index(slot),
                k,
                q_smem.index(slot).reshape([SIDE, D]),
                gl.zeros([SIDE, SIDE], gl.float32, X),
            )
            x = warpgroup_mma_wait(0, deps=(x,))
            dp = gl.zeros([SIDE, SIDE], gl.float32, X)
            dk = gl.zeros([SIDE, D], gl.float32, OUT)
            dv = gl.zeros([SIDE, D], gl.float32, OUT)
            for tile in range(tiles_i):
                here = slot + 0  # a value of its own: Triton would carry `slot` for both
                do = do_smem.index(here).reshape([SIDE, D])
                q = q_smem.index(here).reshape([SIDE, D])
                dp = _product(left_of_dp, terms_smem.index(here), v, do, dp)
                p32 = exp2(unpacked_tile(words, dtype, X) * LOG2E + x * factor)
                p = gl.convert_layout(p32.to(dtype), OF_OUT)
                slot, phase = advance(slot, phase, STAGES)
                # The logits of the next tile; those after the last are not used.
                mbarrier.wait(full.index(slot), phase, pred=tile + 1 < tiles_i)
                dv = warpgroup_mma(p, do, dv, is_async=True)
                x = _product(
                    left_of_logits,
                    terms_smem.index(slot),
                    k,
                    q_smem.index(slot).reshape([SIDE, D]),
                    x,
                )
                dp = warpgroup_mma_wait(3, deps=(dp,))
                ds = (p32 * dp).to(dtype)
                mbarrier.wait(ds_empty.index(ds_slot), ds_phase)
                ds_smem.index(ds_slot * BLOCKS + WHICH).store(ds)
                fence_async_shared()
                mbarrier.arrive(ds_full.index(ds_slot), count=1)
                ds_slot, ds_phase = advance(ds_slot, ds_phase, DS_STAGES)
                dk = warpgroup_mma(gl.convert_layout(ds, OF_OUT), q, dk, is_async=True)
                words = words_smem.index(slot * BLOCKS + WHICH).load(WORDS)
                dv, dk, x = warpgroup_mma_wait(0, deps=(dv, dk, x))
                mbarrier.arrive(empty.index(here), count=1)
            mbarrier.arrive(kv_empty.index(kv_slot), count=1)
            kv_slot, kv_phase = advance(kv_slot, kv_phase, KV_STAGES)

            j = (group * BLOCKS + WHICH) * SIDE + gl.arange(0, SIDE, layout=gl.SliceLayout(1, OUT))
            d = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
            offsets = (b * R + r).to(gl.int64) * J * H * D + h * D
            offsets = offsets + gl.expand_dims(j * (H * D), 1) + gl.expand_dims(d, 0)
            in_range = gl.expand_dims(j < J, 1)
            gl.store(dk_ptr + offsets, (dk * scale).to(dtype), mask=in_range)
            gl.store(dv_ptr + offsets, dv.to(dtype), mask=in_range)


@gluon.jit
def _sum_dq(shared, KV_STAGES: gl.constexpr, DS_STAGES: gl.constexpr, D: gl.constexpr):
    """dq of 64 queries from the ds of both blocks; over groups of keys in the program's own slice.

    A thread reads only what it wrote itself, side by side, so a sum needs no barrier and is loaded before its ds is
    there.
    """
    (
        k_smem, ds_smem, kv_full, kv_empty, ds_full, ds_empty, listed_ptr, sums_ptr, dq_ptr, R, H, I, tiles_i, groups_j,
        items, heads, scale,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = k_smem.dtype
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    IN_ORDER: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    of_tile = gl.arange(0, SIDE, layout=gl.SliceLayout(1, OUT))
    d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, OUT)), 0)
    sums_ptr += gl.program_id(0).to(gl.int64) * (tiles_i * SIDE * D)
    sums_ptrs = sums_ptr + gl.arange(0, SIDE * D, layout=IN_ORDER)
    kv_slot = 0
    kv_phase = 0
    ds_slot = 0
    ds_phase = 0
    for turn in range(gl.program_id(0), items, gl.num_programs(0)):
        b, r, h = _place(_item(listed_ptr, turn, items, heads), R, H)
        for group in range(groups_j):
            mbarrier.wait(kv_full.index(kv_slot), kv_phase)
            for tile in range(tiles_i):
                before = gl.zeros([SIDE, D], gl.float32, OUT)
                if group > 0:
                    x = gl.load(sums_ptrs + tile * (SIDE * D)).reshape([D // 8, 4, 8, 4, 2, 2])
                    x = x.permute([1, 4, 2, 0, 3, 5]).reshape([SIDE, D])
                    before = gl.convert_layout(x, OUT, assert_trivial=True)
                mbarrier.wait(ds_full.index(ds_slot), ds_phase)
                dq = gl.zeros([SIDE, D], gl.float32, OUT)
                for n in gl.static_range(BLOCKS):
                    ds = ds_smem.index(ds_slot * BLOCKS + n).permute((1, 0))
                    k = k_smem.index(kv_slot * BLOCKS + n).reshape([SIDE, D])
                    dq = warpgroup_mma(ds, k, dq, use_acc=n > 0, is_async=True)
                dq = warpgroup_mma_wait(0, deps=(dq,))
                mbarrier.arrive(ds_empty.index(ds_slot), count=1)
                ds_slot, ds_phase = advance(ds_slot, ds_phase, DS_STAGES)
                dq = dq + before
                if group < groups_j - 1:
                    x = dq.reshape([4, 2, 8, D // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([SIDE * D])
                    gl.store(sums_ptrs + tile * (SIDE * D), gl.convert_layout(x, IN_ORDER, assert_trivial=True))
                else:
                    i = tile * SIDE + of_tile
                    offsets = (b * R + r).to(gl.int64) * I * H * D + h * D + gl.expand_dims(i * (H * D), 1) + d
                    gl.store(dq_ptr + offsets, (dq * scale).to(dtype), mask=gl.expand_dims(i < I, 1))
            mbarrier.arrive(kv_empty.index(kv_slot), count=1)
            kv_slot, kv_phase = advance(kv_slot, kv_phase, KV_STAGES)


# Compiled once for all lengths.
@gluon.jit(do_not_specialize=["R", "H", "I", "J", "tiles_i", "tiles_j", "groups_j", "heads"])
def _triangle_attention_bwd_dqkv_hopper(
    q_desc,
    do_desc,
    k_desc,
    v_desc,
    words_desc,  # of `lean/words.py`, [j, i]
    terms_ptr,  # [B, R, H, I, 2] contiguous: L and δ
    listed_ptr,  # of `lean/marked.py`: which heads are marked, and left out here
    key_ptr,
    sums_ptr,  # [programs, blocks of queries, 64, D] contiguous, float32; not read before it is written
    dq_ptr,  # [B, R, I, H, D] contiguous
    dk_ptr,  # [B, R, J, H, D] contiguous
    dv_ptr,  # [B, R, J, H, D] contiguous
    stride_key_b,
    stride_key_r,
    stride_key_j,
    R,
    H,
    I,
    J,
    tiles_i,  # of 64 queries
    tiles_j,  # of 64 keys
    groups_j,  # of BLOCKS tiles of keys
    heads,  # B·R·H
    scale,
    D: gl.constexpr,
    KEY_TERM: gl.constexpr,
    STAGES: gl.constexpr,
    KV_STAGES: gl.constexpr,
    DS_STAGES: gl.constexpr,
    KEYS_STAY: gl.constexpr,
    REGISTERS: gl.constexpr,
    DQ_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    items = heads - gl.load(listed_ptr)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, SIDE, 1, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, SIDE, 1, D], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [KV_STAGES * BLOCKS, 1, 1, SIDE, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [KV_STAGES * BLOCKS, 1, 1, SIDE, 1, D], v_desc.layout)
    words_smem = gl.allocate_shared_memory(gl.int32, [STAGES * BLOCKS, SIDE, SIDE // 2], words_desc.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    ds_smem = gl.allocate_shared_memory(dtype, [DS_STAGES * BLOCKS, SIDE, SIDE], DS)
    TERMS: gl.constexpr = gl.NVMMASharedLayout(32, 16, rank=2)
    terms_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, SIDE, 16], TERMS)
    left_smem = gl.allocate_shared_memory(gl.bfloat16, [2 * BLOCKS, SIDE, 16], TERMS)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [KV_STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=2)  # what is copied, and the terms
        mbarrier.init(empty.index(n), count=BLOCKS)
    for n in gl.static_range(KV_STAGES):
        mbarrier.init(kv_full.index(n), count=1)
        mbarrier.init(kv_empty.index(n), count=BLOCKS + 1)
    for n in gl.static_range(DS_STAGES):
        mbarrier.init(ds_full.index(n), count=BLOCKS)
        mbarrier.init(ds_empty.index(n), count=1)
    fence_async_shared()
    barrier()
    to_copy = (
        q_desc, do_desc, k_desc, v_desc, words_desc, q_smem, do_smem, k_smem, v_smem, terms_smem, words_smem, full,
        empty, kv_full, kv_empty, terms_ptr, listed_ptr, R, H, I, tiles_i, tiles_j, groups_j, items, heads, scale,
    )  # fmt: skip
    to_walk = (
        q_smem, do_smem, k_smem, v_smem, terms_smem, words_smem, ds_smem, left_smem, full, empty, kv_full, kv_empty,
        ds_full, ds_empty, listed_ptr, key_ptr, dk_ptr, dv_ptr, stride_key_b, stride_key_r, stride_key_j, R, H, J,
        tiles_i, groups_j, items, heads, scale,
    )  # fmt: skip
    to_sum = (
        k_smem, ds_smem, kv_full, kv_empty, ds_full, ds_empty, listed_ptr, sums_ptr, dq_ptr, R, H, I, tiles_i, groups_j,
        items, heads, scale,
    )  # fmt: skip
    # fmt: off
    gl.warp_specialize([
        (_walk, (to_walk, 0, STAGES, KV_STAGES, DS_STAGES, KEY_TERM, KEYS_STAY, D)),
        (_walk, (to_walk, 1, STAGES, KV_STAGES, DS_STAGES, KEY_TERM, KEYS_STAY, D)),
        (_sum_dq, (to_sum, KV_STAGES, DS_STAGES, D)),
        (_copy, (to_copy, STAGES, KV_STAGES, D)),
    ], [4, 4, 1], [REGISTERS, DQ_REGISTERS, 24])
    # fmt: on


class Plan:
    """dq, dk and dv of calls that `dqkv_choice.refusal` lets through; not of heads that are marked."""

    def __init__(self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, scale: float) -> None:
        B, R, I, H, D = q.shape
        J = k.shape[2]
        tiles_i, tiles_j = triton.cdiv(I, SIDE.value), triton.cdiv(J, SIDE.value)
        heads = B * R * H
        programs = min(heads, choice.multiprocessors(q.get_device()))
        self._sums_shape = (programs, tiles_i, SIDE.value, D)
        given = {
            **arguments.strides("key_", key, "brj"),
            "R": R,
            "H": H,
            "I": I,
            "J": J,
            "tiles_i": tiles_i,
            "tiles_j": tiles_j,
            "groups_j": triton.cdiv(tiles_j, BLOCKS.value),
            "heads": heads,
            "scale": scale,
            "D": D,
            "KEY_TERM": arguments.key_term(key),
            **vars(dqkv_choice.shape_for(D)),
        }
        boxes: dict[str, tuple[int, ...]] = {f"{name}_desc": (1, 1, SIDE.value, 1, D) for name in ("q", "do", "k", "v")}
        boxes["words_desc"] = (SIDE.value, SIDE.value // 2)
        self._run = CopyingLaunch(_triangle_attention_bwd_dqkv_hopper, programs, given, 4, boxes)

    def __call__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        words: Tensor,
        key: Tensor | None,
        terms: Tensor,
        listed: Tensor,
        gradients: tuple[Tensor, Tensor, Tensor],
    ) -> bool:
        """Writes into `gradients`; True.

        Args:
            words: of the bias, `[j, i]`, as `lean/words.py` makes them.
            terms: `[B, R, H, I, 2]`, L and δ, as `query_terms.py` leaves them.
            listed: heads that are marked and all others, as `lean/marked.py` lists them.
        """
        sums = memory.empty(self._sums_shape, torch.float32, q)
        key = arguments.bytes_of_mask(key)
        self._run(q, grad_out, k, v, words.view(-1, SIDE.value // 2), terms, listed, key, sums, *gradients)
        return True
