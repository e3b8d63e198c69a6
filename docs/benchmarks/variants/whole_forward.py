"""Draft of a forward of up to 192 queries and keys whose bias stays on the chip: rows of one head, one after the other.

    PYTHONPATH=. python docs/benchmarks/variants/whole_forward.py [--n 128,192,96,160,72] [--check]

Hopper, B=1 and 4, H=4 and 8, D=32, bfloat16. First every result beside that of the portable kernel (how far apart, by
norm; whether NaN stand where they do; whether two runs agree), then it and what is in use by graph replay. `--check`
does the former alone, with odd sizes. docs/benchmarks/log.md, "A forward whose bias stays on the chip", says what has
been measured and what has not.

The loop over keys is not unrolled: four partitions are four copies of it, and must fit the cache for instructions.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
import triton
from backward import replayed_ms  # of this directory
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trifast_inductor.kernels.triangle_attention import arguments, forward, memory, tiling
from trifast_inductor.kernels.triangle_attention.bias import AlignedRows
from trifast_inductor.kernels.triangle_attention.hopper import choice
from trifast_inductor.kernels.triangle_attention.hopper.descriptors import CopyingLaunch
from trifast_inductor.kernels.triangle_attention.hopper.lines import own_rows
from trifast_inductor.kernels.triangle_attention.hopper.registers import LOG2E, exp2, row_max
from trifast_inductor.kernels.triangle_attention.hopper.ring import advance
from trifast_inductor.kernels.triangle_attention.hopper.versions import async_load, async_store, barrier, store_wait
from trifast_inductor.testing import Inputs, random_inputs

SIDE = gl.constexpr(64)  # queries, and keys, of a tile


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
                    key_smem.index((slot * ROWS + m) * TJ + n).store(line)
            barrier()
            mbarrier.arrive(lines_full.index(slot), count=1)
        slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _with_line(x, line_smem, KEY_TERM: gl.constexpr):
    line = gl.expand_dims(line_smem.load(gl.SliceLayout(0, x.type.layout)), 0)
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
def fwd_whole_hopper(
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
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
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
    if COUNT == 2:
        gl.warp_specialize([
            (_attend, (to_attend, 0, HAS_LINE, KEY_TERM, KEY_TERM_FIRST, D, ROWS, TI, TJ, STAGES)),
            (_attend, (to_attend, 1, HAS_LINE, KEY_TERM, KEY_TERM_FIRST, D, ROWS, TI, TJ, STAGES)),
            (_copy, (to_copy, HAS_LINE, KEY_TERM, D, ROWS, TI, TJ, STAGES)),
        ], [4, 1], [REGISTERS, 24])
    elif COUNT == 3:
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


def shape_for(I: int, J: int, D: int) -> dict[str, int]:
    """Four partitions, or three; as many rows in shared memory as there is room for, four at most."""
    TI, TJ = triton.cdiv(I, SIDE.value), triton.cdiv(J, SIDE.value)
    ROWS = 4 // TI
    left = choice.SHARED_MEMORY - 2 * SIDE.value * (SIDE.value * TI * TJ + ROWS * TI * D) - 1024
    stages = min(4, left // (2 * SIDE.value * ROWS * (D * (TI + 2 * TJ) + 2 * TJ)))
    registers = {2: 232, 3: 160, 4: 120}[ROWS * TI]
    return {"ROWS": ROWS, "TI": TI, "TJ": TJ, "STAGES": stages, "REGISTERS": registers}


class Plan:
    """What a call launches; the arguments as in `forward.launch`."""

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
        shape = shape_for(I, J, D)
        # Counted in turns: a program takes about two more to begin.
        turns = tiling.rows_of_a_group(-(-R // shape["ROWS"]), B * H, 132, extra=2, part=0.0, most=132)
        rows = turns * shape["ROWS"]
        self._aligned = AlignedRows(bias)
        given = {
            **arguments.shared(q, k, v, bias, key_bias, key_mask, scale, fill, key_term_first),
            **shape,
            "B": B,
            "rows": rows,
            "EVEN_J": J % SIDE.value == 0,
            "KEY_TERM_FIRST": key_term_first and (key_bias is not None or key_mask is not None),
        }
        boxes: dict[str, tuple[int, ...]] = {
            f"{name}_desc": (1, 1, SIDE.value, 1, D) for name in ("q", "k", "v", "out")
        }
        boxes["bias_desc"] = (1, 1, SIDE.value, SIDE.value)
        self._run = CopyingLaunch(fwd_whole_hopper, B * H * triton.cdiv(R, rows), given, 4, boxes)
        self._shapes = (B, R, I, H, D), (B, R, H, I)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, key: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = memory.empty(self._shapes[0], q.dtype, q)
        row_max, row_sum = (memory.empty(self._shapes[1], torch.float32, q) for _ in range(2))
        key = key.view(torch.uint8) if key is not None and key.dtype == torch.bool else key
        self._run(q, k, v, out, self._aligned(bias), key, row_max, row_sum)
        return out, row_max, row_sum


def compared(x: Inputs) -> str:
    plan = Plan(*x.op[:4], *x.op[4:])
    key = x.key_bias if x.key_mask is None else x.key_mask
    found, again = (plan(x.q, x.k, x.v, x.bias, key) for _ in range(2))
    expected = forward.portable(*x.op)
    apart_by = [
        float((a.float() - b.float()).nan_to_num().norm() / b.float().nan_to_num().norm().clamp(min=1e-9))
        for a, b in zip(found, expected, strict=True)
    ]
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, again, strict=True))
    nan = all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, expected, strict=True))
    wrong = "" if max(apart_by) < 0.01 and same and nan else " WRONG"
    return " ".join(f"{far:.4f}" for far in apart_by) + wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", default="128,192,96,160,72")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.check:
        for I, J in ((128, 128), (192, 192), (100, 70), (65, 190), (40, 33), (64, 192), (150, 130), (1, 1)):
            for key_term in ("none", "additive", "mask", "-inf mask"):
                for D, dtype in ((32, torch.bfloat16), (16, torch.float16)):
                    given = {"B": 2, "R": 7, "I": I, "J": J, "H": 2, "D": D, "dtype": dtype, "device": "cuda"}
                    x = random_inputs(**given, key_term=key_term)
                    print(f"{I} by {J}, {key_term}, D={D}: {compared(x)}", flush=True)
        return
    for N in map(int, arguments.n.split(",")):
        for B, H in ((1, 4), (1, 8), (4, 4), (4, 8)):
            for key_term in ("none", "additive", "mask"):
                given = {"B": B, "R": N, "I": N, "J": N, "H": H, "D": 32, "dtype": torch.bfloat16, "device": "cuda"}
                x = random_inputs(**given, key_term=key_term)
                plan = Plan(*x.op[:4], *x.op[4:])
                key = x.key_bias if x.key_mask is None else x.key_mask
                used = replayed_ms(lambda x=x: lambda: forward.launch(*x.op))
                draft = replayed_ms(lambda x=x, plan=plan, key=key: lambda: plan(x.q, x.k, x.v, x.bias, key))
                print(f"N={N} {B} x {H} {key_term}: {compared(x)}, {used:.4f} ms, draft {draft:.4f}", flush=True)


if __name__ == "__main__":
    main()
