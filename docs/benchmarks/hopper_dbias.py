"""dbias on Hopper beside the portable kernel, in one run of at most a minute.

    python docs/benchmarks/hopper_dbias.py [--sizes 512,256,1024] [--seconds 60] [NAME ...]

B=1, H=4, D=32, bfloat16; ms with all passes over row statistics, key term and parts, median of graph replays: without
a key term / with the last tenth of the keys left out / with the last tenth of keys and rows left out, whose rows are
wholly masked. Then the largest error over the largest element of dbias, against float32 in torch. For the Hopper
kernel, in brackets, the kernel alone without a key term. Each name is a process of its own: all compile at once, on
small inputs that they also check; then they are timed one after the other. A process that fails, or hangs, costs its
own line only.

What the kernel waits for:

    ncu --clock-control none --set full --import-source no -k regex:dbias_hopper -c 1 \\
        python docs/benchmarks/hopper_dbias.py --once default --sizes 512
"""

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import hopper
import torch

from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.kernels.triangle_attention.hopper.dbias_choice import Shape
from trifast_inductor.testing import Inputs

# With what was predicted for N=512 in log-hopper-dbias.md, which says why.
SHAPES = {
    "default": Shape(),  # four partitions of 64 by 64
    "two": Shape(COLUMNS=128),  # two of 64 by 128: half the products and barriers, half the warps
    "halves": Shape(HALVES=2),  # two, of which the second half's products run under the first half's exponentials
}
LEFT_OUT = ("none", "tail", "padded")


@dataclass
class Given:
    x: Inputs
    row_max: torch.Tensor
    terms: torch.Tensor  # log2 of the row sum, and δ
    expected: torch.Tensor


def given(N: int, left_out: str, J: int | None = None, R: int | None = None) -> Given:
    """Inputs, and in float32 what a forward and dq leave and what dbias is, by a few rows at a time."""
    x = hopper.inputs(N, left_out, J, R)
    R, H = x.q.shape[1], x.q.shape[3]
    if left_out == "padded":
        assert x.key_bias is not None
        x.key_bias[:, int(0.9 * R) :] = -1e9
    generator = torch.Generator("cuda").manual_seed(1)
    grad_out = torch.randn(x.q.shape, generator=generator, device="cuda", dtype=x.q.dtype)
    x = replace(x, grad_out=grad_out)
    row_max = torch.empty((1, R, H, N), device="cuda")
    terms = torch.empty((1, R, H, 2, N), device="cuda")
    expected = torch.zeros((1, *x.bias.shape[1:]), device="cuda") if x.bias is not None else None
    assert expected is not None
    step = max(1, 2**26 // (H * N * x.k.shape[2]))
    for r in range(0, R, step):
        rows = slice(r, r + step)
        q, k, v, do = (t[:, rows].float() for t in (x.q, x.k, x.v, grad_out))
        key_bias = None if x.key_bias is None else x.key_bias[:, rows]
        logits = reference.logits(q, k, x.bias, key_bias, None, x.scale, x.fill, False)
        top = logits.amax(-1)
        p = torch.exp(logits - top[..., None])
        total = p.sum(-1)
        p /= total[..., None]
        out = torch.einsum("brhij,brjhd->brihd", p, v).to(x.q.dtype).float()
        delta = (out * do).sum(-1).transpose(2, 3)
        row_max[:, rows], terms[:, rows, :, 0], terms[:, rows, :, 1] = top, total.log2(), delta
        dp = torch.einsum("brihd,brjhd->brhij", do, v)
        expected += (p * (dp - delta[..., None])).sum(1)
    return Given(x, row_max, terms, expected)


def _portable(g: Given) -> Callable[[], torch.Tensor]:
    from trifast_inductor.kernels.triangle_attention import backward

    x = g.x
    assert x.bias is not None
    plan = backward._Portable(x.grad_out, *x.op[:6], x.scale, x.fill, x.key_term_first, True)
    dbias = torch.empty_like(x.bias)
    parts = torch.empty(plan.parts_shape, device="cuda") if plan.sum is not None else None
    read = (x.q, x.k, x.v, plan.aligned(x.bias), x.key_bias, x.grad_out)

    def call() -> torch.Tensor:
        assert plan.dbias is not None
        plan.dbias(*read, g.row_max, g.terms, dbias if parts is None else parts)
        if plan.sum is not None:
            plan.sum(parts, dbias)
        return dbias

    return call


def call_of(name: str, g: Given) -> Callable[[], torch.Tensor]:
    if name == "portable":
        return _portable(g)
    from trifast_inductor.kernels.triangle_attention.hopper import dbias

    x = g.x
    assert x.bias is not None
    bias = x.bias
    log2_sum, delta = g.terms.unbind(3)
    terms = torch.stack((g.row_max / math.log(2) + log2_sum, delta), -1)
    sums = torch.stack((g.row_max, log2_sum), -1)
    plan = dbias.Plan(x.grad_out, *x.op, SHAPES[name])
    return lambda: plan(x.grad_out, x.q, x.k, x.v, bias, x.key_bias, terms, sums)


def error(g: Given, dbias: torch.Tensor) -> float:
    return ((dbias.float() - g.expected).abs().max() / g.expected.abs().max()).item()


def kernel_alone(call: Callable[[], torch.Tensor]) -> float:
    """ms of the Hopper kernel among those of a call, as torch's profiler has it; the least of five."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    times = [e.time_range.elapsed_us() for e in profiler.events() if "dbias_hopper" in e.name]
    return min(times, default=math.nan) / 1e3


def work(name: str, sizes: list[int]) -> None:
    """One process: get ready, wait for a word, time."""
    import triton

    for left_out in ("none", "padded"):
        for N in sizes:
            # With few rows: what is compiled serves for all. Odd lengths are for the tests.
            g = given(N, left_out, R=48)
            off = error(g, call_of(name, g)())
            assert off < 0.01, f"largest error {off:.1e} of the largest element at N={N}, R=48, {left_out}"
    torch.cuda.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()
    for N in sizes:
        times, errors, alone = [], [], ""
        for left_out in LEFT_OUT:
            g = given(N, left_out)
            call = call_of(name, g)
            errors.append(error(g, call()))
            times.append(triton.testing.do_bench_cudagraph(call, rep=40, return_mode="median"))
            if name in SHAPES and left_out == "none":
                alone = f" ({kernel_alone(call):.4f})"
            del g, call
        print(f"  N={N} {'/'.join(f'{t:.4f}' for t in times)}{alone} err {max(errors):.0e}", end="", flush=True)
    print("", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", default=["portable", *SHAPES])
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=[512, 256, 1024])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--work", metavar="NAME", help="what each process is started with")
    parser.add_argument("--once", metavar="NAME", help="one call, for a profiler")
    arguments = parser.parse_args()
    if unknown := {*arguments.names} - {"portable", *SHAPES}:
        parser.error(f"no such name: {', '.join(sorted(unknown))}; there are {', '.join(['portable', *SHAPES])}")
    if arguments.work:
        work(arguments.work, arguments.sizes)
    elif arguments.once:
        call_of(arguments.once, given(arguments.sizes[0], "none"))()
        torch.cuda.synchronize()
    else:
        hopper.main(arguments.names, arguments.sizes, arguments.seconds, __file__)
