"""Forward of 112 to 192 queries and keys for Hopper, in Gluon: the bias stays on the chip over rows.

    x = scale·⟨q, k⟩ + bias (⊕ key term), out = Σ_j softmax_j(x) · v

**Roles.** A program owns some rows r of one head, whose bias lies in shared memory over all of them. One warp copies q,
k and v of row after row, as far ahead as there is room, and writes what keys add or are instead. Each 64 queries of a
row have a partition of four warps, which walks the keys as the portable kernel does, exact maximum and all.

**Code** is scarce, as in `whole_by_key.py`: partitions are as many copies of one loop, which is not unrolled for that.

**Order.** The product with the next keys, of the row after too, is begun before the products with v are waited for.
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
from trifast_inductor.kernels.triangle_attention.bias import AlignedRows
from trifast_inductor.kernels.triangle_attention.hopper import choice, whole_forward_choice
from trifast_inductor.kernels.triangle_attention.hopper.descriptors import CopyingLaunch
from trifast_inductor.kernels.triangle_attention.hopper.handing import FLAT
from trifast_inductor.kernels.triangle_attention.hopper.lines import own_rows
from trifast_inductor.kernels.triangle_attention.hopper.registers import LOG2E, exp2, row_max
from trifast_inductor.kernels.triangle_attention.hopper.ring import advance
from trifast_inductor.kernels.triangle_attention.hopper.versions import async_load, async_store, barrier, store_wait

SIDE = gl.constexpr(whole_forward_choice.SIDE)


@gluon.jit
def _line(key_ptr, J, j, stride_j, fill, KEY_TERM: gl.constexpr):
    """What is added to the logits of some keys, or what they are instead, unless it is NaN: past the end -inf."""
    line = gl.zeros_like(j).to(gl.float32)
    if KEY_TERM != "none":
        key = gl.load(key_ptr + j.to(gl.int64) * stride_j, mask=j < J, other=0)
        line = key.to(gl.float32)
        if KEY_TERM == "select":
            line = gl.where(key != 0, fill, float("nan"))
    return gl.where(j < J, line, float("-inf"))


@gluon.jit
def _copy(
    shared,
    HAS_LINE: gl.constexpr,
    KEY_TERM: gl.constexpr,
    D: gl.constexpr,
    ROWS: gl.constexpr,
    TI: gl.constexpr,
    TJ: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The loading warp: the bias, and row after row q, k and v, as far ahead as there is room, and what keys add."""
    (
        q_desc, k_desc, v_desc, bias_desc, q_smem, k_smem, v_smem, bias_smem, key_smem, full, empty, lines_full,
        key_ptr, strides, b, h, first_row, turns, R, J, fill,
    ) = shared  # fmt: skip
    BYTES: gl.constexpr = 2 * SIDE * D * ROWS * (TI + 2 * TJ)
    stride_b, stride_r, stride_j = strides
    piece = gl.arange(0, SIDE, layout=gl.BlockedLayout([2], [32], [1], [0]))
    mbarrier.expect(full.index(0), BYTES + 2 * SIDE * SIDE * TI * TJ)
    for n in gl.static_range(TI * TJ):
        async_load(bias_desc, [b, h, n % TI * SIDE, n // TI * SIDE], full.index(0), bias_smem.index(n))
    slot = 0
    phase = 1
    for turn in range(turns):
        mbarrier.wait(empty.index(slot), phase)
        bar = full.index(slot)
        if turn > 0:
            mbarrier.expect(bar, BYTES)
        for m in range(ROWS):
            r = first_row + turn * ROWS + m
            for n in gl.static_range(TI):
                async_load(q_desc, [b, r, n * SIDE, h, 0], bar, q_smem.index((slot * ROWS + m) * TI + n))
            for n in gl.static_range(TJ):
                async_load(k_desc, [b, r, n * SIDE, h, 0], bar, k_smem.index((slot * ROWS + m) * TJ + n))
                async_load(v_desc, [b, r, n * SIDE, h, 0], bar, v_smem.index((slot * ROWS + m) * TJ + n))
        if HAS_LINE:
            for m in range(ROWS):
                # A row past the end, which nobody stores, is the last one again.
                of_row = key_ptr
                if KEY_TERM != "none":
                    of_row += b.to(gl.int64) * stride_b
                    of_row += gl.minimum(first_row + turn * ROWS + m, R - 1).to(gl.int64) * stride_r
                for n in gl.static_range(TJ):
                    line = _line(of_row, J, n * SIDE + piece, stride_j, fill, KEY_TERM)
                    key_smem.index((slot * ROWS + m) * TJ + n).store(line)  # handed over by lines_full
            barrier()
            mbarrier.arrive(lines_full.index(slot), count=1)
        slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _with_line(x, line_smem, KEY_TERM: gl.constexpr):
    line = gl.expand_dims(line_smem.load(gl.SliceLayout(0, x.type.layout)), 0)  # handed over by lines_full
    if KEY_TERM != "select":
        return x + line
    return gl.where(line == line, line, x)


@gluon.jit
def _attend(
    shared,
    WHICH: gl.constexpr,  # of the ROWS·TI partitions
    HAS_LINE: gl.constexpr,
    KEY_TERM: gl.constexpr,
    KEY_TERM_FIRST: gl.constexpr,
    D: gl.constexpr,
    ROWS: gl.constexpr,
    TI: gl.constexpr,
    TJ: gl.constexpr,
    STAGES: gl.constexpr,
):
    """64 queries of every ROWS-th row of the program."""
    (
        out_desc, q_smem, k_smem, v_smem, bias_smem, out_smem, key_smem, full, empty, lines_full, row_max_ptr,
        row_sum_ptr, b, h, first_row, last_row, turns, R, H, I, scale,
    ) = shared  # fmt: skip
    M: gl.constexpr = WHICH // TI
    N: gl.constexpr = WHICH % TI
    dtype: gl.constexpr = q_smem.dtype
    X: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    BY_I: gl.constexpr = gl.SliceLayout(1, X)
    i = N * SIDE + gl.arange(0, SIDE, layout=BY_I)
    x = gl.zeros([SIDE, SIDE], gl.float32, X)
    slot = 0
    phase = 0
    mbarrier.wait(full.index(0), 0)
    q = q_smem.index(M * TI + N).reshape([SIDE, D])
    x = warpgroup_mma(q, k_smem.index(M * TJ).reshape([SIDE, D]).permute((1, 0)), x, use_acc=False, is_async=True)
    x = warpgroup_mma_wait(0, deps=(x,))
    for turn in range(turns):
        r = first_row + turn * ROWS + M
        next_slot, next_phase = advance(slot, phase, STAGES)
        if HAS_LINE:
            mbarrier.wait(lines_full.index(slot), phase)
        top = gl.full([SIDE], float("-inf"), gl.float32, BY_I)
        total = gl.zeros([SIDE], gl.float32, BY_I)
        acc = gl.zeros([SIDE, D], gl.float32, OUT)
        for n in range(TJ):
            of_row = slot * ROWS + M
            bias = bias_smem.index(n * TI + N).reshape([SIDE, SIDE]).load(X).to(gl.float32)
            x = x * scale
            if KEY_TERM_FIRST and HAS_LINE:
                x = _with_line(x, key_smem.index(of_row * TJ + n), KEY_TERM)
            x = x + bias
            if not KEY_TERM_FIRST and HAS_LINE:
                x = _with_line(x, key_smem.index(of_row * TJ + n), KEY_TERM)
            before = top
            top = gl.maximum(top, row_max(x))
            # A row of -inf keeps exp(-inf) = 0 until the last division makes it 0/0.
            shift = gl.where(top == float("-inf"), 0.0, top)
            # The difference first, then log2(e): see `logits.probabilities`.
            p = exp2((x - gl.expand_dims(shift, 1)) * LOG2E)
            rescale = exp2((before - shift) * LOG2E)
            total = total * rescale + gl.sum(p, 1)
            acc = acc * gl.expand_dims(gl.convert_layout(rescale, gl.SliceLayout(1, OUT), assert_trivial=True), 1)
            v = v_smem.index(of_row * TJ + n).reshape([SIDE, D])
            acc = warpgroup_mma(gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, OUT, 2)), v, acc, is_async=True)
            # The logits of the next tile, or of the next row's first; those after the last row are not used.
            next_row = of_row
            next_n = n + 1
            if n == TJ - 1:
                mbarrier.wait(full.index(next_slot), next_phase, pred=turn + 1 < turns)
                next_row = next_slot * ROWS + M
                next_n = 0
            q = q_smem.index(next_row * TI + N).reshape([SIDE, D])
            k = k_smem.index(next_row * TJ + next_n).reshape([SIDE, D])
            x = warpgroup_mma(q, k.permute((1, 0)), x, use_acc=False, is_async=True)
            x, acc = warpgroup_mma_wait(0, deps=(x, acc))
        mbarrier.arrive(empty.index(slot), count=1)
        slot = next_slot
        phase = next_phase
        sums = gl.convert_layout(total, gl.SliceLayout(1, OUT), assert_trivial=True)
        store_wait(0)
        barrier()
        out_smem.index(WHICH).reshape([SIDE, D]).store((acc / gl.expand_dims(sums, 1)).to(dtype))
        fence_async_shared()
        barrier()
        if r < last_row:
            async_store(out_desc, [b, r, N * SIDE, h, 0], out_smem.index(WHICH))
            statistics = ((b * R + r).to(gl.int64) * H + h) * I
            gl.store(row_max_ptr + statistics + i, top, mask=i < I)
            gl.store(row_sum_ptr + statistics + i, total, mask=i < I)
    store_wait(0)


