"""Forward for Hopper, in Gluon: warpgroups that share what a loading warp brings, and a softmax without a maximum.

    x = scale·⟨q, k⟩ + bias (⊕ key term), out = Σ_j softmax_j(x) · v

**Fixed shift.** A softmax is the same whatever is subtracted from the logits of a row. Instead of a maximum that
follows the tiles, each row keeps the maximum of its first tile (without the key term). Nothing then depends on the
tile before: no maximum, no rescaling, and products stay under way. Later logits may lie above the shift by the whole
range of the dtype. A row where that was not enough, or where all keys lie far below the shift, is seen by its sum and
leaves a row sum of NaN; `again.py` then computes its block in the usual way.

**Sharing.** A program works on ROWS rows r and BLOCKS blocks of queries at a time, a partition of warps for each pair.
One more warp copies k and v, used by BLOCKS partitions, and the bias, used by ROWS, through a ring in shared memory.
The bias comes in the order in which accumulators lie in registers (`bias.py`): a product starts from it.

Source of the roles: Shah et al. 2024 (FlashAttention-3), section 3.1.
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
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from trifast_inductor.kernels.triangle_attention.hopper import again
from trifast_inductor.kernels.triangle_attention.hopper import bias as bias_pass
from trifast_inductor.kernels.triangle_attention.hopper.choice import Shape, shape_for
from trifast_inductor.kernels.triangle_attention.hopper.descriptors import descriptor

# As triton 3.9 names them, or 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _exp2(x):
    # One instruction: gl.exp2 also takes care of results that are denormal.
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _unpack(words, dtype: gl.constexpr, BLOCK_J: gl.constexpr, NUM_WARPS: gl.constexpr, layout: gl.constexpr):
    """`[BLOCK_I, BLOCK_J]` in float32 of the words that `bias._bias_tiles` stored; nothing moves between threads."""
    if dtype == gl.bfloat16:
        high = words.to(gl.float32, bitcast=True)  # chosen so that the low half rounds it right
        low = (words << 16).to(gl.float32, bitcast=True)
    else:
        high = (words >> 16).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        low = words.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    x = gl.join(high, low).reshape([BLOCK_J // 16, NUM_WARPS, 8, 4, 2, 2, 2]).permute([1, 4, 2, 0, 6, 3, 5])
    return gl.convert_layout(x.reshape([16 * NUM_WARPS, BLOCK_J]), layout, assert_trivial=True)


@gluon.jit
def _row_max(x):
    """Over pairs, as a tree: `gl.max` takes a thread's elements one after the other, each waiting for the last."""
    ROWS: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    BLOCK_I: gl.constexpr = x.shape[0]
    BLOCK_J: gl.constexpr = x.shape[1]
    a, b = x.reshape([BLOCK_I, 2, BLOCK_J // 2]).permute([0, 2, 1]).split()
    half = gl.maximum(a, b)
    a, b = half.reshape([BLOCK_I, 2, BLOCK_J // 4]).permute([0, 2, 1]).split()
    return gl.convert_layout(gl.max(gl.maximum(a, b), 1), ROWS, assert_trivial=True)


@gluon.jit
def _place(item, groups, H, row_groups):
    """Blocks of queries innermost, then heads, then rows: programs that run together share k, v and bias in L2."""
    b = item // (groups * H * row_groups)
    return b, item // (groups * H) % row_groups, item // groups % H, item % groups


@gluon.jit
def _next_place(b, rows, h, group, b_step, rows_step, h_step, group_step, groups, H, row_groups):
    """A step further, by carries: divisions take longer than the rest of what is done once an item."""
    group += group_step
    over = (group >= groups).to(gl.int32)
    group -= over * groups
    h += h_step + over
    over = (h >= H).to(gl.int32)
    h -= over * H
    rows += rows_step + over
    over = (rows >= row_groups).to(gl.int32)
    return b + b_step + over, rows - over * row_groups, h, group


@gluon.jit
def _copy(
    shared,
    ROWS: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    BLOCK_I: gl.constexpr,
    BLOCK_J: gl.constexpr,
    D: gl.constexpr,
):
    """The loading warp: the items of the program, as far ahead of the others as there are stages."""
    (
        q_desc, k_desc, v_desc, words_desc, q_smem, k_smem, v_smem, words_smem, q_full, q_empty, full, empty,
        H, row_groups, groups, stages, items,
    ) = shared  # fmt: skip
    STAGE_J: gl.constexpr = TILES * BLOCK_J
    slot = 0
    phase = 1
    turn = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        b, rows, h, group = _place(item, groups, H, row_groups)
        side = turn & 1
        mbarrier.wait(q_empty.index(side), (turn >> 1 & 1) ^ 1)
        mbarrier.expect(q_full.index(side), 2 * ROWS * BLOCKS * BLOCK_I * D)
        for m in gl.static_range(ROWS):
            for n in gl.static_range(BLOCKS):
                q_at = [b, rows * ROWS + m, (group * BLOCKS + n) * BLOCK_I, h, 0]
                _async_load(q_desc, q_at, q_full.index(side), q_smem.index((side * ROWS + m) * BLOCKS + n))
        turn += 1  # noqa: SIM113
        # One stage more at the very end, not used: the others read a tile ahead.
        after = (item + gl.num_programs(0) >= items).to(gl.int32)
        for n_stage in range(stages + after):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), 2 * (2 * ROWS * STAGE_J * D + BLOCKS * BLOCK_I * STAGE_J))
            stage = gl.minimum(n_stage, stages - 1)
            for m in gl.static_range(ROWS):
                k_at = [b, rows * ROWS + m, stage * STAGE_J, h, 0]
                _async_load(k_desc, k_at, full.index(slot), k_smem.index(slot * ROWS + m))
                _async_load(v_desc, k_at, full.index(slot), v_smem.index(slot * ROWS + m))
            for n in gl.static_range(BLOCKS):
                block = ((b * H + h) * groups + group) * BLOCKS + n
                for tile in gl.static_range(TILES):
                    words_at = [((block * stages + stage) * TILES + tile) * BLOCK_I, 0]
                    into = words_smem.index((slot * BLOCKS + n) * TILES + tile)
                    _async_load(words_desc, words_at, full.index(slot), into)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _attend(
    shared,
    WHICH: gl.constexpr,  # of the ROWS·BLOCKS partitions
    ROWS: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    BLOCK_J: gl.constexpr,
    D: gl.constexpr,
    KEY_TERM: gl.constexpr,
    NEXT_FIRST: gl.constexpr,
    SUM_BY_PRODUCT: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    """One block of queries of one row, for each item of the program."""
    (
        q_smem, k_smem, v_smem, words_smem, ones, q_full, q_empty, full, empty,
        key_ptr, flags_ptr, out_ptr, row_max_ptr, row_sum_ptr, stride_key_b, stride_key_r, stride_key_j,
        R, H, I, J, row_groups, groups, stages, items, scale, fill,
    ) = shared  # fmt: skip
    BLOCK_I: gl.constexpr = 16 * NUM_WARPS
    STAGE_J: gl.constexpr = TILES * BLOCK_J
    M: gl.constexpr = WHICH // BLOCKS
    N: gl.constexpr = WHICH % BLOCKS
    dtype: gl.constexpr = q_smem.dtype
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_J, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, D, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, 8, 16])
    Q: gl.constexpr = gl.DotOperandLayout(0, X, 2)
    WORDS: gl.constexpr = gl.BlockedLayout([1, 4], [256 // BLOCK_J, BLOCK_J // 8], [NUM_WARPS, 1], [1, 0])
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    # Below, what p has lost to its smallest values may show; above, sums of p·v may overflow.
    LEAST: gl.constexpr = 2.0**-64 if dtype == gl.bfloat16 else 0.125
    MOST: gl.constexpr = 2.0**64

    x_keys = gl.arange(0, BLOCK_J, layout=gl.SliceLayout(0, X))
    out_rows = gl.arange(0, BLOCK_I, layout=OUT_ROWS)
    out_columns = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))
    factor = scale * LOG2E

    b, rows, h, group = _place(gl.program_id(0), groups, H, row_groups)
    b_step, rows_step, h_step, group_step = _place(gl.num_programs(0), groups, H, row_groups)
    slot = 0
    phase = 0
    before = 0
    turn = 0
    # x is always one tile ahead, over the end of an item too.
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(full.index(0), 0)
    q = q_smem.index(WHICH).reshape([BLOCK_I, D])
    if Q_IN_REGISTERS:
        q = q.load(Q)
    k = k_smem.index(M).reshape([STAGE_J, D]).slice(0, BLOCK_J).permute((1, 0))
    words = words_smem.index(N * TILES).load(WORDS)
    x = warpgroup_mma(q, k, _unpack(words, dtype, BLOCK_J, NUM_WARPS, X), is_async=True)
    x = warpgroup_mma_wait(0, deps=(x,))
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        r = rows * ROWS + M
        flag = 0
        if KEY_TERM != "none":
            some_r = gl.minimum(r, R - 1)
            row_key_ptr = key_ptr + b.to(gl.int64) * stride_key_b + some_r.to(gl.int64) * stride_key_r
            row_flags_ptr = flags_ptr + (b * R + some_r) * stages
            flag = gl.load(row_flags_ptr)
        side = turn & 1
        turn += 1  # noqa: SIM113
        # In units of x, that is over the scale.
        row_max = _row_max(x)
        shift = row_max * factor
        acc = warpgroup_mma_init(gl.zeros([BLOCK_I, D], gl.float32, OUT))
        row_sum = gl.zeros([BLOCK_I, 8], gl.float32, SUM)
        if SUM_BY_PRODUCT:
            row_sum = warpgroup_mma_init(row_sum)
        for stage in range(stages):
            masked = flag
            if KEY_TERM != "none":
                flag = gl.load(row_flags_ptr + stage + 1)
            for n in gl.static_range(TILES):
                if KEY_TERM != "none" and masked != 0:
                    j = stage * STAGE_J + n * BLOCK_J + x_keys
                    key = gl.load(row_key_ptr + j.to(gl.int64) * stride_key_j, mask=j < J, other=0)
                    if KEY_TERM == "add":
                        x = x + gl.expand_dims(key.to(gl.float32) * (1.0 / scale), 0)
                    else:
                        x = gl.where(gl.expand_dims((key != 0) & (j < J), 0), fill / scale, x)
                here = slot
                if n == TILES - 1:
                    slot += 1
                    if slot == STAGES:
                        slot = 0
                        phase ^= 1
                    if stage == stages - 1:
                        side ^= 1
                        mbarrier.wait(q_full.index(side), turn >> 1 & 1, pred=item + gl.num_programs(0) < items)
                        if Q_IN_REGISTERS:
                            q = q_smem.index(side * (ROWS * BLOCKS) + WHICH).reshape([BLOCK_I, D]).load(Q)
                    mbarrier.wait(full.index(slot), phase)
                if not Q_IN_REGISTERS:
                    q = q_smem.index(side * (ROWS * BLOCKS) + WHICH).reshape([BLOCK_I, D])
                k = k_smem.index(slot * ROWS + M).reshape([STAGE_J, D])
                k = k.slice((n + 1) % TILES * BLOCK_J, BLOCK_J).permute((1, 0))
                words = words_smem.index((slot * BLOCKS + N) * TILES + (n + 1) % TILES).load(WORDS)
                p = _exp2(x * factor - gl.expand_dims(shift, 1))
                if not SUM_BY_PRODUCT:
                    part = gl.sum(p.reshape([BLOCK_I, BLOCK_J // 8, 8]), 1)
                    row_sum = row_sum + gl.convert_layout(part, SUM, assert_trivial=True)
                p = p.to(dtype)
                # Before the second product of this tile, which may then run on under the exponentials of the next; or
                # after it, for which there are always registers.
                if NEXT_FIRST:
                    next_x = warpgroup_mma(q, k, _unpack(words, dtype, BLOCK_J, NUM_WARPS, X), is_async=True)
                v = v_smem.index(here * ROWS + M).reshape([STAGE_J, D]).slice(n * BLOCK_J, BLOCK_J)
                acc = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, OUT, 2)), v, acc, is_async=True)
                if SUM_BY_PRODUCT:
                    row_sum = warpgroup_mma(
                        gl.convert_layout(p, gl.DotOperandLayout(0, SUM, 2)), ones, row_sum, is_async=True
                    )
                if NEXT_FIRST:
                    x = warpgroup_mma_wait(1 + SUM_BY_PRODUCT, deps=(next_x,))
                else:
                    next_x = warpgroup_mma(q, k, _unpack(words, dtype, BLOCK_J, NUM_WARPS, X), is_async=True)
                    x = warpgroup_mma_wait(0, deps=(next_x,))
                if n == 0:
                    # The last product with the v of the stage before is done.
                    mbarrier.arrive(empty.index(before), count=1, pred=(stage > 0) | (turn > 1))
            before = here

        if SUM_BY_PRODUCT:
            acc, row_sum = warpgroup_mma_wait(0, deps=(acc, row_sum))
            total = gl.max(row_sum, 1)  # its eight columns are the same
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
            total = gl.sum(row_sum, 1)
        mbarrier.arrive(q_empty.index((turn - 1) & 1), count=1)
        total = gl.convert_layout(total, OUT_ROWS)
        top = gl.convert_layout(row_max, OUT_ROWS) * scale
        out = acc * gl.expand_dims(1.0 / total, 1)
        # Far from zero, the backward's x - row_max would be off by the rounding of x·factor and shift here.
        sound = (total > LEAST) & (total < MOST) & (gl.abs(top) < 4096.0) & (gl.abs(gl.sum(out, 1)) < float("inf"))
        i = (group * BLOCKS + N) * BLOCK_I + out_rows
        row = (b * R + r).to(gl.int64)
        in_range = (i < I) & (r < R)
        out_ptrs = out_ptr + row * I * H * D + h * D + gl.expand_dims(i * (H * D), 1) + gl.expand_dims(out_columns, 0)
        gl.store(out_ptrs, out.to(dtype), mask=gl.expand_dims(in_range, 1))
        statistics = (row * H + h) * I
        gl.store(row_max_ptr + statistics + i, top, mask=in_range)
        gl.store(row_sum_ptr + statistics + i, gl.where(sound, total, float("nan")), mask=in_range)
        b, rows, h, group = _next_place(
            b, rows, h, group, b_step, rows_step, h_step, group_step, groups, H, row_groups
        )  # fmt: skip


# Compiled once for all lengths.
@gluon.jit(do_not_specialize=["R", "H", "I", "J", "row_groups", "groups", "stages", "items"])
def _triangle_attention_fwd_hopper(
    q_desc,
    k_desc,
    v_desc,
    words_desc,  # of `bias.tiles`
    key_ptr,
    flags_ptr,  # of `bias.key_flags`
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    stride_key_b,
    stride_key_r,
    stride_key_j,
    R,
    H,
    I,
    J,
    row_groups,
    groups,  # of blocks of queries
    stages,  # of keys
    items,
    scale,
    fill,
    D: gl.constexpr,
    KEY_TERM: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCKS: gl.constexpr,
    BLOCK_J: gl.constexpr,
    TILES: gl.constexpr,  # of a stage
    STAGES: gl.constexpr,
    NEXT_FIRST: gl.constexpr,
    SUM_BY_PRODUCT: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr,
    REGISTERS: gl.constexpr,
    NUM_WARPS: gl.constexpr,  # of a partition
):
    gl.static_assert(TILES > 1 or STAGES > 2, "a stage is given back a tile after the next one is waited for")
    BLOCK_I: gl.constexpr = 16 * NUM_WARPS
    STAGE_J: gl.constexpr = TILES * BLOCK_J
    COUNT: gl.constexpr = ROWS * BLOCKS
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2 * COUNT, 1, 1, BLOCK_I, 1, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * ROWS, 1, 1, STAGE_J, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * ROWS, 1, 1, STAGE_J, 1, D], v_desc.layout)
    words_smem = gl.allocate_shared_memory(
        gl.int32, [STAGES * BLOCKS * TILES, BLOCK_I, BLOCK_J // 2], words_desc.layout
    )
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_J, 16, rank=2)
    FILLED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [NUM_WARPS, 1], [1, 0])
    ones = gl.allocate_shared_memory(dtype, [8, BLOCK_J], SWIZZLED, gl.full([8, BLOCK_J], 1.0, dtype, FILLED))
    ones = ones.permute((1, 0))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=COUNT)
    for n in gl.static_range(2):
        mbarrier.init(q_full.index(n), count=1)
        mbarrier.init(q_empty.index(n), count=COUNT)
    fence_async_shared()
    _barrier()
    to_copy = (
        q_desc, k_desc, v_desc, words_desc, q_smem, k_smem, v_smem, words_smem, q_full, q_empty, full, empty,
        H, row_groups, groups, stages, items,
    )  # fmt: skip
    to_attend = (
        q_smem, k_smem, v_smem, words_smem, ones, q_full, q_empty, full, empty,
        key_ptr, flags_ptr, out_ptr, row_max_ptr, row_sum_ptr, stride_key_b, stride_key_r, stride_key_j,
        R, H, I, J, row_groups, groups, stages, items, scale, fill,
    )  # fmt: skip
    # fmt: off
    if COUNT == 1:
        gl.warp_specialize([
            (_attend, (to_attend, 0, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, KEY_TERM, NEXT_FIRST,
                SUM_BY_PRODUCT, Q_IN_REGISTERS, NUM_WARPS)),
            (_copy, (to_copy, ROWS, BLOCKS, STAGES, TILES, BLOCK_I, BLOCK_J, D)),
        ], [1], [24])
    elif COUNT == 2:
        gl.warp_specialize([
            (_attend, (to_attend, 0, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, KEY_TERM, NEXT_FIRST,
                SUM_BY_PRODUCT, Q_IN_REGISTERS, NUM_WARPS)),
            (_attend, (to_attend, 1, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, KEY_TERM, NEXT_FIRST,
                SUM_BY_PRODUCT, Q_IN_REGISTERS, NUM_WARPS)),
            (_copy, (to_copy, ROWS, BLOCKS, STAGES, TILES, BLOCK_I, BLOCK_J, D)),
        ], [NUM_WARPS, 1], [REGISTERS, 24])
    elif COUNT == 3:
        gl.warp_specialize([
            (_attend, (to_attend, 0, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, KEY_TERM, NEXT_FIRST,
                SUM_BY_PRODUCT, Q_IN_REGISTERS, NUM_WARPS)),
            (_attend, (to_attend, 1, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, KEY_TERM, NEXT_FIRST,
                SUM_BY_PRODUCT, Q_IN_REGISTERS, NUM_WARPS)),
            (_attend, (to_attend, 2, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, KEY_TERM, NEXT_FIRST,
                SUM_BY_PRODUCT, Q_IN_REGISTERS, NUM_WARPS)),
            (_copy, (to_copy, ROWS, BLOCKS, STAGES, TILES, BLOCK_I, BLOCK_J, D)),
        ], [NUM_WARPS, NUM_WARPS, 1], [REGISTERS, REGISTERS, 24])
    else:
        gl.warp_specialize([
            (_attend, (to_attend, 0, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, KEY_TERM, NEXT_FIRST,
                SUM_BY_PRODUCT, Q_IN_REGISTERS, NUM_WARPS)),
            (_attend, (to_attend, 1, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, KEY_TERM, NEXT_FIRST,
                SUM_BY_PRODUCT, Q_IN_REGISTERS, NUM_WARPS)),
            (_attend, (to_attend, 2, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, KEY_TERM, NEXT_FIRST,
                SUM_BY_PRODUCT, Q_IN_REGISTERS, NUM_WARPS)),
            (_attend, (to_attend, 3, ROWS, BLOCKS, STAGES, TILES, BLOCK_J, D, KEY_TERM, NEXT_FIRST,
                SUM_BY_PRODUCT, Q_IN_REGISTERS, NUM_WARPS)),
            (_copy, (to_copy, ROWS, BLOCKS, STAGES, TILES, BLOCK_I, BLOCK_J, D)),
        ], [NUM_WARPS, NUM_WARPS, NUM_WARPS, 1], [REGISTERS, REGISTERS, REGISTERS, 24])
    # fmt: on


