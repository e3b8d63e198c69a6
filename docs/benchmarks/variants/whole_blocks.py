"""Draft of `hopper/whole.py` for up to 128 queries and keys in which each block of 64 keys has a partition of its own.

    PYTHONPATH=. python docs/benchmarks/variants/whole_blocks.py [--n 128,96,112] [--check]

Hopper, B=1 and 4, H=4 and 8, D=32, bfloat16. First each gradient beside that of the kernel in use (how far apart, by
norm), then the whole backward by graph replay, ms. `--check` does the former alone, with odd sizes.
docs/benchmarks/log-backward.md, step 21, says what is expected.

Tiles of logits are `[j, i]`: p and ds are left operands of dv and dk in registers, as in `hopper/dqkv.py`. Only ds goes
through shared memory, to a partition that multiplies it with k for dq, and that finds δ of the row after.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
import triton
from backward import apart, replayed_ms  # of this directory
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trifast_inductor.kernels.triangle_attention import arguments, backward, forward, memory, sums
from trifast_inductor.kernels.triangle_attention.bias import AlignedRows
from trifast_inductor.kernels.triangle_attention.hopper import whole_choice
from trifast_inductor.kernels.triangle_attention.hopper.descriptors import CopyingLaunch
from trifast_inductor.kernels.triangle_attention.hopper.dqkv import _advance, _unpack
from trifast_inductor.kernels.triangle_attention.hopper.registers import LOG2E, exp2
from trifast_inductor.kernels.triangle_attention.hopper.versions import async_load, async_store, barrier, store_wait
from trifast_inductor.kernels.triangle_attention.hopper.whole import _added_now, _replaced, _with_key_term, _zeros
from trifast_inductor.testing import Inputs, random_inputs

SIDE = gl.constexpr(64)
BLOCKS = gl.constexpr(2)  # of keys
TI = gl.constexpr(2)  # tiles of queries
STAGES = gl.constexpr(3)  # rows in shared memory
DS_STAGES = gl.constexpr(2)


@gluon.jit
def _copy(shared, D: gl.constexpr):
    (
        q_desc, do_desc, out_desc, k_desc, v_desc, q_smem, do_smem, out_smem, k_smem, v_smem, full, empty, b, h,
        first_row, count,
    ) = shared  # fmt: skip
    slot = 0
    phase = 1
    for n in range(count):
        r = first_row + n
        mbarrier.wait(empty.index(slot), phase)
        bar = full.index(slot)
        mbarrier.expect(bar, 2 * SIDE * D * (3 * TI + 2 * BLOCKS))
        for i in gl.static_range(TI):
            at = [b, r, i * SIDE, h, 0]
            async_load(q_desc, at, bar, q_smem.index(slot * TI + i))
            async_load(do_desc, at, bar, do_smem.index(slot * TI + i))
            async_load(out_desc, at, bar, out_smem.index(slot * TI + i))
        for j in gl.static_range(BLOCKS):
            at = [b, r, j * SIDE, h, 0]
            async_load(k_desc, at, bar, k_smem.index(slot * BLOCKS + j))
            async_load(v_desc, at, bar, v_smem.index(slot * BLOCKS + j))
        slot, phase = _advance(slot, phase, STAGES)


@gluon.jit
def _packed(x):
    """`[64, 32]` words of a tile in the layout of logits, of which a thread finds its own side by side."""
    pairs = x.reshape([4, 2, 8, 4, 2, 4, 2]).permute([3, 0, 2, 5, 4, 1, 6]).reshape([SIDE, SIDE // 2, 2])
    low, high = pairs.split()
    low = low.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return low | high.to(gl.int16, bitcast=True).to(gl.int32) << 16


@gluon.jit
def _load_key(key_ptr, strides, b, r, j, J, KEY_TERM: gl.constexpr):
    key = j
    if KEY_TERM != "none":
        stride_b, stride_r, stride_j = strides
        key_ptr += b.to(gl.int64) * stride_b + r.to(gl.int64) * stride_r
        key = gl.load(key_ptr + j.to(gl.int64) * stride_j, mask=j < J, other=0)
    return key


@gluon.jit
def _walk(
    shared,
    WHICH: gl.constexpr,  # of the blocks of keys
    KEY_TERM: gl.constexpr,
    KEY_TERM_FIRST: gl.constexpr,
    NEEDS_DBIAS: gl.constexpr,
    EVEN_J: gl.constexpr,
    D: gl.constexpr,
):
    """dk and dv of one block of keys, for every row of the program, and dbias of the block."""
    (
        dk_desc, dv_desc, q_smem, do_smem, k_smem, v_smem, words_smem, ds_smem, left_smem, max_smem, sum_smem,
        delta_smem, full, empty, lines_full, ds_full, ds_empty, bias_ptr, key_ptr, key_strides, parts_ptr, b, h, group,
        first_row, count, B, H, I, J, scale, fill, bias_strides,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = q_smem.dtype
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OF_OUT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    BY_J: gl.constexpr = gl.SliceLayout(1, X)
    BY_I: gl.constexpr = gl.SliceLayout(0, X)
    j = WHICH * SIDE + gl.arange(0, SIDE, layout=BY_J)
    is_key = gl.expand_dims(j < J, 1)
    # The bias of the block, once, as each thread wants it.
    stride_b, stride_h, stride_i, stride_j = bias_strides
    bias_ptr += b.to(gl.int64) * stride_b + h.to(gl.int64) * stride_h
    for n in gl.static_range(TI):
        i = gl.expand_dims(n * SIDE + gl.arange(0, SIDE, layout=BY_I), 0)
        at = i * stride_i + gl.expand_dims(j, 1) * stride_j
        bias = gl.load(bias_ptr + at, mask=is_key & (i < I), other=0.0)
        words_smem.index(WHICH * TI + n).store(gl.convert_layout(_packed(bias), WORDS, assert_trivial=True))
    barrier()

    dbias = _zeros(TI if NEEDS_DBIAS else 0, [SIDE, SIDE], X)
    x = gl.zeros([SIDE, SIDE], gl.float32, X)
    dp = gl.zeros([SIDE, SIDE], gl.float32, X)
    dk = gl.zeros([SIDE, D], gl.float32, OUT)
    dv = gl.zeros([SIDE, D], gl.float32, OUT)
    slot = 0
    phase = 0
    ds_slot = 0
    ds_phase = 1
    key = _load_key(key_ptr, key_strides, b, first_row, j, J, KEY_TERM)
    for n_row in range(count):
        mbarrier.wait(full.index(slot), phase)
        k = k_smem.index(slot * BLOCKS + WHICH).reshape([SIDE, D])
        v = v_smem.index(slot * BLOCKS + WHICH).reshape([SIDE, D])
        q = q_smem.index(slot * TI).reshape([SIDE, D])
        x = warpgroup_mma(k, q.permute((1, 0)), x, use_acc=False, is_async=True)
        mbarrier.wait(lines_full.index(slot), phase)
        for n in gl.static_range(TI):
            do = do_smem.index(slot * TI + n).reshape([SIDE, D])
            q = q_smem.index(slot * TI + n).reshape([SIDE, D])
            dp = warpgroup_mma(v, do.permute((1, 0)), dp, use_acc=False, is_async=True)
            words = words_smem.index(WHICH * TI + n).load(WORDS)
            if n == 0:
                x = warpgroup_mma_wait(1, deps=(x,))
            else:
                x, dk, dv = warpgroup_mma_wait(1, deps=(x, dk, dv))
            x = x * scale
            if KEY_TERM_FIRST:
                x = _with_key_term(x, gl.expand_dims(key, 1), fill, KEY_TERM)
            x = x + _unpack(words, dtype, X)
            if not KEY_TERM_FIRST:
                x = _with_key_term(x, gl.expand_dims(key, 1), fill, KEY_TERM)
            of_max = gl.expand_dims(max_smem.index(slot * TI + n).load(BY_I), 0)
            of_sum = gl.expand_dims(sum_smem.index(slot * TI + n).load(BY_I), 0)
            p = exp2((x - of_max) * LOG2E - of_sum)
            p16 = gl.convert_layout(p.to(dtype), OF_OUT)
            dv = warpgroup_mma(p16, do, dv, use_acc=n > 0, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            delta = gl.expand_dims(delta_smem.index(slot * TI + n).load(BY_I), 0)
            ds = p * (dp - delta)
            if not EVEN_J:
                # Past the end a key has whatever the row maximum leaves of it, or NaN.
                ds = gl.where(is_key, ds, 0.0)
            if NEEDS_DBIAS and KEY_TERM_FIRST:
                dbias = _replaced(dbias, n, _added_now(dbias[n], ds))
            if KEY_TERM == "select":
                ds = gl.where(gl.expand_dims(key != 0, 1), 0.0, ds)
            if NEEDS_DBIAS and not KEY_TERM_FIRST:
                dbias = _replaced(dbias, n, _added_now(dbias[n], ds))
            ds16 = ds.to(dtype)
            if n + 1 < TI:
                q_next = q_smem.index(slot * TI + n + 1).reshape([SIDE, D])
                x = warpgroup_mma(k, q_next.permute((1, 0)), x, use_acc=False, is_async=True)
            dk = warpgroup_mma(gl.convert_layout(ds16, OF_OUT), q, dk, use_acc=n > 0, is_async=True)
            mbarrier.wait(ds_empty.index(ds_slot), ds_phase)
            ds_smem.index(ds_slot * BLOCKS + WHICH).store(ds16)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(ds_slot), count=1)
            ds_slot, ds_phase = _advance(ds_slot, ds_phase, DS_STAGES)
        next_row = first_row + gl.minimum(n_row + 1, count - 1)
        key = _load_key(key_ptr, key_strides, b, next_row, j, J, KEY_TERM)
        x, dp, dk, dv = warpgroup_mma_wait(0, deps=(x, dp, dk, dv))
        mbarrier.arrive(empty.index(slot), count=1)
        slot, phase = _advance(slot, phase, STAGES)
        store_wait(0)
        barrier()
        left_smem.index(2 * WHICH).reshape([SIDE, D]).store((dk * scale).to(dtype))
        left_smem.index(2 * WHICH + 1).reshape([SIDE, D]).store(dv.to(dtype))
        fence_async_shared()
        barrier()
        async_store(dk_desc, [b, first_row + n_row, WHICH * SIDE, h, 0], left_smem.index(2 * WHICH))
        async_store(dv_desc, [b, first_row + n_row, WHICH * SIDE, h, 0], left_smem.index(2 * WHICH + 1))
    if NEEDS_DBIAS:
        parts_ptr += (((group * B + b) * H + h) * BLOCKS + WHICH).to(gl.int64) * (TI * SIDE * SIDE)
        at = gl.expand_dims(gl.arange(0, SIDE, layout=BY_I), 0) * SIDE
        at = at + gl.expand_dims(gl.arange(0, SIDE, layout=BY_J), 1)
        for n in gl.static_range(TI):
            gl.store(parts_ptr + n * (SIDE * SIDE) + at, dbias[n])
    store_wait(0)


@gluon.jit
def _leave_lines(
    row_max_ptr, row_sum_ptr, do_smem, out_smem, max_smem, sum_smem, delta_smem, of_row, I, slot, D: gl.constexpr
):
    """Row maximum, log2 of the row sum, and δ of each query of a row."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, D // 2], [16, 2], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for n in gl.static_range(TI):
        i = n * SIDE + gl.arange(0, SIDE, layout=LINE)
        row_max = gl.load(row_max_ptr + of_row + i, mask=i < I, other=float("inf"))
        row_sum = gl.load(row_sum_ptr + of_row + i, mask=i < I, other=1.0)
        out = out_smem.index(slot * TI + n).reshape([SIDE, D]).load(ROWS).to(gl.float32)
        do = do_smem.index(slot * TI + n).reshape([SIDE, D]).load(ROWS).to(gl.float32)
        max_smem.index(slot * TI + n).store(row_max)
        sum_smem.index(slot * TI + n).store(gl.log2(row_sum))
        delta_smem.index(slot * TI + n).store(gl.sum(out * do, 1))
    barrier()


