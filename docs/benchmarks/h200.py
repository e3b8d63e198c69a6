"""Triangle attention on a GPU, kernels and host apart: `python docs/benchmarks/h200.py [--dtype float32] [N ...]`.

B=1, H=4, D=32, an additive key term that leaves out a third of the keys. Kernels: median of `do_bench`, L2 cleared,
in milliseconds. Host: what one call takes before it returns, in microseconds, queue never full.
"""

import argparse
import time
from collections.abc import Callable

import torch
import triton

from trifast_inductor.kernels.triangle_attention import backward, forward
from trifast_inductor.testing import random_inputs


def device_ms(run: Callable[[], object]) -> float:
    run()
    return triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median")


def host_us(run: Callable[[], object], calls: int = 300, repeats: int = 9) -> float:
    for _ in range(20):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    return min(times) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("N", type=int, nargs="*", default=[32, 64, 128, 256, 512])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, options.dtype)
    for N in options.N:
        dtype = getattr(torch, options.dtype)
        x = random_inputs(R=N, I=N, J=N, H=4, dtype=dtype, device="cuda", key_term="additive")
        saved = forward.launch(*x.op)
        runs = {
            "forward": lambda x=x: forward.launch(*x.op),
            "backward": lambda x=x, saved=saved: backward.launch(x.grad_out, *x.op[:6], *saved, *x.op[6:], True),
        }
        figures = [f"{name} {device_ms(run):.4f} ms, host {host_us(run):.1f} us" for name, run in runs.items()]
        print(f"N={N}: {'; '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
