"""All gradients of 65 to 128 queries and keys in one pass, for Hopper, in Gluon: each warp owns keys.

    p = exp(x - row_max) / row_sum     ds = p·(⟨grad_out, v⟩ - δ)     x as in `logits.py`
    dv = pᵀ·grad_out     dk = scale·dsᵀ·q     dq = scale·ds·k     dbias = Σ_r ds

**Roles.** A program owns some rows r of one head. Eight warps own 16 keys each: their tiles of logits are `[j, i]`, so
that p and ds are left operands of dv and dk in registers, and dbias stays in registers over all rows. ds alone goes
through shared memory, to four warps that make dq and find, a row ahead, what the eight want of a row's queries and
keys. One warp copies row after row. dbias is summed over the programs of a head afterwards (`sums.py`).

**Code** is scarce: the loops of all partitions share 32 KB of instruction cache. Two partitions of 64 keys each, which
Triton compiles one by one, take 38 KB, and warps wait for instructions a third of the time.

**Order.** dv is waited for before ds is rounded: only then are the registers of its operand p free, and there are no
others.
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

from trifast_inductor.kernels.triangle_attention.hopper.handing import FLAT
from trifast_inductor.kernels.triangle_attention.hopper.lines import leave_lines, load_lines, own_rows
from trifast_inductor.kernels.triangle_attention.hopper.registers import (
    LOG2E,
    added_now,
    exp2,
    packed_tile,
    unpacked_tile,
    with_key_term,
)
from trifast_inductor.kernels.triangle_attention.hopper.ring import advance
from trifast_inductor.kernels.triangle_attention.hopper.tuples import appended, places, replaced, zeros
from trifast_inductor.kernels.triangle_attention.hopper.versions import async_load, async_store, barrier, store_wait

SIDE = gl.constexpr(64)  # queries of a tile
KEYS = gl.constexpr(128)
TI = gl.constexpr(2)  # tiles of queries
STAGES = gl.constexpr(3)  # rows in shared memory


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
        mbarrier.expect(bar, 2 * D * (3 * TI * SIDE + 2 * KEYS))
        for i in gl.static_range(TI):
            at = [b, r, i * SIDE, h, 0]
            async_load(q_desc, at, bar, q_smem.index(slot * TI + i))
            async_load(do_desc, at, bar, do_smem.index(slot * TI + i))
            async_load(out_desc, at, bar, out_smem.index(slot * TI + i))
        async_load(k_desc, [b, r, 0, h, 0], bar, k_smem.index(slot))
        async_load(v_desc, [b, r, 0, h, 0], bar, v_smem.index(slot))
        slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _logits_and_dp(k_smem, v_smem, q_smem, do_smem, slot, x, dp, n: gl.constexpr, D: gl.constexpr):
    """Both products of a tile, under way, in the registers of those of the tile before."""
    k = k_smem.index(slot).reshape([KEYS, D])
    v = v_smem.index(slot).reshape([KEYS, D])
    q = q_smem.index(slot * TI + n).reshape([SIDE, D])
    do = do_smem.index(slot * TI + n).reshape([SIDE, D])
    x = warpgroup_mma(k, q.permute((1, 0)), x, use_acc=False, is_async=True)
    dp = warpgroup_mma(v, do.permute((1, 0)), dp, use_acc=False, is_async=True)
    return x, dp


@gluon.jit
def _walk(
    shared,
    KEY_TERM: gl.constexpr,
    KEY_TERM_FIRST: gl.constexpr,
    NEEDS_DBIAS: gl.constexpr,
    EVEN_J: gl.constexpr,
    D: gl.constexpr,
):
    """dk and dv of every row of the program, and dbias."""
    (
        dk_desc, dv_desc, q_smem, do_smem, k_smem, v_smem, words_smem, ds_smem, dk_smem, dv_smem, line_smems, full,
        empty, lines_full, ds_full, ds_empty, bias_ptr, bias_strides, parts_ptr, b, h, group, first_row, count, B, H, I,
        J, scale, fill,
    ) = shared  # fmt: skip
    max_smem, sum_smem, key_smem, delta_smem = line_smems
    dtype: gl.constexpr = q_smem.dtype
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, SIDE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    OF_OUT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0])
    BY_J: gl.constexpr = gl.SliceLayout(1, X)
    BY_I: gl.constexpr = gl.SliceLayout(0, X)
    j = gl.arange(0, KEYS, layout=BY_J)
    is_key = gl.expand_dims(j < J, 1)
    # The bias, once, as each thread wants it.
    stride_b, stride_h, stride_i, stride_j = bias_strides
    bias_ptr += b.to(gl.int64) * stride_b + h.to(gl.int64) * stride_h
    for n in gl.static_range(TI):
        i = gl.expand_dims(n * SIDE + gl.arange(0, SIDE, layout=BY_I), 0)
        at = i.to(gl.int64) * stride_i + gl.expand_dims(j, 1).to(gl.int64) * stride_j
        bias = gl.load(bias_ptr + at, mask=is_key & (i < I), other=0.0)
        words_smem.index(n).store(gl.convert_layout(packed_tile(bias), WORDS, assert_trivial=True))
    barrier()

    dbias = zeros(TI if NEEDS_DBIAS else 0, [KEYS, SIDE], X)
    x = gl.zeros([KEYS, SIDE], gl.float32, X)
    dp = gl.zeros([KEYS, SIDE], gl.float32, X)
    dk = gl.zeros([KEYS, D], gl.float32, OUT)
    dv = gl.zeros([KEYS, D], gl.float32, OUT)
    slot = 0
    phase = 0
    for n_row in range(count):
        r = first_row + n_row
        next_slot, next_phase = advance(slot, phase, STAGES)
        mbarrier.wait(full.index(slot), phase)
        x, dp = _logits_and_dp(k_smem, v_smem, q_smem, do_smem, slot, x, dp, 0, D)
        mbarrier.wait(lines_full.index(slot), phase)
        for n in gl.static_range(TI):
            do = do_smem.index(slot * TI + n).reshape([SIDE, D])
            q = q_smem.index(slot * TI + n).reshape([SIDE, D])
            words = words_smem.index(n).load(WORDS)
            x = warpgroup_mma_wait(2 if n > 0 else 1, deps=(x,))  # not for dp, nor for dk of the tile before
            key = is_key
            if KEY_TERM != "none":
                key = gl.expand_dims(key_smem.index(slot).load(BY_J), 1)  # handed over by lines_full
            x = x * scale
            if KEY_TERM_FIRST:
                x = with_key_term(x, key, fill, KEY_TERM)
            x = x + unpacked_tile(words, dtype, X)
            if not KEY_TERM_FIRST:
                x = with_key_term(x, key, fill, KEY_TERM)
            of_max = gl.expand_dims(max_smem.index(slot * TI + n).load(BY_I), 0)  # handed over by lines_full
            of_sum = gl.expand_dims(sum_smem.index(slot * TI + n).load(BY_I), 0)  # handed over by lines_full
            p = exp2((x - of_max) * LOG2E - of_sum)
            p16 = gl.convert_layout(p.to(dtype), OF_OUT)
            if n > 0:
                dp, dk = warpgroup_mma_wait(0, deps=(dp, dk))
            else:
                dp = warpgroup_mma_wait(0, deps=(dp,))
            dv = warpgroup_mma(p16, do, dv, use_acc=n > 0, is_async=True)
            delta = gl.expand_dims(delta_smem.index(slot * TI + n).load(BY_I), 0)  # handed over by lines_full
            ds = p * (dp - delta)
            if not EVEN_J:
                # Past the end a key has whatever the row maximum leaves of it, or NaN.
                ds = gl.where(is_key, ds, 0.0)
            if NEEDS_DBIAS and KEY_TERM_FIRST:
                dbias = replaced(dbias, n, added_now(dbias[n], ds))
            if KEY_TERM == "select":
                key = gl.expand_dims(key_smem.index(slot).load(BY_J), 1)  # handed over by lines_full
                ds = gl.where(key != 0, 0.0, ds)
            if NEEDS_DBIAS and not KEY_TERM_FIRST:
                dbias = replaced(dbias, n, added_now(dbias[n], ds))
            dv = warpgroup_mma_wait(0, deps=(dv,))
            ds16 = ds.to(dtype)
            if n + 1 < TI:
                x, dp = _logits_and_dp(k_smem, v_smem, q_smem, do_smem, slot, x, dp, n + 1, D)
            dk = warpgroup_mma(gl.convert_layout(ds16, OF_OUT), q, dk, use_acc=n > 0, is_async=True)
            mbarrier.wait(ds_empty.index(n), n_row & 1 ^ 1)
            ds_smem.index(n).store(ds16)
            fence_async_shared()
            barrier()
            mbarrier.arrive(ds_full.index(n), count=1)
        dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
        mbarrier.arrive(empty.index(slot), count=1)
        slot = next_slot
        phase = next_phase
        store_wait(0)
        barrier()
        dk_smem.reshape([KEYS, D]).store((dk * scale).to(dtype))
        dv_smem.reshape([KEYS, D]).store(dv.to(dtype))
        fence_async_shared()
        barrier()
        async_store(dk_desc, [b, r, 0, h, 0], dk_smem)
        async_store(dv_desc, [b, r, 0, h, 0], dv_smem)
    if NEEDS_DBIAS:
        # Tiles of 64 by 64, as `sums.py` has them.
        parts_ptr += ((group * B + b) * H + h).to(gl.int64) * (KEYS * TI * SIDE)
        at = gl.expand_dims(j // SIDE * (TI * SIDE * SIDE) + j % SIDE, 1)
        at = at + gl.expand_dims(gl.arange(0, SIDE, layout=BY_I), 0) * SIDE
        for n in gl.static_range(TI):
            gl.store(parts_ptr + n * (SIDE * SIDE) + at, dbias[n])
    store_wait(0)


@gluon.jit
def _sum_dq(shared, KEY_TERM: gl.constexpr, D: gl.constexpr):
    """What the others want of a row's queries and keys, a row ahead, and dq."""
    (
        dq_desc, k_smem, do_smem, out_smem, ds_smem, dq_smem, line_smems, full, empty, lines_full, ds_full, ds_empty,
        ptrs, strides, b, h, first_row, count, R, H, I, J, scale,
    ) = shared  # fmt: skip
    max_smem, sum_smem, key_smem, delta_smem = line_smems
    dtype: gl.constexpr = k_smem.dtype
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    slot = 0
    phase = 0
    ahead = 0
    ahead_phase = 0
    lines = load_lines(ptrs, strides, b, first_row, h, R, H, I, J, KEY_TERM, TI, KEYS // SIDE, 4)
    for n_row in range(count + 1):
        if n_row < count:
            mbarrier.wait(full.index(ahead), ahead_phase)
            keys = ()
            for n in gl.static_range(len(lines[2])):  # none where there is no key term
                keys = appended(keys, key_smem.index(ahead).slice(n * SIDE, SIDE))
            first = ahead * TI
            smems = (places(max_smem, first, TI), places(sum_smem, first, TI), keys, places(delta_smem, first, TI))
            leave_lines(lines, smems, places(do_smem, first, TI), places(out_smem, first, TI), D, 4)
            barrier()
            mbarrier.arrive(lines_full.index(ahead), count=1)
            ahead, ahead_phase = advance(ahead, ahead_phase, STAGES)
        # A turn ahead: from memory it takes as long as half a row.
        next_row = first_row + gl.minimum(n_row + 1, count - 1)
        lines = load_lines(ptrs, strides, b, next_row, h, R, H, I, J, KEY_TERM, TI, KEYS // SIDE, 4)
        if n_row > 0:
            for n in gl.static_range(TI):
                mbarrier.wait(ds_full.index(n), n_row - 1 & 1)
                dq = gl.zeros([SIDE, D], gl.float32, OUT)
                k = k_smem.index(slot).reshape([KEYS, D])
                dq = warpgroup_mma(ds_smem.index(n).permute((1, 0)), k, dq, use_acc=False, is_async=True)
                dq = warpgroup_mma_wait(0, deps=(dq,))
                mbarrier.arrive(ds_empty.index(n), count=1)
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
def _triangle_attention_bwd_whole_by_key_hopper(
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
    parts_ptr,  # [groups, B, H, 2, TI, 64, 64] contiguous, float32
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
    q_smem = gl.allocate_shared_memory(dtype, [STAGES * TI, 1, 1, SIDE, 1, D], BOX)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES * TI, 1, 1, SIDE, 1, D], BOX)
    out_smem = gl.allocate_shared_memory(dtype, [STAGES * TI, 1, 1, SIDE, 1, D], BOX)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, KEYS, 1, D], k_desc.layout)
    dk_smem = gl.allocate_shared_memory(dtype, [1, 1, KEYS, 1, D], k_desc.layout)
    dv_smem = gl.allocate_shared_memory(dtype, [1, 1, KEYS, 1, D], k_desc.layout)
    dq_smem = gl.allocate_shared_memory(dtype, [1, 1, SIDE, 1, D], BOX)
    ds_smem = gl.allocate_shared_memory(dtype, [TI, KEYS, SIDE], gl.NVMMASharedLayout(128, 16, rank=2))
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    words_smem = gl.allocate_shared_memory(gl.int32, [TI, KEYS, SIDE // 2], PLAIN)
    max_smem = gl.allocate_shared_memory(gl.float32, [STAGES * TI, SIDE], FLAT)
    sum_smem = gl.allocate_shared_memory(gl.float32, [STAGES * TI, SIDE], FLAT)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES * TI, SIDE], FLAT)
    key_smem = max_smem
    if KEY_TERM != "none":
        key_smem = gl.allocate_shared_memory(key_ptr.dtype.element_ty, [STAGES, KEYS], FLAT)
    line_smems = (max_smem, sum_smem, key_smem, delta_smem)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lines_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [TI, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [TI, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=2)
        mbarrier.init(lines_full.index(n), count=1)
    for n in gl.static_range(TI):
        mbarrier.init(ds_full.index(n), count=1)
        mbarrier.init(ds_empty.index(n), count=1)
    fence_async_shared()
    barrier()
    b, h, group, first_row, count = own_rows(B, R, H, rows)
    to_copy = (
        q_desc, do_desc, out_desc, k_desc, v_desc, q_smem, do_smem, out_smem, k_smem, v_smem, full, empty, b, h,
        first_row, count,
    )  # fmt: skip
    to_walk = (
        dk_desc, dv_desc, q_smem, do_smem, k_smem, v_smem, words_smem, ds_smem, dk_smem, dv_smem, line_smems, full,
        empty, lines_full, ds_full, ds_empty, bias_ptr, (stride_bias_b, stride_bias_h, stride_bias_i, stride_bias_j),
        parts_ptr, b, h, group, first_row, count, B, H, I, J, scale, fill,
    )  # fmt: skip
    to_sum = (
        dq_desc, k_smem, do_smem, out_smem, ds_smem, dq_smem, line_smems, full, empty, lines_full, ds_full, ds_empty,
        (key_ptr, row_max_ptr, row_sum_ptr), (stride_key_b, stride_key_r, stride_key_j), b, h, first_row, count, R, H,
        I, J, scale,
    )  # fmt: skip
    gl.warp_specialize([
        (_walk, (to_walk, KEY_TERM, KEY_TERM_FIRST, NEEDS_DBIAS, EVEN_J, D)),
        (_sum_dq, (to_sum, KEY_TERM, D)),
        (_copy, (to_copy, D)),
    ], [4, 1], [56, 24])  # fmt: skip
