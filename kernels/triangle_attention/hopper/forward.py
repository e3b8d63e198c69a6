"""Forward for Hopper, in Gluon: asynchronous products on warpgroups, whole rows of k and v in shared memory.

    x = scale·⟨q, k⟩ + bias (⊕ key term), out = Σ_j softmax_j(x) · v

A program owns one row r of one head and walks its blocks of queries. k and v are copied once, by the copy engine;
where they fit, no barrier stands in the inner loop and the warpgroups drift apart, so that one's products run
under another's exponentials. To issue few instructions per logit, the first product starts from the bias
(`bias.py`), the row sum is a product with ones, and the key term is looked at only in tiles that have one.

Source of the schedule: Shah et al. 2024 (FlashAttention-3), section 3, as far as the inner loop goes.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from trifast_inductor.kernels.triangle_attention.hopper import bias as bias_pass
from trifast_inductor.kernels.triangle_attention.hopper.choice import CHUNK_J, Shape, shape_for

# As triton 3.9 names them, or 3.6.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _exp2(x):
    # One instruction: gl.exp2 also takes care of results that are denormal.
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _load_words(ptr, WORDS: gl.constexpr, NUM_WARPS: gl.constexpr):
    """A tile of the bias, 16 bytes a thread at a time."""
    flat: gl.constexpr = gl.BlockedLayout([4], [32], [NUM_WARPS], [0])
    return gl.load(ptr + gl.arange(0, WORDS, layout=flat))


@gluon.jit
def _unpack(words, dtype: gl.constexpr, BLOCK_J: gl.constexpr, NUM_WARPS: gl.constexpr, layout: gl.constexpr):
    """`[BLOCK_I, BLOCK_J]` in float32 of the words that `bias._bias_tiles` stored; nothing moves between threads."""
    if dtype == gl.bfloat16:
        high = (words & -65536).to(gl.float32, bitcast=True)
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
    quarter = gl.maximum(a, b)
    if BLOCK_J >= 128:
        a, b = quarter.reshape([BLOCK_I, 2, BLOCK_J // 8]).permute([0, 2, 1]).split()
        quarter = gl.maximum(a, b)
    return gl.convert_layout(gl.max(quarter, 1), ROWS, assert_trivial=True)


@gluon.jit
def _fetch(
    k_desc,
    v_desc,
    k_smem,
    v_smem,
    bar,
    b,
    r,
    h,
    chunk,
    slot,
    COUNT: gl.constexpr,
    CHUNK_J: gl.constexpr,
    D: gl.constexpr,
):
    """Start the copy of COUNT chunks of k and v; past the end of the keys come zeros."""
    mbarrier.expect(bar, 4 * COUNT * CHUNK_J * D)
    for n in gl.static_range(COUNT):
        at = [b, r, (chunk + n) * CHUNK_J, h, 0]
        _async_load(k_desc, at, bar, k_smem.index(slot + n))
        _async_load(v_desc, at, bar, v_smem.index(slot + n))


@gluon.jit
def _triangle_attention_fwd_hopper(
    q_ptr,
    k_desc,
    v_desc,
    words_ptr,  # of `bias.tiles`
    key_ptr,
    flags_ptr,  # of `bias.key_flags`
    out_ptr,  # [B, R, I, H, D] contiguous
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    stride_qb,
    stride_qr,
    stride_qi,
    stride_qh,
    stride_key_b,
    stride_key_r,
    stride_key_j,
    R,
    H,
    I,
    J,
    blocks,  # of queries
    chunks,  # of keys
    splits,  # programs that share a row
    scale,
    fill,
    D: gl.constexpr,
    BLOCK_J: gl.constexpr,
    CHUNK_J: gl.constexpr,
    CHUNKS: gl.constexpr,  # that a stage holds
    STAGES: gl.constexpr,  # 1: the whole row
    KEY_TERM: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    BLOCK_I: gl.constexpr = 16 * NUM_WARPS
    TILES: gl.constexpr = CHUNK_J // BLOCK_J
    WORDS: gl.constexpr = BLOCK_I * BLOCK_J // 2
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, BLOCK_J, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, D, 16])
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, 8, 16])
    Q: gl.constexpr = gl.DotOperandLayout(0, X, 2)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    SUM_ROWS: gl.constexpr = gl.SliceLayout(1, SUM)
    X_ROWS: gl.constexpr = gl.SliceLayout(1, X)
    X_KEYS: gl.constexpr = gl.SliceLayout(0, X)

    # Head outermost, rows innermost: programs that run together read the same bias.
    program = gl.program_id(0)
    bh = program // (R * splits)
    r = program % R
    split = program // R % splits
    b = bh // H
    h = bh % H
    row = (b * R + r).to(gl.int64)

    k_smem = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, 1, 1, CHUNK_J, 1, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * CHUNKS, 1, 1, CHUNK_J, 1, D], v_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(bars.index(n), count=1)
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_J if BLOCK_J < 64 else 128, 16, rank=2)
    FILLED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [NUM_WARPS, 1], [1, 0])
    ones = gl.allocate_shared_memory(dtype, [8, BLOCK_J], SWIZZLED, gl.full([8, BLOCK_J], 1.0, dtype, FILLED))
    ones = ones.permute((1, 0))
    fence_async_shared()
    _barrier()

    each = gl.cdiv(blocks, splits)
    first = split * each
    last = gl.minimum(first + each, blocks)
    stages = gl.cdiv(chunks, CHUNKS)
    total = (last - first) * stages
    for n in gl.static_range(STAGES):
        if n < total:
            _fetch(k_desc, v_desc, k_smem, v_smem, bars.index(n), b, r, h, n % stages * CHUNKS, n * CHUNKS,
                   CHUNKS, CHUNK_J, D)  # fmt: skip

    q_ptr += b.to(gl.int64) * stride_qb + r.to(gl.int64) * stride_qr + h.to(gl.int64) * stride_qh
    out_ptr += row * I * H * D + h * D
    row_max_ptr += (row * H + h) * I
    row_sum_ptr += (row * H + h) * I
    words_ptr += (bh.to(gl.int64) * blocks + first) * (chunks * TILES) * WORDS
    if KEY_TERM != "none":
        key_ptr += b.to(gl.int64) * stride_key_b + r.to(gl.int64) * stride_key_r
        flags_ptr += row * (chunks * TILES)

    q_rows = gl.arange(0, BLOCK_I, layout=gl.SliceLayout(1, Q))
    q_columns = gl.arange(0, D, layout=gl.SliceLayout(0, Q))
    x_rows = gl.arange(0, BLOCK_I, layout=X_ROWS)
    x_keys = gl.arange(0, BLOCK_J, layout=X_KEYS)
    out_rows = gl.arange(0, BLOCK_I, layout=OUT_ROWS)
    out_columns = gl.arange(0, D, layout=gl.SliceLayout(0, OUT))

    if STAGES == 1:
        # Here and not in the loop, where the compiler puts a barrier before it.
        mbarrier.wait(bars.index(0), 0)
    done = 0
    for block in range(first, last):
        i = block * BLOCK_I + q_rows
        q_ptrs = q_ptr + gl.expand_dims(i.to(gl.int64) * stride_qi, 1) + gl.expand_dims(q_columns, 0)
        q = gl.load(q_ptrs, mask=gl.expand_dims(i < I, 1), other=0.0)
        words = _load_words(words_ptr, WORDS, NUM_WARPS)
        row_max = gl.full([BLOCK_I], float("-inf"), gl.float32, X_ROWS)
        row_sum = warpgroup_mma_init(gl.zeros([BLOCK_I, 8], gl.float32, SUM))
        acc = warpgroup_mma_init(gl.zeros([BLOCK_I, D], gl.float32, OUT))
        flag = 0
        if KEY_TERM != "none":
            flag = gl.load(flags_ptr)

        for stage in range(stages):
            slot = 0
            if STAGES > 1:
                slot = done % STAGES * CHUNKS
                mbarrier.wait(bars.index(done % STAGES), done // STAGES & 1)
            end = gl.minimum(chunks - stage * CHUNKS, CHUNKS)
            # A tile's first product runs under the exponentials of the tile before, its second under the maximum
            # of the tile after. Accumulators are only written to, as here and by the rescaling, while no product
            # is under way: ptxas would put a wait after every single one.
            k = k_smem.index(slot).reshape([CHUNK_J, D]).slice(0, BLOCK_J).permute((1, 0))
            x = warpgroup_mma(q, k, _unpack(words, dtype, BLOCK_J, NUM_WARPS, X), is_async=True)
            words_ptr += WORDS
            words = _load_words(words_ptr, WORDS, NUM_WARPS)
            x = warpgroup_mma_wait(0, deps=(x,))
            for chunk in range(end):
                for n in gl.static_range(TILES):
                    tile = (stage * CHUNKS + chunk) * TILES + n
                    masked = flag
                    if KEY_TERM != "none":
                        flag = gl.load(flags_ptr + tile + 1)
                    # In natural units, as every kernel leaves it; p = exp2(x·factor - shift).
                    factor = scale * LOG2E
                    new_max = row_max
                    shift = row_max
                    if KEY_TERM != "none" and masked != 0:
                        j = tile * BLOCK_J + x_keys
                        key = gl.load(key_ptr + j.to(gl.int64) * stride_key_j, mask=j < J, other=0)
                        x = x * scale
                        if KEY_TERM == "add":
                            x = x + gl.expand_dims(key.to(gl.float32), 0)
                        else:
                            x = gl.where(gl.expand_dims((key != 0) & (j < J), 0), fill, x)
                        new_max = gl.maximum(row_max, _row_max(x))
                        shift = gl.where(new_max == float("-inf"), 0.0, new_max)
                        # The difference first: at -1e9 one multiply-add would be off by the rounding of 1.4e9.
                        x = x - gl.expand_dims(shift, 1)
                        rescale = _exp2((row_max - shift) * LOG2E)
                        shift = shift * 0.0
                        factor = LOG2E * 1.0
                    else:
                        new_max = gl.maximum(row_max, _row_max(x) * scale)
                        shift = gl.where(new_max == float("-inf"), 0.0, new_max)
                        rescale = _exp2((row_max - shift) * LOG2E)
                        shift = shift * LOG2E
                    row_max = new_max
                    # With the rescaling among what is waited for, ptxas cannot move the wait before the maximum.
                    acc, row_sum, rescale = warpgroup_mma_wait(0, deps=(acc, row_sum, rescale))
                    acc = acc * gl.expand_dims(gl.convert_layout(rescale, OUT_ROWS), 1)
                    row_sum = row_sum * gl.expand_dims(gl.convert_layout(rescale, SUM_ROWS), 1)

                    if n == TILES - 1:  # past the last tile: the last once more, not used
                        after = k_smem.index(slot + gl.minimum(chunk + 1, end - 1)).reshape([CHUNK_J, D])
                        k = after.slice(0, BLOCK_J).permute((1, 0))
                    else:
                        after = k_smem.index(slot + chunk).reshape([CHUNK_J, D])
                        k = after.slice((n + 1) * BLOCK_J, BLOCK_J).permute((1, 0))
                    next_x = warpgroup_mma(q, k, _unpack(words, dtype, BLOCK_J, NUM_WARPS, X), is_async=True)
                    p = _exp2(x * factor - gl.expand_dims(shift, 1)).to(dtype)
                    words_ptr += WORDS
                    words = _load_words(words_ptr, WORDS, NUM_WARPS)
                    v = v_smem.index(slot + chunk).reshape([CHUNK_J, D]).slice(n * BLOCK_J, BLOCK_J)
                    acc = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, OUT, 2)), v, acc, is_async=True)
                    row_sum = warpgroup_mma(
                        gl.convert_layout(p, gl.DotOperandLayout(0, SUM, 2)), ones, row_sum, is_async=True
                    )
                    x = warpgroup_mma_wait(2, deps=(next_x,))
            # Two tiles were loaded ahead of the last.
            words_ptr -= WORDS
            if STAGES > 1:
                words = _load_words(words_ptr, WORDS, NUM_WARPS)
                acc, row_sum = warpgroup_mma_wait(0, deps=(acc, row_sum))
                acc = warpgroup_mma_init(acc)
                row_sum = warpgroup_mma_init(row_sum)
                if done + STAGES < total:
                    _barrier()
                    _fetch(k_desc, v_desc, k_smem, v_smem, bars.index(done % STAGES), b, r, h,
                           (done + STAGES) % stages * CHUNKS, slot, CHUNKS, CHUNK_J, D)  # fmt: skip
                done += 1

        acc, row_sum = warpgroup_mma_wait(0, deps=(acc, row_sum))
        total_sum = gl.max(row_sum, 1)  # its eight columns are the same
        i = block * BLOCK_I + out_rows
        out_ptrs = out_ptr + gl.expand_dims(i.to(gl.int64) * (H * D), 1) + gl.expand_dims(out_columns, 0)
        out = acc / gl.expand_dims(gl.convert_layout(total_sum, OUT_ROWS), 1)
        gl.store(out_ptrs, out.to(dtype), mask=gl.expand_dims(i < I, 1))
        i = block * BLOCK_I + x_rows
        gl.store(row_max_ptr + i, row_max, mask=i < I)
        gl.store(row_sum_ptr + i, gl.convert_layout(total_sum, X_ROWS), mask=i < I)


def _descriptor(t: Tensor) -> TensorDescriptor:
    """CHUNK_J rows of one head; an axis of length 1 may have any stride, which the copy engine does not take."""
    D = t.shape[-1]
    strides = [step if size > 1 else D for step, size in zip(t.stride(), t.shape, strict=True)]
    dtype = gl.bfloat16 if t.dtype == torch.bfloat16 else gl.float16
    box = [1, 1, CHUNK_J, 1, D]
    layout = gl.NVMMASharedLayout.get_default_for(box, dtype)
    return TensorDescriptor(t, list(t.shape), [*strides[:-1], 1], box, layout)


def launch(
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
    """As the portable `launch`, for calls that `choice.refusal` lets through and with at least one element."""
    B, R, I, H, D = q.shape
    J = k.shape[2]
    shape = shape or shape_for(D, J)
    BLOCK_I = 16 * shape.NUM_WARPS
    blocks, chunks = triton.cdiv(I, BLOCK_I), triton.cdiv(J, CHUNK_J)
    tiles_j = chunks * (CHUNK_J // shape.BLOCK_J)
    # Four programs for each multiprocessor at least, where the rows alone do not make as many.
    splits = min(blocks, triton.cdiv(4 * 132, B * R * H))
    out = torch.empty((B, R, I, H, D), dtype=q.dtype, device=q.device)
    row_max = torch.empty((B, R, H, I), dtype=torch.float32, device=q.device)
    row_sum = torch.empty_like(row_max)
    key = key_bias if key_mask is None else key_mask.view(torch.uint8)
    with torch.cuda.device_of(q):
        flags = None if key is None else bias_pass.key_flags(key, tiles_j, shape.BLOCK_J)
        _triangle_attention_fwd_hopper[(B * R * H * splits,)](
            q,
            _descriptor(k),
            _descriptor(v),
            bias_pass.tiles(bias, scale, blocks, tiles_j, BLOCK_I, shape.BLOCK_J),
            key,
            flags,
            out,
            row_max,
            row_sum,
            *q.stride()[:4],
            *((0, 0, 0) if key is None else key.stride()),
            R,
            H,
            I,
            J,
            blocks,
            chunks,
            splits,
            scale,
            fill,
            D=D,
            CHUNK_J=CHUNK_J,
            KEY_TERM="none" if key is None else ("add" if key_mask is None else "select"),
            **vars(shape),
            num_warps=shape.NUM_WARPS,
        )
    return out, row_max, row_sum