def fixed_shift(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    key_bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    fill: float,
    shape: Shape | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `launch` gives but for the rows for which a fixed shift is no good: their row sum is NaN."""
    B, R, I, H, D = q.shape
    J = k.shape[2]
    shape = shape or shape_for(D)
    BLOCK_I, STAGE_J = 16 * shape.NUM_WARPS, shape.TILES * shape.BLOCK_J
    row_groups, groups = triton.cdiv(R, shape.ROWS), triton.cdiv(I, shape.BLOCKS * BLOCK_I)
    stages = triton.cdiv(J, STAGE_J)
    items = B * row_groups * H * groups
    out = torch.empty((B, R, I, H, D), dtype=q.dtype, device=q.device)
    row_max = torch.empty((B, R, H, I), dtype=torch.float32, device=q.device)
    row_sum = torch.empty_like(row_max)
    key = key_bias if key_mask is None else key_mask.view(torch.uint8)
    with torch.cuda.device_of(q):
        words = bias_pass.tiles(
            bias, scale, groups * shape.BLOCKS, stages * shape.TILES, BLOCK_I=BLOCK_I, BLOCK_J=shape.BLOCK_J
        )
        programs = torch.cuda.get_device_properties(q.device).multi_processor_count * shape.PROGRAMS
        _triangle_attention_fwd_hopper[(min(items, programs),)](
            descriptor(q, [1, 1, BLOCK_I, 1, D]),
            descriptor(k, [1, 1, STAGE_J, 1, D]),
            descriptor(v, [1, 1, STAGE_J, 1, D]),
            descriptor(words, [BLOCK_I, shape.BLOCK_J // 2]),
            key,
            None if key is None else bias_pass.key_flags(key, stages, STAGE_J),
            out,
            row_max,
            row_sum,
            *((0, 0, 0) if key is None else key.stride()),
            R,
            H,
            I,
            J,
            row_groups,
            groups,
            stages,
            items,
            scale,
            fill,
            D=D,
            KEY_TERM="none" if key is None else ("add" if key_mask is None else "select"),
            ROWS=shape.ROWS,
            BLOCKS=shape.BLOCKS,
            BLOCK_J=shape.BLOCK_J,
            TILES=shape.TILES,
            STAGES=shape.STAGES,
            NEXT_FIRST=shape.NEXT_FIRST,
            SUM_BY_PRODUCT=shape.SUM_BY_PRODUCT,
            Q_IN_REGISTERS=shape.Q_IN_REGISTERS,
            REGISTERS=shape.REGISTERS,
            NUM_WARPS=shape.NUM_WARPS,
            num_warps=shape.NUM_WARPS,
            **({} if shape.maxnreg is None else {"maxnreg": shape.maxnreg}),
        )
    return out, row_max, row_sum


def launch(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """As the portable `launch`, for calls that `choice.refusal` lets through and with at least one element.

    The row maximum is the shift of a row and the row sum is relative to it: all that the backward asks of them.
    """
    out, row_max, row_sum = fixed_shift(q, k, v, bias, key_bias, key_mask, scale, fill, shape)
    again.launch(q, k, v, bias, key_bias, key_mask, out, row_max, row_sum, scale, fill, key_term_first)
    return out, row_max, row_sum
