"""The Hopper forward beside the portable one, in several shapes: `python docs/benchmarks/hopper.py [seconds]`.

Prints the GPU time of one call (graph replay, median), all passes included, for B=1, H=4, D=32 in bfloat16, without
a key term and with a tenth of the keys left out. Each figure comes after a check of some rows against float64.
"""

import sys
import time

import torch
import triton

from trifast_inductor.kernels.triangle_attention import forward as portable
from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.kernels.triangle_attention.hopper import forward as hopper
from trifast_inductor.kernels.triangle_attention.hopper.choice import Shape, shape_for
from trifast_inductor.testing import Inputs, random_inputs


def inputs(N: int, left_out: bool) -> Inputs:
    x = random_inputs(
        R=N, I=N, J=N, H=4, dtype=torch.bfloat16, device="cuda", key_term="additive" if left_out else "none"
    )
    if x.key_bias is not None:
        x.key_bias.zero_()
        x.key_bias[..., int(0.9 * N) :] = -1e9
    return x


def shapes(N: int) -> list[Shape]:
    """What is chosen, then other warps, tiles, registers, and rings where whole rows would fit."""
    chunks = shape_for(32, N).CHUNKS
    tried = [
        shape_for(32, N),
        Shape(64, chunks, 1, 16),
        Shape(64, chunks, 1, 8),
        Shape(32, chunks, 1, 8),
        Shape(64, chunks, 1, 4, maxnreg=168),
        Shape(64, 1, 2, 4),
        Shape(64, 2, 2, 4, maxnreg=168),
        Shape(64, 2, 2, 8),
    ]
    return [s for s in dict.fromkeys(tried) if s.CHUNKS * s.STAGES * 16 <= 216]


def largest_error(x: Inputs, out: torch.Tensor) -> float:
    rows = slice(0, 2)
    key_bias = None if x.key_bias is None else x.key_bias[:, rows].double()
    q, k, v = (t[:, rows].double() for t in (x.q, x.k, x.v))
    exact = reference.forward(q, k, v, x.bias.double(), key_bias, None, x.scale, x.fill, False)[0]
    return (out[:, rows] - exact).abs().max().item()


def main(seconds: float) -> None:
    started = time.monotonic()
    for N in (512, 1024, 256, 2048):
        for left_out in (False, True):
            x = inputs(N, left_out)
            calls = {"portable": lambda x=x: portable.launch(*x.op)}
            for s in shapes(N):
                calls[str(s)] = lambda x=x, s=s: hopper.launch(*x.op[:-1], shape=s)
            for name, call in calls.items():
                if time.monotonic() - started > seconds:
                    return
                try:
                    error = largest_error(x, call()[0])
                    ms = triton.testing.do_bench_cudagraph(call, rep=30, return_mode="median")
                    print(f"N={N} left_out={left_out} {name}: {ms:.4f} ms, largest error {error:.1e}", flush=True)
                except Exception as error:
                    # A shape that does not compile or fit must not take the others with it.
                    print(f"N={N} left_out={left_out} {name}: {error!r:.200}", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
