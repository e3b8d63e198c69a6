"""A partition of the Hopper forward in which each row is shifted by the maximum of its first tile.

The product with the next k starts from the bias and comes last of a tile's products, so that it needs no registers of
its own; exponentials begin when all have ended.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from trifast_inductor.kernels.triangle_attention.hopper.items import store, told
from trifast_inductor.kernels.triangle_attention.hopper.registers import (
    LOG2E,
    exp2,
    operand,
    pairs,
    row_max,
    row_sums,
    unpack,
)
from trifast_inductor.kernels.triangle_attention.hopper.ring import advance


@gluon.jit
def attend_shifted(
    shared,
    WHICH: gl.constexpr,  # of the ROWS·BLOCKS partitions
    ROWS: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    TILES: gl.constexpr,
    BLOCK_J: gl.constexpr,
    D: gl.constexpr,
    HAS_KEY_TERM: gl.constexpr,
    SUM_BY_PRODUCT: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    """One block of queries of one row, for each item of the program."""
    (
        at_smem, q_smem, k_smem, v_smem, words_smem, terms_smem, ones, q_full, q_empty, full, empty,
        flags_ptr, out_ptr, row_max_ptr, row_sum_ptr, R, H, I, stages, scale,
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
    factor = scale * LOG2E

    slot = 0
    phase = 0
    before = 0
    turn = 0
    # x is always one tile ahead, over the end of an item too.
    mbarrier.wait(q_full, 0)
    q = pairs(q_smem.index(WHICH).reshape([BLOCK_I, D]).load(Q))
    b, rows, h, group = told(at_smem, NUM_WARPS)
    mbarrier.arrive(q_empty, count=1)
    mbarrier.wait(full.index(0), 0)
    k = k_smem.index(M).reshape([STAGE_J, D]).slice(0, BLOCK_J).permute((1, 0))
    words = words_smem.index(N * TILES).load(WORDS)
    x = warpgroup_mma(operand(q, dtype, Q), k, unpack(words, dtype, BLOCK_J, NUM_WARPS, X), is_async=True)
    x = warpgroup_mma_wait(0, deps=(x,))
    while b >= 0:
        r = rows * ROWS + M
        flag = 0
        if HAS_KEY_TERM:
            row_flags_ptr = flags_ptr + (b * R + gl.minimum(r, R - 1)) * stages
            flag = gl.load(row_flags_ptr)
        turn += 1
        # In units of x, that is over the scale.
        top = row_max(x)
        shift = top * factor
        acc = warpgroup_mma_init(gl.zeros([BLOCK_I, D], gl.float32, OUT))
        row_sum = gl.zeros([BLOCK_I, 8], gl.float32, SUM)
        if SUM_BY_PRODUCT:
            row_sum = warpgroup_mma_init(row_sum)
        for stage in range(stages):
            masked = flag
            if HAS_KEY_TERM:
                flag = gl.load(row_flags_ptr + stage + 1)
            for n in gl.static_range(TILES):
                if HAS_KEY_TERM and masked != 0:
                    terms = terms_smem.index(slot * ROWS + M).slice(n * BLOCK_J, BLOCK_J).load(gl.SliceLayout(0, X))
                    x = x + gl.expand_dims(terms, 0)
                here = slot
                if n == TILES - 1:
                    slot, phase = advance(slot, phase, STAGES)
                    if stage == stages - 1:
                        mbarrier.wait(q_full, turn & 1)
                        q = pairs(q_smem.index(WHICH).reshape([BLOCK_I, D]).load(Q))
                    mbarrier.wait(full.index(slot), phase)
                k = k_smem.index(slot * ROWS + M).reshape([STAGE_J, D])
                k = k.slice((n + 1) % TILES * BLOCK_J, BLOCK_J).permute((1, 0))
                words = words_smem.index((slot * BLOCKS + N) * TILES + (n + 1) % TILES).load(WORDS)
                p = exp2(x * factor - gl.expand_dims(shift, 1))
                if not SUM_BY_PRODUCT:
                    row_sum = row_sum + row_sums(p, SUM)
                p = p.to(dtype)
                v = v_smem.index(here * ROWS + M).reshape([STAGE_J, D]).slice(n * BLOCK_J, BLOCK_J)
                acc = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, OUT, 2)), v, acc, is_async=True)
                if SUM_BY_PRODUCT:
                    row_sum = warpgroup_mma(
                        gl.convert_layout(p, gl.DotOperandLayout(0, SUM, 2)), ones, row_sum, is_async=True
                    )
                next_x = warpgroup_mma(
                    operand(q, dtype, Q), k, unpack(words, dtype, BLOCK_J, NUM_WARPS, X), is_async=True
                )
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
        total = gl.convert_layout(total, gl.SliceLayout(1, OUT))
        top = gl.convert_layout(top, gl.SliceLayout(1, OUT)) * scale
        store(out_ptr, row_max_ptr, row_sum_ptr, acc, total, top, b, r, h, group * BLOCKS + N, R, H, I)
        b, rows, h, group = told(at_smem, NUM_WARPS)
        mbarrier.arrive(q_empty, count=1)