@gluon.jit
def _sum_dq(shared, D: gl.constexpr):
    """What the others want of a row's queries, a row ahead, and dq from the ds of both blocks."""
    (
        dq_desc, k_smem, do_smem, out_smem, ds_smem, dq_smem, max_smem, sum_smem, delta_smem, full, empty, lines_full,
        ds_full, ds_empty, row_max_ptr, row_sum_ptr, b, h, first_row, count, R, H, I, scale,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = k_smem.dtype
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ds_slot = 0
    ds_phase = 0
    slot = 0
    phase = 0
    ahead = 0
    ahead_phase = 0
    row = ((b * R + first_row).to(gl.int64) * H + h) * I
    for n_row in range(count + 1):
        if n_row < count:
            mbarrier.wait(full.index(ahead), ahead_phase)
            _leave_lines(
                row_max_ptr, row_sum_ptr, do_smem, out_smem, max_smem, sum_smem, delta_smem, row, I, ahead, D
            )  # fmt: skip
            mbarrier.arrive(lines_full.index(ahead), count=1)
            row += (H * I).to(gl.int64)
            ahead, ahead_phase = _advance(ahead, ahead_phase, STAGES)
        if n_row > 0:
            for n in gl.static_range(TI):
                mbarrier.wait(ds_full.index(ds_slot), ds_phase)
                dq = gl.zeros([SIDE, D], gl.float32, OUT)
                for block in gl.static_range(BLOCKS):
                    ds = ds_smem.index(ds_slot * BLOCKS + block).permute((1, 0))
                    k = k_smem.index(slot * BLOCKS + block).reshape([SIDE, D])
                    dq = warpgroup_mma(ds, k, dq, use_acc=block > 0, is_async=True)
                dq = warpgroup_mma_wait(0, deps=(dq,))
                mbarrier.arrive(ds_empty.index(ds_slot), count=1)
                ds_slot, ds_phase = _advance(ds_slot, ds_phase, DS_STAGES)
                store_wait(0)
                barrier()
                dq_smem.reshape([SIDE, D]).store((dq * scale).to(dtype))
                fence_async_shared()
                barrier()
                async_store(dq_desc, [b, first_row + n_row - 1, n * SIDE, h, 0], dq_smem)
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = _advance(slot, phase, STAGES)
    store_wait(0)


# Compiled once for all lengths.
@gluon.jit(do_not_specialize=["B", "R", "H", "I", "J", "rows"])
def bwd_whole_blocks(
    q_desc,
    do_desc,
    out_desc,
    k_desc,
    v_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    bias_ptr,
    key_ptr,
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    parts_ptr,  # [groups, B, H, BLOCKS, TI, 64, 64] contiguous, float32
    stride_bias_b,
    stride_bias_h,
    stride_bias_i,
    stride_bias_j,
    stride_key_b,
    stride_key_r,
    stride_key_j,
    B,
    R,
    H,
    I,
    J,
    rows,
    scale,
    fill,
    D: gl.constexpr,
    KEY_TERM: gl.constexpr,
    KEY_TERM_FIRST: gl.constexpr,
    NEEDS_DBIAS: gl.constexpr,
    EVEN_J: gl.constexpr,
    REGISTERS: gl.constexpr,
    DQ_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = q_desc.dtype
    BOX: gl.constexpr = q_desc.layout
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(dtype, [STAGES * TI, 1, 1, SIDE, 1, D], BOX)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES * TI, 1, 1, SIDE, 1, D], BOX)
    out_smem = gl.allocate_shared_memory(dtype, [STAGES * TI, 1, 1, SIDE, 1, D], BOX)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * BLOCKS, 1, 1, SIDE, 1, D], BOX)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * BLOCKS, 1, 1, SIDE, 1, D], BOX)
    left_smem = gl.allocate_shared_memory(dtype, [2 * BLOCKS, 1, 1, SIDE, 1, D], BOX)
    dq_smem = gl.allocate_shared_memory(dtype, [1, 1, SIDE, 1, D], BOX)
    ds_smem = gl.allocate_shared_memory(dtype, [DS_STAGES * BLOCKS, SIDE, SIDE], gl.NVMMASharedLayout(128, 16, rank=2))
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    words_smem = gl.allocate_shared_memory(gl.int32, [BLOCKS * TI, SIDE, SIDE // 2], PLAIN)
    max_smem = gl.allocate_shared_memory(gl.float32, [STAGES * TI, SIDE], FLAT)
    sum_smem = gl.allocate_shared_memory(gl.float32, [STAGES * TI, SIDE], FLAT)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES * TI, SIDE], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lines_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=BLOCKS + 1)
        mbarrier.init(lines_full.index(n), count=1)
    for n in gl.static_range(DS_STAGES):
        mbarrier.init(ds_full.index(n), count=BLOCKS)
        mbarrier.init(ds_empty.index(n), count=1)
    fence_async_shared()
    barrier()
    pid = gl.program_id(0)
    h = pid % H
    b = pid // H % B
    group = pid // (B * H)
    first_row = group * rows
    count = gl.minimum(rows, R - first_row)
    to_copy = (
        q_desc, do_desc, out_desc, k_desc, v_desc, q_smem, do_smem, out_smem, k_smem, v_smem, full, empty, b, h,
        first_row, count,
    )  # fmt: skip
    to_walk = (
        dk_desc, dv_desc, q_smem, do_smem, k_smem, v_smem, words_smem, ds_smem, left_smem, max_smem, sum_smem,
        delta_smem, full, empty, lines_full, ds_full, ds_empty, bias_ptr, key_ptr,
        (stride_key_b, stride_key_r, stride_key_j), parts_ptr, b, h, group, first_row, count, B, H, I, J,
        scale, fill, (stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j),
    )  # fmt: skip
    to_sum = (
        dq_desc, k_smem, do_smem, out_smem, ds_smem, dq_smem, max_smem, sum_smem, delta_smem, full, empty, lines_full,
        ds_full, ds_empty, row_max_ptr, row_sum_ptr, b, h, first_row, count, R, H, I, scale,
    )  # fmt: skip
    # fmt: off
    gl.warp_specialize([
        (_walk, (to_walk, 0, KEY_TERM, KEY_TERM_FIRST, NEEDS_DBIAS, EVEN_J, D)),
        (_walk, (to_walk, 1, KEY_TERM, KEY_TERM_FIRST, NEEDS_DBIAS, EVEN_J, D)),
        (_sum_dq, (to_sum, D)),
        (_copy, (to_copy, D)),
    ], [4, 4, 1], [REGISTERS, DQ_REGISTERS, 24])
    # fmt: on


