"""The largest N that fits, forward and training, ours beside its peers: `python docs/benchmarks/largest_n.py`.

B=1, H=4, D=32, bfloat16, an additive mask: one attention from projections, as a model calls it. Each search is a
process of its own, which starts with an empty GPU and gives everything back after each attempt. From what the last
attempts took it guesses what will just fit, and ends where N fits and N + 128 does not.
Prints a table; with --budget (default 600 s) nothing begins after that time, and what is left shows how far it came.
"""

from __future__ import annotations

import argparse
import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

STEP = 128
LARGEST = 16384
NAMES = ("ours", "eager", "inductor", "flex")
BACKENDS = {"ours": "trifast", "inductor": "inductor", "flex": "inductor"}


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    a = torch.matmul(q * 32**-0.5, k.transpose(-1, -2))
    a = a + (-1e9 * mask.to(q.dtype))[:, :, None, None, :]
    a = a + bias[:, None]
    return torch.matmul(a.softmax(-1), v)


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def score(s: Tensor, r: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(mask[0, r, j], -1e9, s + bias[0, h, i, j])

    return flex_attention(q[0], k[0], v[0], score_mod=score)[None]


def attempt(name: str, N: int, training: bool) -> int:
    """Peak bytes; raises torch.OutOfMemoryError."""
    import trifast_inductor  # noqa: F401  # its backend

    torch._dynamo.reset()
    torch.cuda.reset_peak_memory_stats()

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=training)

    q, k, v = (draw(1, N, N, 4, 32).transpose(2, 3) for _ in range(3))
    bias, mask = draw(1, 4, N, N), torch.zeros(1, N, N, dtype=torch.bool, device="cuda")
    mask[..., -N // 10 :] = True
    attend: Callable[..., Tensor] = flex if name == "flex" else eager
    if name in BACKENDS:
        attend = torch.compile(attend, backend=BACKENDS[name], dynamic=False)
    with torch.set_grad_enabled(training):
        out = attend(q, k, v, bias, mask)
        if training:
            out.backward(torch.ones_like(out))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def search(name: str, training: bool, until: float) -> str:
    """A row of the table but its first two columns."""
    room = torch.cuda.mem_get_info()[1]
    peaks: dict[int, int] = {}
    fits, too_large, N = 0, LARGEST + STEP, 1024
    while too_large - fits > STEP and time.monotonic() < until:
        try:
            peaks[N] = attempt(name, N, training)
            fits = N
        except Exception as error:
            if "out of memory" not in str(error):  # as torch's allocator and the driver both say
                return f"{fits or ''} | {type(error).__name__} at N={N}: {str(error).strip().splitlines()[0][:80]}"
            too_large = N
        gc.collect()
        torch.cuda.empty_cache()
        N = min(max(_guess(peaks, room) // STEP * STEP, fits + STEP), too_large - STEP)
    memory = f"{peaks[fits] / 2**30:.1f}" if fits else ""
    return f"{fits if too_large - fits <= STEP else f'{fits} or more'} | {memory}"


def _guess(peaks: dict[int, int], room: int) -> int:
    """The N whose peak would fill the GPU, by the power of N that the last two peaks tell, or else the third."""
    *before, (N, peak) = sorted(peaks.items())
    power = math.log(peak / before[-1][1], N / before[-1][0]) if before else 3.0
    return int(N * (room / peak) ** (1 / max(power, 1.5)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--names", default=",".join(NAMES))
    parser.add_argument("--search", nargs=3, metavar=("NAME", "MODE", "SECONDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.search:
        name, mode, seconds = options.search
        print(search(name, mode == "training", time.monotonic() + float(seconds)))
        return
    searches = [(name, mode) for mode in ("forward", "training") for name in options.names.split(",")]
    start = time.monotonic()
    print("| implementation | mode | largest N | GiB at that N |\n|---|---|---|---|")
    for index, (name, mode) in enumerate(searches):
        # What is left is shared out, so that the first ones cannot use it up.
        share = (start + options.budget - time.monotonic()) / (len(searches) - index)
        command = [sys.executable, "-W", "ignore", __file__, "--search", name, mode, str(share)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        print(f"| {name} | {mode} | {lines[-1] if lines else 'ended without a word |'} |", flush=True)


if __name__ == "__main__":
    main()
