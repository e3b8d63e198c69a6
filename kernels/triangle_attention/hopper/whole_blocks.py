"""All gradients of 65 to 128 queries and keys in one pass, for Hopper, in Gluon: a partition for each block of keys.

    p = exp(x - row_max) / row_sum     ds = p·(⟨grad_out, v⟩ - δ)     x as in `logits.py`
    dv = pᵀ·grad_out     dk = scale·dsᵀ·q     dq = scale·ds·k     dbias = Σ_r ds

**Roles.** A program owns some rows r of one head. Two partitions each own 64 keys: their tiles of logits are `[j, i]`, so
that p and ds are left operands of dv and dk in registers, and their dbias stays in registers over all rows. ds alone goes
through shared memory, to a third, which makes dq of both blocks and finds, a row ahead, what the two want of a row's
queries and keys. One warp copies row after row. dbias is summed over the programs of a head afterwards (`sums.py`).

**Order.** The logits and ⟨grad_out, v⟩ of the next tile, also of the next row's first, run while ds and the gradients are
stored. dv is waited for before ds is rounded: the registers of p, its operand, are free only then, and there are no more.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trifast_inductor.kernels.triangle_attention.hopper.lines import load_lines
from trifast_inductor.kernels.triangle_attention.hopper.registers import (
    LOG2E,
    added_now,
    exp2,
    pack_square,
    unpack_square,
    with_key_term,
)
from trifast_inductor.kernels.triangle_attention.hopper.ring import advance
from trifast_inductor.kernels.triangle_attention.hopper.tuples import replaced, zeros
from trifast_inductor.kernels.triangle_attention.hopper.versions import async_load, async_store, barrier, store_wait

SIDE = gl.constexpr(64)  # queries, and keys, of a tile
BLOCKS = gl.constexpr(2)  # of keys, a partition each
TI = gl.constexpr(2)  # tiles of queries
STAGES = gl.constexpr(3)  # rows in shared memory
DS_STAGES = gl.constexpr(3)


@gluon.jit
def _copy(shared, D: gl.constexpr):
    """The loading warp: row after row what the others read, as far ahead as there is room."""
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
        slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _logits_and_dp(k_smem, v_smem, q_smem, do_smem, WHICH: gl.constexpr, slot, x, dp, n: gl.constexpr, D: gl.constexpr):
    """Both products of a tile, under way, in the registers of those of the tile before."""
    k = k_smem.index(slot * BLOCKS + WHICH).reshape([SIDE, D])
    v = v_smem.index(slot * BLOCKS + WHICH).reshape([SIDE, D])
    q = q_smem.index(slot * TI + n).reshape([SIDE, D])
    do = do_smem.index(slot * TI + n).reshape([SIDE, D])
    x = warpgroup_mma(k, q.permute((1, 0)), x, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, do.permute((1, 0)), dp, use_acc=False, is_async=True)
    return x, dp


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
        dk_desc, dv_desc, q_smem, do_smem, k_smem, v_smem, words_smem, ds_smem, left_smem, line_smems, full, empty,
        lines_full, ds_full, ds_empty, bias_ptr, bias_strides, parts_ptr, b, h, group, first_row, count, B, H, I, J,
        scale, fill,
    ) = shared  # fmt: skip
    max_smem, sum_smem, key_smem, delta_smem = line_smems
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
        at = i.to(gl.int64) * stride_i + gl.expand_dims(j, 1).to(gl.int64) * stride_j
        bias = gl.load(bias_ptr + at, mask=is_key & (i < I), other=0.0)
        words_smem.index(WHICH * TI + n).store(gl.convert_layout(pack_square(bias), WORDS, assert_trivial=True))
    barrier()

    dbias = zeros(TI if NEEDS_DBIAS else 0, [SIDE, SIDE], X)
    x = gl.zeros([SIDE, SIDE], gl.float32, X)
    dp = gl.zeros([SIDE, SIDE], gl.float32, X)
    dk = gl.zeros([SIDE, D], gl.float32, OUT)
    dv = gl.zeros([SIDE, D], gl.float32, OUT)
    slot = 0
    phase = 0
    ds_slot = 0
    ds_phase = 1
    mbarrier.wait(full.index(0), 0)
    x, dp = _logits_and_dp(k_smem, v_smem, q_smem, do_smem, WHICH, 0, x, dp, 0, D)
    x, dp = warpgroup_mma_wait(0, deps=(x, dp))
    for n_row in range(count):
        r = first_row + n_row
        next_slot, next_phase = advance(slot, phase, STAGES)
        mbarrier.wait(lines_full.index(slot), phase)
        for n in gl.static_range(TI):
            do = do_smem.index(slot * TI + n).reshape([SIDE, D])
            q = q_smem.index(slot * TI + n).reshape([SIDE, D])
            words = words_smem.index(WHICH * TI + n).load(WORDS)
            if n > 0:
                x = warpgroup_mma_wait(2, deps=(x,))
            key = is_key
            if KEY_TERM != "none":
                key = gl.expand_dims(key_smem.index(slot * BLOCKS + WHICH).load(BY_J), 1)
            x = x * scale
            if KEY_TERM_FIRST:
                x = with_key_term(x, key, fill, KEY_TERM)
            x = x + unpack_square(words, dtype, X)
            if not KEY_TERM_FIRST:
                x = with_key_term(x, key, fill, KEY_TERM)
            of_max = gl.expand_dims(max_smem.index(slot * TI + n).load(BY_I), 0)
            of_sum = gl.expand_dims(sum_smem.index(slot * TI + n).load(BY_I), 0)
            p = exp2((x - of_max) * LOG2E - of_sum)
            p16 = gl.convert_layout(p.to(dtype), OF_OUT)
            if n > 0:
                dp, dk, dv = warpgroup_mma_wait(0, deps=(dp, dk, dv))
            dv = warpgroup_mma(p16, do, dv, use_acc=n > 0, is_async=True)
            delta = gl.expand_dims(delta_smem.index(slot * TI + n).load(BY_I), 0)
            ds = p * (dp - delta)
            if not EVEN_J:
                # Past the end a key has whatever the row maximum leaves of it, or NaN.
                ds = gl.where(is_key, ds, 0.0)
            if NEEDS_DBIAS and KEY_TERM_FIRST:
                dbias = replaced(dbias, n, added_now(dbias[n], ds))
            if KEY_TERM == "select":
                key = gl.expand_dims(key_smem.index(slot * BLOCKS + WHICH).load(BY_J), 1)
                ds = gl.where(key != 0, 0.0, ds)
            if NEEDS_DBIAS and not KEY_TERM_FIRST:
                dbias = replaced(dbias, n, added_now(dbias[n], ds))
            dv = warpgroup_mma_wait(0, deps=(dv,))
            ds16 = ds.to(dtype)
            if n + 1 == TI:
                # Of the last row again what lies there, which nobody uses.
                mbarrier.wait(full.index(next_slot), next_phase, pred=n_row + 1 < count)
                x, dp = _logits_and_dp(k_smem, v_smem, q_smem, do_smem, WHICH, next_slot, x, dp, 0, D)
            else:
                x, dp = _logits_and_dp(k_smem, v_smem, q_smem, do_smem, WHICH, slot, x, dp, n + 1, D)
            dk = warpgroup_mma(gl.convert_layout(ds16, OF_OUT), q, dk, use_acc=n > 0, is_async=True)
            mbarrier.wait(ds_empty.index(ds_slot), ds_phase)
            ds_smem.index(ds_slot * BLOCKS + WHICH).store(ds16)
            fence_async_shared()
            barrier()
            mbarrier.arrive(ds_full.index(ds_slot), count=1)
            ds_slot, ds_phase = advance(ds_slot, ds_phase, DS_STAGES)
        x, dp, dk, dv = warpgroup_mma_wait(0, deps=(x, dp, dk, dv))
        mbarrier.arrive(empty.index(slot), count=1)
        slot = next_slot
        phase = next_phase
        store_wait(0)
        barrier()
        left_smem.index(2 * WHICH).reshape([SIDE, D]).store((dk * scale).to(dtype))
        left_smem.index(2 * WHICH + 1).reshape([SIDE, D]).store(dv.to(dtype))
        fence_async_shared()
        barrier()
        async_store(dk_desc, [b, r, WHICH * SIDE, h, 0], left_smem.index(2 * WHICH))
        async_store(dv_desc, [b, r, WHICH * SIDE, h, 0], left_smem.index(2 * WHICH + 1))
    if NEEDS_DBIAS:
        parts_ptr += (((group * B + b) * H + h) * BLOCKS + WHICH).to(gl.int64) * (TI * SIDE * SIDE)
        at = gl.expand_dims(gl.arange(0, SIDE, layout=BY_I), 0) * SIDE
        at = at + gl.expand_dims(gl.arange(0, SIDE, layout=BY_J), 1)
        for n in gl.static_range(TI):
            gl.store(parts_ptr + n * (SIDE * SIDE) + at, dbias[n])
    store_wait(0)


@gluon.jit
def _leave_lines(lines, smems, do_smem, out_smem, slot, D: gl.constexpr):
    """Into shared memory what `load_lines` has loaded, and δ."""
    row_max, row_sum, key = lines
    max_smem, sum_smem, key_smem, delta_smem = smems
    ROWS: gl.constexpr = gl.BlockedLayout([1, D // 2], [16, 2], [4, 1], [1, 0])
    for n in gl.static_range(len(key)):
        key_smem.index(slot * BLOCKS + n).store(key[n])
    for n in gl.static_range(TI):
        max_smem.index(slot * TI + n).store(row_max[n])
        sum_smem.index(slot * TI + n).store(gl.log2(row_sum[n]))
        out = out_smem.index(slot * TI + n).reshape([SIDE, D]).load(ROWS).to(gl.float32)
        do = do_smem.index(slot * TI + n).reshape([SIDE, D]).load(ROWS).to(gl.float32)
        delta_smem.index(slot * TI + n).store(gl.sum(out * do, 1))
    barrier()


@gluon.jit
def _sum_dq(shared, KEY_TERM: gl.constexpr, D: gl.constexpr):
    """What the others want of a row's queries, a row ahead, and dq from the ds of both blocks."""
    (
        dq_desc, k_smem, do_smem, out_smem, ds_smem, dq_smem, line_smems, full, empty, lines_full, ds_full, ds_empty,
        ptrs, strides, b, h, first_row, count, R, H, I, J, scale,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = k_smem.dtype
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ds_slot = 0
    ds_phase = 0
    slot = 0
    phase = 0
    ahead = 0
    ahead_phase = 0
    lines = load_lines(ptrs, strides, b, first_row, h, R, H, I, J, KEY_TERM, TI, BLOCKS, 4)
    for n_row in range(count + 1):
        if n_row < count:
            mbarrier.wait(full.index(ahead), ahead_phase)
            _leave_lines(lines, line_smems, do_smem, out_smem, ahead, D)
            mbarrier.arrive(lines_full.index(ahead), count=1)
            ahead, ahead_phase = advance(ahead, ahead_phase, STAGES)
        # A turn ahead: from memory it takes as long as half a row.
        next_row = first_row + gl.minimum(n_row + 1, count - 1)
        lines = load_lines(ptrs, strides, b, next_row, h, R, H, I, J, KEY_TERM, TI, BLOCKS, 4)
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
                ds_slot, ds_phase = advance(ds_slot, ds_phase, DS_STAGES)
                store_wait(0)
                barrier()
                dq_smem.reshape([SIDE, D]).store((dq * scale).to(dtype))
                fence_async_shared()
                barrier()
                async_store(dq_desc, [b, first_row + n_row - 1, n * SIDE, h, 0], dq_smem)
            mbarrier.arrive(empty.index(slot), count=1)
            slot, phase = advance(slot, phase, STAGES)
    store_wait(0)


# Compiled once for all lengths.
@gluon.jit(do_not_specialize=["B", "R", "H", "I", "J", "rows"])
def _triangle_attention_bwd_whole_blocks_hopper(
    q_desc,  # these, and the gradients, [B, R, I or J, H, D]
    do_desc,
    out_desc,
    k_desc,
    v_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    bias_ptr,  # [B, H, I, J], of any strides
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
    rows,  # of r, to a group
    scale,
    fill,
    D: gl.constexpr,
    KEY_TERM: gl.constexpr,
    KEY_TERM_FIRST: gl.constexpr,
    NEEDS_DBIAS: gl.constexpr,
    EVEN_J: gl.constexpr,
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
    key_smem = max_smem
    if KEY_TERM != "none":
        key_smem = gl.allocate_shared_memory(key_ptr.dtype.element_ty, [STAGES * BLOCKS, SIDE], FLAT)
    line_smems = (max_smem, sum_smem, key_smem, delta_smem)
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
        dk_desc, dv_desc, q_smem, do_smem, k_smem, v_smem, words_smem, ds_smem, left_smem, line_smems, full, empty,
        lines_full, ds_full, ds_empty, bias_ptr, (stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j),
        parts_ptr, b, h, group, first_row, count, B, H, I, J, scale, fill,
    )  # fmt: skip
    to_sum = (
        dq_desc, k_smem, do_smem, out_smem, ds_smem, dq_smem, line_smems, full, empty, lines_full, ds_full, ds_empty,
        (key_ptr, row_max_ptr, row_sum_ptr), (stride_key_b, stride_key_r, stride_key_j), b, h, first_row, count, R, H,
        I, J, scale,
    )  # fmt: skip
    # fmt: off
    gl.warp_specialize([
        (_walk, (to_walk, 0, KEY_TERM, KEY_TERM_FIRST, NEEDS_DBIAS, EVEN_J, D)),
        (_walk, (to_walk, 1, KEY_TERM, KEY_TERM_FIRST, NEEDS_DBIAS, EVEN_J, D)),
        (_sum_dq, (to_sum, KEY_TERM, D)),
        (_copy, (to_copy, D)),
    ], [4, 4, 1], [216, 56, 24])
    # fmt: on