class Plan:
    """What a call launches; the arguments as in `backward.launch`."""

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
        registers: int = 216,
    ) -> None:
        B, R, I, H, D = q.shape
        J = k.shape[2]
        rows = whole_choice.rows_of_a_program(R, B * H, 132)
        groups = triton.cdiv(R, rows)
        self._aligned = AlignedRows(bias)
        aligned = self._aligned(bias)
        given = {
            **arguments.shared(q, k, v, aligned, key_bias, key_mask, scale, fill, key_term_first),
            "B": B,
            "rows": rows,
            "NEEDS_DBIAS": True,
            "EVEN_J": J % SIDE.value == 0,
            "REGISTERS": registers,
            "DQ_REGISTERS": 488 - 2 * registers,
        }
        names = ("q", "do", "out", "k", "v", "dq", "dk", "dv")
        boxes: dict[str, tuple[int, ...]] = {f"{name}_desc": (1, 1, SIDE.value, 1, D) for name in names}
        self._run = CopyingLaunch(bwd_whole_blocks, B * H * groups, given, 4, boxes)
        self._parts_shape = (groups, B, H, BLOCKS.value, TI.value, SIDE.value, SIDE.value)
        self._sum = sums.sum_of_tiles(B * H, I, J, groups)

    def __call__(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        key: Tensor | None,
        out: Tensor,
        row_max: Tensor,
        row_sum: Tensor,
    ) -> tuple[Tensor, ...]:
        key = key.view(torch.uint8) if key is not None and key.dtype == torch.bool else key
        dq, dk, dv = (memory.empty(t.shape, q.dtype, q) for t in (q, k, v))
        dbias = memory.empty(tuple(bias.shape), q.dtype, q)
        parts = memory.empty(self._parts_shape, torch.float32, q)
        self._run(q, grad_out, out, k, v, dq, dk, dv, self._aligned(bias), key, row_max, row_sum, parts)
        self._sum(parts, dbias)
        return dq, dk, dv, dbias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", default="128,96,112")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()

    def both(x: Inputs) -> tuple[Plan, tuple[Tensor, ...], str]:
        saved = forward.portable(*x.op)
        plan = Plan(x.grad_out, *x.op[:6], *x.op[6:])
        key = x.key_bias if x.key_mask is None else x.key_mask
        given = (x.grad_out, x.q, x.k, x.v, x.bias, key, *saved)
        expected = backward.launch(x.grad_out, *x.op[:6], *saved, *x.op[6:], True)
        return plan, given, apart(plan(*given), expected)

    if arguments.check:
        for I, J in ((128, 128), (100, 120), (65, 66), (128, 65)):
            for key_term in ("none", "additive", "mask", "-inf mask"):
                for D, dtype in ((32, torch.bfloat16), (16, torch.float16)):
                    sizes = {"B": 2, "R": 7, "I": I, "J": J, "H": 2, "D": D, "dtype": dtype, "device": "cuda"}
                    print(
                        f"{I} by {J}, {key_term}, D={D}: {both(random_inputs(**sizes, key_term=key_term))[2]}",
                        flush=True,
                    )
        return
    for N in map(int, arguments.n.split(",")):
        for B, H in ((1, 4), (1, 8), (4, 4), (4, 8)):
            for key_term in ("none", "additive", "mask"):
                sizes = {"B": B, "R": N, "I": N, "J": N, "H": H, "D": 32, "dtype": torch.bfloat16, "device": "cuda"}
                x = random_inputs(**sizes, key_term=key_term)
                plan, given, far = both(x)
                saved = given[-3:]
                in_use = (x.grad_out, *x.op[:6], *saved, *x.op[6:], True)
                used = replayed_ms(lambda in_use=in_use: lambda: backward.launch(*in_use))
                draft = replayed_ms(lambda plan=plan, given=given: lambda: plan(*given))
                print(f"N={N} {B} x {H} {key_term}: {far}, {used:.4f} ms, draft {draft:.4f}", flush=True)


if __name__ == "__main__":
    main()