# Compiled once for all lengths of so many tiles.
@gluon.jit(do_not_specialize=["B", "R", "H", "I", "J", "rows"])
def _triangle_attention_fwd_whole_hopper(
    q_desc,  # these [B, R, I or J, H, D]
    k_desc,
    v_desc,
    out_desc,
    bias_desc,  # [B, H, I, J]
    key_ptr,
    row_max_ptr,  # [B, R, H, I] contiguous
    row_sum_ptr,  # [B, R, H, I] contiguous
    stride_key_b,
    stride_key_r,
    stride_key_j,
    B,
    R,
    H,
    I,
    J,
    rows,  # of r, to a program
    scale,
    fill,
    D: gl.constexpr,
    KEY_TERM: gl.constexpr,
    KEY_TERM_FIRST: gl.constexpr,
    EVEN_J: gl.constexpr,
    ROWS: gl.constexpr,  # at a time
    TI: gl.constexpr,  # tiles of queries
    TJ: gl.constexpr,  # tiles of keys
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,  # of the partitions but the first, which has what they leave
):
    gl.static_assert(STAGES > 1, "a row is given back after the next one is waited for")
    COUNT: gl.constexpr = ROWS * TI
    dtype: gl.constexpr = q_desc.dtype
    BOX: gl.constexpr = q_desc.layout
    q_smem = gl.allocate_shared_memory(dtype, [STAGES * ROWS * TI, 1, 1, SIDE, 1, D], BOX)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES * ROWS * TJ, 1, 1, SIDE, 1, D], BOX)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES * ROWS * TJ, 1, 1, SIDE, 1, D], BOX)
    out_smem = gl.allocate_shared_memory(dtype, [COUNT, 1, 1, SIDE, 1, D], BOX)
    bias_smem = gl.allocate_shared_memory(dtype, [TI * TJ, 1, 1, SIDE, SIDE], bias_desc.layout)
    HAS_LINE: gl.constexpr = KEY_TERM != "none" or not EVEN_J
    key_smem = q_smem
    if HAS_LINE:
        key_smem = gl.allocate_shared_memory(gl.float32, [STAGES * ROWS * TJ, SIDE], FLAT)
    lines_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(full.index(n), count=1)
        mbarrier.init(lines_full.index(n), count=1)
        mbarrier.init(empty.index(n), count=COUNT)
    fence_async_shared()
    barrier()

    b, h, _, first_row, count = own_rows(B, R, H, rows)
    last_row = first_row + count
    turns = (count + ROWS - 1) // ROWS
    to_copy = (
        q_desc, k_desc, v_desc, bias_desc, q_smem, k_smem, v_smem, bias_smem, key_smem, full, empty, lines_full,
        key_ptr, (stride_key_b, stride_key_r, stride_key_j), b, h, first_row, turns, R, J, fill,
    )  # fmt: skip
    to_attend = (
        out_desc, q_smem, k_smem, v_smem, bias_smem, out_smem, key_smem, full, empty, lines_full, row_max_ptr,
        row_sum_ptr, b, h, first_row, last_row, turns, R, H, I, scale,
    )  # fmt: skip
    # fmt: off
    if COUNT == 3:
        gl.warp_specialize([
            (_attend, (to_attend, 0, HAS_LINE, KEY_TERM, KEY_TERM_FIRST, D, ROWS, TI, TJ, STAGES)),
            (_attend, (to_attend, 1, HAS_LINE, KEY_TERM, KEY_TERM_FIRST, D, ROWS, TI, TJ, STAGES)),
            (_attend, (to_attend, 2, HAS_LINE, KEY_TERM, KEY_TERM_FIRST, D, ROWS, TI, TJ, STAGES)),
            (_copy, (to_copy, HAS_LINE, KEY_TERM, D, ROWS, TI, TJ, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])
    else:
        gl.warp_specialize([
            (_attend, (to_attend, 0, HAS_LINE, KEY_TERM, KEY_TERM_FIRST, D, ROWS, TI, TJ, STAGES)),
            (_attend, (to_attend, 1, HAS_LINE, KEY_TERM, KEY_TERM_FIRST, D, ROWS, TI, TJ, STAGES)),
            (_attend, (to_attend, 2, HAS_LINE, KEY_TERM, KEY_TERM_FIRST, D, ROWS, TI, TJ, STAGES)),
            (_attend, (to_attend, 3, HAS_LINE, KEY_TERM, KEY_TERM_FIRST, D, ROWS, TI, TJ, STAGES)),
            (_copy, (to_copy, HAS_LINE, KEY_TERM, D, ROWS, TI, TJ, STAGES)),
        ], [4, 4, 4, 1], [REGISTERS, REGISTERS, REGISTERS, 24])
    # fmt: on


class Plan:
    """What a call that `whole_forward_choice.refusal` lets through launches; the arguments as in `forward.launch`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor,
        key_bias: Tensor | None,
        key_mask: Tensor | None,
        scale: float,
        fill: float,
        key_term_first: bool,
    ) -> None:
        B, R, I, H, D = q.shape
        J = k.shape[2]
        shape = whole_forward_choice.shape_for(I, J, D)
        rows = shape.rows_of_a_program(R, B * H, choice.multiprocessors(q.get_device()))
        self._aligned = AlignedRows(bias)
        given = {
            **arguments.shared(q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first),
            **vars(shape),
            "B": B,
            "rows": rows,
            "EVEN_J": J % SIDE.value == 0,
        }
        boxes: dict[str, tuple[int, ...]] = {
            f"{name}_desc": (1, 1, SIDE.value, 1, D) for name in ("q", "k", "v", "out")
        }
        boxes["bias_desc"] = (1, 1, SIDE.value, SIDE.value)
        programs = B * H * triton.cdiv(R, rows)
        self._run = CopyingLaunch(_triangle_attention_fwd_whole_hopper, programs, given, 4, boxes)
        self._shapes = (B, R, I, H, D), (B, R, H, I)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key_bias: Tensor | None, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the portable `launch`, on the device that is current."""
        key = arguments.bytes_of_mask(key_bias if key_mask is None else key_mask)
        out = memory.empty(self._shapes[0], q.dtype, q)
        row_max, row_sum = (memory.empty(self._shapes[1], torch.float32, q) for _ in range(2))
        self._run(q, k, v, out, self._aligned(bias), key, row_max, row_sum)
        return out, row_max, row_sum
