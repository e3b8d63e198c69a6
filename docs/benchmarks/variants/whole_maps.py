"""Draft of the one pass of `portable/whole.py` with tensor maps: what is copied needs no addresses in registers.

    PYTHONPATH=. python docs/benchmarks/variants/whole_maps.py [--n 128,112,64]

Hopper, B=1 and 4, H=4 and 8, D=32, bfloat16: each gradient beside that of the kernel in use (how far apart, by norm),
then the whole backward by graph replay, ms, the kernel in use first. docs/benchmarks/log-backward.md, step 16, says
what is expected. `--check` does the former alone, small and in float16, which Triton's interpreter multiplies right.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
import triton
import triton.language as tl
from backward import apart, replayed_ms  # of this directory
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from trifast_inductor.kernels.triangle_attention import backward, forward, sums
from trifast_inductor.kernels.triangle_attention.logits import load_key_term, logits_tile, probabilities
from trifast_inductor.kernels.triangle_attention.portable import whole
from trifast_inductor.testing import Inputs, random_inputs


@triton.jit
def _head(desc, b, r, h, N: tl.constexpr, D: tl.constexpr):
    return tl.reshape(desc.load([b, r, 0, h, 0]), [N, D])


@triton.jit
def _leave(desc, b, r, h, tile, N: tl.constexpr, D: tl.constexpr):
    desc.store([b, r, 0, h, 0], tl.reshape(tile, [1, 1, N, 1, D]))


@triton.jit
def bwd_whole_maps(
    q_desc,  # these and the gradients [B, R, I or J, H, D]
    k_desc,
    v_desc,
    bias_desc,  # [B, H, I, J]
    do_desc,
    out_desc,
    dq_desc,
    dk_desc,
    dv_desc,
    key_ptr,  # [B, R, J]
    row_max_ptr,  # [B, R, H, I]
    row_sum_ptr,  # [B, R, H, I]
    dbias_ptr,  # [groups, B, H, I, J]
    B,
    R,
    H,
    I,
    J,
    rows,
    scale,
    fill,
    KEY_TERM: tl.constexpr,
    KEY_TERM_FIRST: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
    EVEN_J: tl.constexpr,
):
    pid = tl.program_id(0)
    h, b, group = pid % H, pid // H % B, pid // (B * H)
    n = tl.arange(0, N)
    i_in_range, j_in_range = n < I, n < J
    dbias = tl.zeros([N, N], tl.float32)
    for r in range(group * rows, tl.minimum(group * rows + rows, R)):
        q = _head(q_desc, b, r, h, N, D)
        k = _head(k_desc, b, r, h, N, D)
        qk = tl.dot(q, tl.trans(k))
        bias = tl.reshape(bias_desc.load([b, h, 0, 0]), [N, N])
        of_key = key_ptr
        if KEY_TERM != "none":
            of_key += (b.to(tl.int64) * R + r) * J
        key = load_key_term(of_key, n, j_in_range, 1, KEY_TERM)
        x = logits_tile(qk, bias, key[None, :], None, scale, fill, True, KEY_TERM, KEY_TERM_FIRST, EVEN_J=True)
        do = _head(do_desc, b, r, h, N, D)
        out = _head(out_desc, b, r, h, N, D)
        of_row = ((b.to(tl.int64) * R + r) * H + h) * I
        row_max = tl.load(row_max_ptr + of_row + n, mask=i_in_range, other=float("inf"))
        log2_sum = tl.log2(tl.load(row_sum_ptr + of_row + n, mask=i_in_range, other=1.0))
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        p = probabilities(x, row_max[:, None], log2_sum[:, None])
        dv = tl.dot(tl.trans(p.to(do.dtype)), do)
        v = _head(v_desc, b, r, h, N, D)
        dp = tl.dot(do, tl.trans(v))
        # Not a product: contracted with the sum below, it would keep p and dp alive beside ds.
        ds = tl.fma(p, dp - delta[:, None], tl.zeros([N, N], tl.float32))
        if not EVEN_J:
            ds = tl.where(j_in_range[None, :], ds, 0.0)
        if KEY_TERM_FIRST:
            dbias += ds
        if KEY_TERM == "select":
            ds = tl.where(key[None, :], 0.0, ds)
        if not KEY_TERM_FIRST:
            dbias += ds
        ds = ds.to(q.dtype)
        dk = tl.dot(tl.trans(ds), q)
        dq = tl.dot(ds, k)
        _leave(dv_desc, b, r, h, dv.to(q.dtype), N, D)
        _leave(dk_desc, b, r, h, (dk * scale).to(q.dtype), N, D)
        _leave(dq_desc, b, r, h, (dq * scale).to(q.dtype), N, D)
    place = ((group.to(tl.int64) * B + b) * H + h) * I * J
    in_range = i_in_range[:, None] & j_in_range[None, :]
    tl.store(dbias_ptr + place + n[:, None] * J + n[None, :], dbias, mask=in_range)


def by_maps(x: Inputs, saved: tuple[Tensor, ...], stages: int = 3) -> tuple[Tensor, ...]:
    """Gradients of dense inputs; lengths of 16 elements, as the copy engine wants rows of the bias."""
    B, R, I, H, D = x.q.shape
    J = x.k.shape[2]
    tile = whole.tile_for(max(I, J))
    N = tile.BLOCK_I
    rows = whole.rows_of_a_program(R, B * H, whole.programs_at_once(tile, x.q.get_device()))
    groups = triton.cdiv(R, rows)

    def described(t: Tensor) -> TensorDescriptor:
        return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, N, 1, D])

    out, row_max, row_sum = saved
    gradients = [torch.empty_like(t) for t in (x.q, x.k, x.v)]
    parts = torch.empty((groups, B, H, I, J), dtype=torch.float32, device=x.q.device)
    dbias = torch.empty_like(x.bias)
    bias = TensorDescriptor(x.bias, list(x.bias.shape), list(x.bias.stride()), [1, 1, N, N])
    key = x.key_bias if x.key_mask is None else x.key_mask
    term = "none" if key is None else "add" if x.key_mask is None else "select"
    bwd_whole_maps[(B * H * groups,)](
        described(x.q), described(x.k), described(x.v), bias, described(x.grad_out), described(out),
        *map(described, gradients), key, row_max, row_sum, parts, B, R, H, I, J, rows, x.scale, x.fill,
        KEY_TERM=term, KEY_TERM_FIRST=x.key_term_first, D=D, N=N, EVEN_J=J == N,
        num_warps=tile.num_warps, num_stages=stages,
    )  # fmt: skip
    sums.sum_of(B * H * I * J, groups)(parts, dbias)
    return (*gradients, dbias)


def compared(x: Inputs) -> str:
    saved = forward.portable(*x.op)
    expected = backward.launch(x.grad_out, *x.op[:6], *saved, *x.op[6:], True)
    return apart(by_maps(x, saved), expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", default="128,112,64")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if arguments.check else torch.bfloat16
    for N in map(int, arguments.n.split(",")):
        for B, H in ((1, 2),) if arguments.check else ((1, 4), (1, 8), (4, 4), (4, 8)):
            for key_term in ("none", "additive", "mask"):
                R = 3 if arguments.check else N
                given = {"B": B, "R": R, "I": N, "J": N, "H": H, "D": 32, "dtype": dtype, "device": device}
                x = random_inputs(**given, key_term=key_term)
                line = f"N={N} {B} x {H} {key_term}: {compared(x)}"
                if not arguments.check:
                    saved = forward.portable(*x.op)
                    given_back = (x.grad_out, *x.op[:6], *saved, *x.op[6:], True)
                    used = replayed_ms(lambda given_back=given_back: lambda: backward.launch(*given_back))
                    maps = [replayed_ms(lambda x=x, saved=saved, s=s: lambda: by_maps(x, saved, s)) for s in (3, 2)]
                    line += f", {used:.4f} ms, maps {maps[0]:.4f}, in two stages {maps[1]:.4f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
