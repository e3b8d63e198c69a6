"""All gradients of up to 192 queries and keys in one pass, for Hopper, in Gluon: five products, an exponential a logit.

    p = exp(x - row_max) / row_sum     ds = p·(⟨grad_out, v⟩ - δ)     x as in `logits.py`
    dv = pᵀ·grad_out     dk = scale·dsᵀ·q     dq = scale·ds·k     dbias = Σ_r ds

**Roles.** A program owns some rows r of one head. The bias lies in shared memory and dbias in registers over all of
them; one warp copies row after row, and eight walk them in tiles of 64 by 64, block of keys by block of keys. dbias is
summed over the programs of a head afterwards (`sums.py`).

**Order.** p and ds of a tile go through shared memory to the products that sum over queries or keys. Those run, as do
the logits and ⟨grad_out, v⟩ of the next tile, while the exponentials of the next tile are taken: one barrier a tile. A
product that begins anew is given the registers of the one before it: zeros of its own would have ptxas wait after every
product. Gradients leave through shared memory a tile later.

**Registers** are what binds: dbias alone takes 144 of 240 where there are nine tiles. So what the compiler would keep
or compute ahead it is made to find when it is wanted: `_again`, `added_now`, and loads that stand late or twice.
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
from trifast_inductor.kernels.triangle_attention.hopper.registers import LOG2E, added_now, exp2, with_key_term
from trifast_inductor.kernels.triangle_attention.hopper.tuples import appended, places, replaced, zeros
from trifast_inductor.kernels.triangle_attention.hopper.versions import async_load, async_store, barrier, store_wait

SIDE = gl.constexpr(64)  # queries, and keys, of a tile
STAGES = gl.constexpr(2)  # rows in shared memory


@gluon.jit
def _pieces(count: gl.constexpr, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """Shared memory, apart: Triton lets all warps wait before a store where another part of an allocation is read."""
    pieces = ()
    for _ in gl.static_range(count):
        pieces = appended(pieces, gl.allocate_shared_memory(dtype, shape, layout))
    return pieces


@gluon.jit
def _copy(shared, D: gl.constexpr, TI: gl.constexpr, TJ: gl.constexpr):
    """The loading warp: the bias, and row after row what the others read, as soon as there is room."""
    (
        q_desc, do_desc, out_desc, k_desc, v_desc, bias_desc, q_smem, do_smem, out_smem, k_smem, v_smem, bias_smem,
        full, empty, b, h, first_row, count,
    ) = shared  # fmt: skip
    mbarrier.expect(full.index(0), 2 * SIDE * (SIDE * TI * TJ + D * (3 * TI + 2 * TJ)))
    for t in gl.static_range(TI * TJ):
        async_load(bias_desc, [b, h, t % TI * SIDE, t // TI * SIDE], full.index(0), bias_smem.index(t))
    for n in range(count):
        r = first_row + n
        stage = n % STAGES
        bar = full.index(stage)
        if n > 0:
            mbarrier.wait(empty.index(stage), (n - 1) // STAGES & 1)
            mbarrier.expect(bar, 2 * SIDE * D * (3 * TI + 2 * TJ))
        for i in gl.static_range(TI):
            async_load(q_desc, [b, r, i * SIDE, h, 0], bar, q_smem.index(stage * TI + i))
        for j in gl.static_range(TJ):
            async_load(k_desc, [b, r, j * SIDE, h, 0], bar, k_smem.index(stage * TJ + j))
        for i in gl.static_range(TI):
            async_load(do_desc, [b, r, i * SIDE, h, 0], bar, do_smem.index(stage * TI + i))
        for j in gl.static_range(TJ):
            async_load(v_desc, [b, r, j * SIDE, h, 0], bar, v_smem.index(stage * TJ + j))
        for i in gl.static_range(TI):
            async_load(out_desc, [b, r, i * SIDE, h, 0], bar, out_smem[i])


@gluon.jit
def _logits_and_dp(smems, stage, x, dp, i: gl.constexpr, j: gl.constexpr, D: gl.constexpr, counts: gl.constexpr):
    """Both products of a tile, under way, in the registers of those of the tile before."""
    q_smem, do_smem, k_smem, v_smem = smems
    q = q_smem.index(stage * counts[0] + i).reshape([SIDE, D])
    k = k_smem.index(stage * counts[1] + j).reshape([SIDE, D])
    do = do_smem.index(stage * counts[0] + i).reshape([SIDE, D])
    v = v_smem.index(stage * counts[1] + j).reshape([SIDE, D])
    x = warpgroup_mma(q, k.permute((1, 0)), x, use_acc=False, is_async=True)
    dp = warpgroup_mma(do, v.permute((1, 0)), dp, use_acc=False, is_async=True)
    return x, dp


@gluon.jit
def _again(x):
    """x, of which nothing that follows can be computed ahead: descriptors of all tiles would not fit the registers."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 t; mov.u32 t, %dynamic_smem_size; shr.u32 t, t, 30; add.u32 $0, $1, t; }",
        "=r,r",
        [x],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _walk(
    shared,
    KEY_TERM: gl.constexpr,
    KEY_TERM_FIRST: gl.constexpr,
    NEEDS_DBIAS: gl.constexpr,
    EVEN_J: gl.constexpr,
    D: gl.constexpr,
    TI: gl.constexpr,
    TJ: gl.constexpr,
):
    """The gradients of the rows of the program."""
    (
        dq_desc, dk_desc, dv_desc, q_smem, do_smem, out_smem, k_smem, v_smem, bias_smem, p_smem, ds_smem, dq_smem,
        dk_smem, dv_smem, line_smems, full, empty, ptrs, strides, parts_ptr, b, h, group, first_row, count, B, R, H, I,
        J, scale, fill,
    ) = shared  # fmt: skip
    dtype: gl.constexpr = q_smem.dtype
    TILES: gl.constexpr = TI * TJ
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, SIDE // 2, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, D // 2, 16])
    BY_I: gl.constexpr = gl.SliceLayout(1, X)
    BY_J: gl.constexpr = gl.SliceLayout(0, X)
    max_smem, sum_smem, key_smem, delta_smem = line_smems
    smems = (q_smem, do_smem, k_smem, v_smem)
    lines = load_lines(ptrs, strides, b, first_row, h, R, H, I, J, KEY_TERM, TI, TJ, 8)
    dbias = zeros(TILES if NEEDS_DBIAS else 0, [SIDE, SIDE], X)
    dq = zeros(TI, [SIDE, D], OUT)
    dv = gl.zeros([SIDE, D], gl.float32, OUT)
    dk = gl.zeros([SIDE, D], gl.float32, OUT)
    x = gl.zeros([SIDE, SIDE], gl.float32, X)
    dp = gl.zeros([SIDE, SIDE], gl.float32, X)
    mbarrier.wait(full.index(0), 0)
    leave_lines(lines, line_smems, places(do_smem, 0, TI), out_smem, D, 8)
    barrier()
    x, dp = _logits_and_dp(smems, 0, x, dp, 0, 0, D, (TI, TJ))
    x, dp = warpgroup_mma_wait(0, deps=(x, dp))
    for n in range(count):
        stage = n % STAGES
        has_next = n + 1 < count
        for j in gl.static_range(TJ):
            for i in gl.static_range(TI):
                if j * TI + i == TILES - 2:
                    # Of the next row, or the last one again.
                    next_row = first_row + _again(gl.minimum(n + 1, count - 1))
                    lines = load_lines(ptrs, strides, b, next_row, h, R, H, I, J, KEY_TERM, TI, TJ, 8)
                of_max = gl.expand_dims(max_smem[i].load(BY_I), 1)
                of_sum = gl.expand_dims(sum_smem[i].load(BY_I), 1)
                key = of_max
                if KEY_TERM != "none":
                    key = gl.expand_dims(key_smem[j].load(BY_J), 0)
                if TILES % 2 == 1 and i + j == 0:
                    # The last tile of the row before took the same shared memory for p and ds.
                    store_wait(0)
                    barrier()
                x = warpgroup_mma_wait(4, deps=(x,))
                bias = bias_smem.index(j * TI + i).reshape([SIDE, SIDE]).load(X)
                x = x * scale
                if KEY_TERM_FIRST:
                    x = with_key_term(x, key, fill, KEY_TERM)
                x = x + bias.to(gl.float32)
                if not KEY_TERM_FIRST:
                    x = with_key_term(x, key, fill, KEY_TERM)
                p = exp2((x - of_max) * LOG2E - of_sum)
                p_smem[(j * TI + i) % 2].index(0).store(p.to(dtype))
                dp, dv, dk, done = warpgroup_mma_wait(0, deps=(dp, dv, dk, dq[(i + TI - 1) % TI]))
                dq = replaced(dq, (i + TI - 1) % TI, done)
                delta = gl.expand_dims(delta_smem[i].load(BY_I), 1)
                ds = p * (dp - delta)
                if not EVEN_J and j == TJ - 1:
                    # Past the end a key has whatever the row maximum leaves of it, or NaN.
                    is_key = gl.expand_dims(j * SIDE + gl.arange(0, SIDE, layout=BY_J) < J, 0)
                    ds = gl.where(is_key, ds, 0.0)
                if NEEDS_DBIAS and KEY_TERM_FIRST:
                    dbias = replaced(dbias, j * TI + i, added_now(dbias[j * TI + i], ds))
                if KEY_TERM == "select":
                    key = gl.expand_dims(key_smem[j].load(BY_J), 0)
                    ds = gl.where(key != 0, 0.0, ds)
                if NEEDS_DBIAS and not KEY_TERM_FIRST:
                    dbias = replaced(dbias, j * TI + i, added_now(dbias[j * TI + i], ds))
                ds_smem[(j * TI + i) % 2].index(0).store(ds.to(dtype))
                # Gradients that the tile before has finished.
                if i == 0:
                    dv_smem.reshape([SIDE, D]).store(dv.to(dtype))
                    dk_smem.reshape([SIDE, D]).store((dk * scale).to(dtype))
                if i + j == 0:
                    dq_smem[TI - 1].reshape([SIDE, D]).store((dq[TI - 1] * scale).to(dtype))
                if j == TJ - 1 and i > 0:
                    dq_smem[i - 1].reshape([SIDE, D]).store((dq[i - 1] * scale).to(dtype))
                if i == TI - 1 and j == TJ - 1:
                    next_stage = (n + 1) % STAGES
                    mbarrier.wait(full.index(next_stage), (n + 1) // STAGES & 1, pred=has_next)
                    leave_lines(lines, line_smems, places(do_smem, next_stage * TI, TI), out_smem, D, 8)
                if i == 1 or TJ == 1:
                    # From the next tile on what is stored lies where those lay.
                    store_wait(0)
                fence_async_shared()
                barrier()
                zero = _again(0)
                stage = _again(stage)
                if j * TI + i + 1 < TILES:
                    x, dp = _logits_and_dp(smems, stage, x, dp, (i + 1) % TI, j + (i + 1) // TI, D, (TI, TJ))
                else:
                    # Of the next row; of the last one they are not used.
                    x, dp = _logits_and_dp(smems, next_stage, x, dp, 0, 0, D, (TI, TJ))
                q = q_smem.index(stage * TI + i).reshape([SIDE, D])
                do = do_smem.index(stage * TI + i).reshape([SIDE, D])
                k = k_smem.index(stage * TJ + j).reshape([SIDE, D])
                p_of_tile = p_smem[(j * TI + i) % 2].index(zero)
                ds_of_tile = ds_smem[(j * TI + i) % 2].index(zero)
                dv = warpgroup_mma(p_of_tile.permute((1, 0)), do, dv, use_acc=i > 0, is_async=True)
                dk = warpgroup_mma(ds_of_tile.permute((1, 0)), q, dk, use_acc=i > 0, is_async=True)
                done = warpgroup_mma(ds_of_tile, k, dq[i], use_acc=j > 0, is_async=True)
                dq = replaced(dq, i, done)
                r = first_row + n
                if i == 0 and j > 0:
                    async_store(dv_desc, [b, r, (j - 1) * SIDE, h, 0], dv_smem)
                    async_store(dk_desc, [b, r, (j - 1) * SIDE, h, 0], dk_smem)
                if j == TJ - 1 and i > 0:
                    async_store(dq_desc, [b, r, (i - 1) * SIDE, h, 0], dq_smem[i - 1])
                if i + j == 0:
                    if n > 0:
                        async_store(dv_desc, [b, r - 1, (TJ - 1) * SIDE, h, 0], dv_smem)
                        async_store(dk_desc, [b, r - 1, (TJ - 1) * SIDE, h, 0], dk_smem)
                        async_store(dq_desc, [b, r - 1, (TI - 1) * SIDE, h, 0], dq_smem[TI - 1])
                    # All are done with the row before, and with the output of this one.
                    mbarrier.arrive(empty.index((n + 1) % STAGES), count=1)
        # Under way into the next turn of the loop they would be copied, and every product waited for.
        x, dp, dv, dk, done = warpgroup_mma_wait(0, deps=(x, dp, dv, dk, dq[TI - 1]))
        dq = replaced(dq, TI - 1, done)
    dv_smem.reshape([SIDE, D]).store(dv.to(dtype))
    dk_smem.reshape([SIDE, D]).store((dk * scale).to(dtype))
    dq_smem[TI - 1].reshape([SIDE, D]).store((dq[TI - 1] * scale).to(dtype))
    fence_async_shared()
    barrier()
    r = first_row + count - 1
    async_store(dv_desc, [b, r, (TJ - 1) * SIDE, h, 0], dv_smem)
    async_store(dk_desc, [b, r, (TJ - 1) * SIDE, h, 0], dk_smem)
    async_store(dq_desc, [b, r, (TI - 1) * SIDE, h, 0], dq_smem[TI - 1])
    if NEEDS_DBIAS:
        # Tile by tile, and whole: rows of J would have to be stored number by number, each with a condition.
        parts_ptr += ((group * B + b) * H + h).to(gl.int64) * (TILES * SIDE * SIDE)
        of_tile = gl.expand_dims(gl.arange(0, SIDE, layout=BY_I) * SIDE, 1)
        of_tile = of_tile + gl.expand_dims(gl.arange(0, SIDE, layout=BY_J), 0)
        for t in gl.static_range(TILES):
            gl.store(parts_ptr + t * (SIDE * SIDE) + of_tile, dbias[t])
    store_wait(0)


# Compiled once for all lengths of so many tiles.
@gluon.jit(do_not_specialize=["B", "R", "H", "I", "J", "rows"])
def _triangle_attention_bwd_whole_hopper(
    q_desc,  # these, and the gradients, [B, R, I or J, H, D]
    do_desc,
    out_desc,
    k_desc,
    v_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    bias_desc,  # [B, H, I, J]
    key_ptr,
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    parts_ptr,  # [groups, B, H, TJ, TI, 64, 64] contiguous, float32
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
    TI: gl.constexpr,  # tiles of queries, 2 at least
    TJ: gl.constexpr,  # tiles of keys
):
    dtype: gl.constexpr = q_desc.dtype
    TILES: gl.constexpr = TI * TJ
    BOX: gl.constexpr = q_desc.layout
    q_smem = gl.allocate_shared_memory(dtype, [STAGES * TI, 1, 1, SIDE, 1, D], BOX)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES * TI, 1, 1, SIDE, 1, D], BOX)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * TJ, 1, 1, SIDE, 1, D], BOX)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * TJ, 1, 1, SIDE, 1, D], BOX)
    bias_smem = gl.allocate_shared_memory(dtype, [TILES, 1, 1, SIDE, SIDE], bias_desc.layout)
    SQUARE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    p_smem = _pieces(2, dtype, [1, SIDE, SIDE], SQUARE)
    ds_smem = _pieces(2, dtype, [1, SIDE, SIDE], SQUARE)
    out_smem = _pieces(TI, dtype, [1, 1, SIDE, 1, D], BOX)
    dk_smem = gl.allocate_shared_memory(dtype, [1, 1, SIDE, 1, D], BOX)
    dv_smem = gl.allocate_shared_memory(dtype, [1, 1, SIDE, 1, D], BOX)
    if TILES == 9:  # there is no more room
        last_smem = gl.allocate_shared_memory(dtype, [1, 1, SIDE, 1, D], BOX)
        dq_smem = (last_smem, dv_smem, last_smem)
    else:
        dq_smem = _pieces(TI, dtype, [1, 1, SIDE, 1, D], BOX)
    max_smem = _pieces(TI, gl.float32, [SIDE], FLAT)
    sum_smem = _pieces(TI, gl.float32, [SIDE], FLAT)
    delta_smem = _pieces(TI, gl.float32, [SIDE], FLAT)
    key_smem = ()
    if KEY_TERM != "none":
        key_smem = _pieces(TJ, key_ptr.dtype.element_ty, [SIDE], FLAT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(empty.index(n), count=1)
    fence_async_shared()
    barrier()

    b, h, group, first_row, count = own_rows(B, R, H, rows)
    to_copy = (
        q_desc, do_desc, out_desc, k_desc, v_desc, bias_desc, q_smem, do_smem, out_smem, k_smem, v_smem, bias_smem,
        full, empty, b, h, first_row, count,
    )  # fmt: skip
    to_walk = (
        dq_desc, dk_desc, dv_desc, q_smem, do_smem, out_smem, k_smem, v_smem, bias_smem, p_smem, ds_smem, dq_smem,
        dk_smem, dv_smem, (max_smem, sum_smem, key_smem, delta_smem), full, empty, (key_ptr, row_max_ptr, row_sum_ptr),
        (stride_key_b, stride_key_r, stride_key_j), parts_ptr, b, h, group, first_row, count, B, R, H, I, J, scale,
        fill,
    )  # fmt: skip
    gl.warp_specialize([
        (_walk, (to_walk, KEY_TERM, KEY_TERM_FIRST, NEEDS_DBIAS, EVEN_J, D, TI, TJ)),
        (_copy, (to_copy, D, TI, TJ)),
    ], [1], [24])  # fmt: skip
