"""Triangle attention on the CPU against plain Inductor: `python docs/benchmarks/cpu.py [--threads T] [N ...]`.

Both start from q, k, v as a model has them, heads last in a projection `[1, N, N, H·D]`, and attend as
OpenFold does, with an additive mask that leaves out the last tenth of the keys. Runs alternate; a figure
is the median, in milliseconds; with one thread, of CPU time, which a busy machine disturbs less. Compilation is
not counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from trifast_inductor.bench.environment import processor
from trifast_inductor.kernels.triangle_attention import cpu

H, D = 4, 32
SECONDS_PER_PAIR = 12.0


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
    """OpenFold's core on `[1, N, H, N, D]`."""
    logits = torch.matmul(q, k.transpose(-1, -2))
    logits += mask
    logits += bias
    return torch.matmul(torch.softmax(logits, -1), v)


def alternating(*runs: Callable[[], object]) -> list[float]:
    """Median time of each in milliseconds, with as many turns as there is time for."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run(), run()
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    end = time.perf_counter() + SECONDS_PER_PAIR
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, taken in zip(runs, times, strict=True):
            start = clock()
            run()
            taken.append(clock() - start)
    return [1e3 * statistics.median(taken) for taken in times]


def row(N: int, dtype: torch.dtype) -> str:
    """One line of the table."""
    torch._dynamo.reset()
    compiled = torch.compile(eager, backend="inductor", dynamic=False)
    q, k, v, grad_out = (torch.randn(1, N, N, H, D, dtype=dtype) for _ in range(4))
    bias = torch.randn(1, H, N, N, dtype=dtype)
    key_bias = torch.zeros(1, N, N, dtype=dtype)
    key_bias[..., N - N // 10 :] = -1e9
    mask = key_bias[:, :, None, None, :]

    def inductor_forward() -> Tensor:
        with torch.no_grad():
            return compiled(*(x.transpose(2, 3) for x in (q, k, v)), mask, bias[:, None])

    def inductor_both() -> None:
        leaves = [x.transpose(2, 3).detach().requires_grad_() for x in (q, k, v)]
        leaves.append(bias[:, None].detach().requires_grad_())
        compiled(*leaves[:3], mask, leaves[3]).backward(grad_out.transpose(2, 3))

    def ours_forward() -> tuple[Tensor, Tensor, Tensor]:
        return cpu.forward(q, k, v, bias, key_bias, None, 1.0, 0.0, True)

    def ours_both() -> None:
        cpu.backward(grad_out, q, k, v, bias, key_bias, None, *ours_forward(), 1.0, 0.0, True, True)

    times = alternating(inductor_forward, ours_forward) + alternating(inductor_both, ours_both)
    cells = [str(dtype).removeprefix("torch."), str(N), *(f"{t:.1f}" for t in times)]
    cells += [f"{times[0] / times[1]:.2f}", f"{times[2] / times[3]:.2f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("N", type=int, nargs="*", default=[64, 128, 256, 384])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    capability = torch.backends.cpu.get_cpu_capability()
    print(f"{processor()}, {capability}, {arguments.threads} threads, torch {torch.__version__}\n")
    print("| dtype | N | Inductor fwd | ours fwd | Inductor fwd+bwd | ours fwd+bwd | gain fwd | gain fwd+bwd |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for N in arguments.N:
            print(row(N, dtype), flush=True)


if __name__ == "__main__":
    main()
