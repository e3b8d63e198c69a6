"""The lean backward beside the portable one and FlexAttention.

    PYTHONPATH=. python docs/benchmarks/variants/backward.py

One GPU, B=1, H=4, whole backward by graph replay. What is timed is compiled first, in processes of its own. Prints one
line a figure, the decisive ones first, FlexAttention last; kernel by kernel at N=512 and 256; and how far the two
differ. `--seconds` is how long it may take in all.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from torch import Tensor

from trifast_inductor.testing import Inputs

Run = Callable[[], object]
OURS = ("present", "package")
FLEX = "FlexAttention"
COMPILING = 0.5  # of the time


class Setting(NamedTuple):
    N: int
    D: int
    term: (
        str  # "none"; left out are, "tail": the last tenth of the keys, "random": a third, "padded": a third, and rows
    )

    def __str__(self) -> str:
        return f"N={self.N} D={self.D} {self.term}"


def settings() -> Iterator[Setting]:
    for N in (512, 256, 1024, 384, 192, 128):
        for term in ("none", "tail", "random"):
            yield Setting(N, 32, term)
        if N in (512, 256):
            yield Setting(N, 32, "padded")
    for N in (512, 256):
        for term in ("none", "tail"):
            yield Setting(N, 64, term)


# FlexAttention takes long to compile, and seconds to load what is compiled; a random mask costs it what a tail does.
FLEX_SETTINGS = (
    Setting(512, 32, "tail"), Setting(256, 32, "tail"), Setting(512, 32, "none"), Setting(256, 32, "none"),
    Setting(192, 32, "tail"), Setting(384, 32, "tail"), Setting(1024, 32, "tail"), Setting(512, 64, "none"),
    Setting(128, 32, "tail"), Setting(256, 64, "none"),
)  # fmt: skip


def inputs(setting: Setting) -> Inputs:
    N, D, term = setting
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device="cuda", dtype=torch.bfloat16)

    key = None
    if term == "random":
        key = -1e9 * (torch.rand((1, N, N), generator=generator, device="cuda") < 0.3).bfloat16()
        key[..., :1] = 0
    elif term == "tail":
        key = torch.zeros((1, N, N), device="cuda", dtype=torch.bfloat16)
        key[..., N - N // 10 :] = -1e9
    elif term == "padded":
        # As a pair mask is where the last third of the residues is none: their rows are wholly left out.
        key = torch.zeros((1, N, N), device="cuda", dtype=torch.bfloat16)
        key[..., N - N // 3 :] = -1e9
        key[:, N - N // 3 :] = -1e9
    q, k, v, grad_out = (normal(1, N, N, 4, D) for _ in range(4))
    return Inputs(q, k, v, normal(1, 4, N, N), key, None, D**-0.5, float("-inf"), False, grad_out)


def flex(x: Inputs) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    bias, key = x.bias[0], None if x.key_bias is None else x.key_bias[0]

    def score_mod(score: Tensor, r: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score + bias[h, i, j]
        return score if key is None else score + key[r, j]

    q, k, v = (t[0].transpose(1, 2) for t in (x.q, x.k, x.v))
    return flex_attention(q, k, v, score_mod=score_mod).transpose(1, 2)[None]


def backward_of(name: str, x: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """One whole backward; the lean kernels at any size."""
    if name in OURS:
        from trifast_inductor.kernels.triangle_attention import backward, forward
        from trifast_inductor.kernels.triangle_attention.hopper import dqkv_choice, whole_choice
        from trifast_inductor.kernels.triangle_attention.lean import launch as lean
        from trifast_inductor.kernels.triangle_attention.portable import whole

        whole.LONGEST = whole_choice.LONGEST = 0
        dqkv_choice.SHORTEST = dict.fromkeys(dqkv_choice.SHORTEST, 1)
        lean.FEWEST_LOGITS, lean.MOST_PADDED = 1, float("inf")
        saved = forward.portable(*x.op)
        run = backward.launch if name == "package" else backward.portable
        return lambda: run(x.grad_out, *x.op[:6], *saved, *x.op[6:], True)
    torch._dynamo.reset()
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]
    x = replace(x, q=leaves[0], k=leaves[1], v=leaves[2], bias=leaves[3])
    out = torch.compile(flex, dynamic=False)(x)
    return lambda: torch.autograd.grad(out, leaves, x.grad_out, retain_graph=True)


def replayed_ms(make: Callable[[], Run]) -> float:
    """Median of replays of a graph; several calls to a graph where one is short."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = make()
        run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        stream.synchronize()
        calls = max(1, min(10, int(2.0 / max(start.elapsed_time(end), 0.05))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
        times = []
        for n in range(12):
            start.record()
            graph.replay()
            end.record()
            stream.synchronize()
            if n > 1:
                times.append(start.elapsed_time(end) / calls)
    torch.cuda.current_stream().wait_stream(stream)
    return statistics.median(times)


def by_kernel(run: Run) -> str:
    """Microseconds of each kernel of one call."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    rows = [(e.key, e.device_time_total / 3) for e in profile.key_averages() if e.device_time_total > 0]
    return ", ".join(f"{name[-24:]} {us:.1f}" for name, us in sorted(rows, key=lambda row: -row[1])[:7])


def difference(x: Inputs) -> str:
    """How far each gradient of the two lies apart, beside its own norm."""
    return apart(backward_of("package", x)(), backward_of("present", x)())


def apart(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> str:
    """How far each gradient lies from the expected one, beside the norm of that."""
    pairs = zip(actual, expected, strict=True)
    far = [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs]
    wrong = "" if all(x < 0.02 for x in far) else " WRONG"  # two roundings to bfloat16 and then some
    return " ".join(f"{name} {x:.4f}" for name, x in zip(("dq", "dk", "dv", "dbias"), far, strict=True)) + wrong


def compile_parts(name: str) -> list[list[Setting]]:
    """What one process compiles each. Of a size, ours want its tile and which numbers are multiples of 16."""
    if name == FLEX:
        return [[setting] for setting in FLEX_SETTINGS]
    return [[Setting(N, D, term) for N in (512, 256, 192)] for D in (32, 64) for term in ("none", "tail")]


def compile_only(name: str, part: list[Setting]) -> None:
    for setting in part:
        backward_of(name, inputs(setting))()
    torch.cuda.synchronize()


def in_process(name: str, part: int, seconds: float) -> str | None:
    """What failed in a process that may die, or None."""
    command = [sys.executable, __file__, "--compile", name, str(part)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"took more than {seconds:.0f} s"
    return f"ended with {done.returncode}: {done.stderr[-300:]!r}" if done.returncode else None


def compile_all(seconds: float) -> set[tuple[str, int]]:
    """All parts at once; those that were not compiled."""
    pool = ThreadPoolExecutor(os.cpu_count())
    jobs = {
        pool.submit(in_process, name, part, seconds): (name, part)
        for name in (*OURS, FLEX)
        for part in range(len(compile_parts(name)))
    }
    missing = set(jobs.values())
    with suppress(TimeoutError):
        for job in as_completed(jobs, timeout=seconds):
            if job.result():
                print(f"{jobs[job]} is not compiled: {job.result()}", flush=True)
            else:
                missing.remove(jobs[job])
    pool.shutdown(wait=False, cancel_futures=True)
    return missing


def show(setting: Setting, name: str) -> None:
    try:
        x = inputs(setting)
        print(f"{setting} {name}: {replayed_ms(lambda: backward_of(name, x)):.4f} ms", flush=True)
        if name == "package":
            if setting.N in (512, 256):
                print(f"    {by_kernel(backward_of(name, x))}", flush=True)
            if setting.N < 1024:
                print(f"    apart: {difference(x)}", flush=True)
    except Exception as error:
        print(f"{setting} {name}: {error!r:.300}", flush=True)
        if "CUDA error" in str(error) or "illegal" in str(error):
            raise  # nothing runs in this process any more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--compile", nargs=2, metavar=("NAME", "PART"), help="what the processes are started with")
    options = parser.parse_args()
    started = time.monotonic()
    if options.compile:
        name, part = options.compile
        compile_only(name, compile_parts(name)[int(part)])
        return
    missing = compile_all(COMPILING * options.seconds)
    print(f"compiled in {time.monotonic() - started:.0f} s, but for {sorted(missing)}", flush=True)
    wanted = [(setting, name) for setting in settings() for name in OURS]
    peers = [(setting, FLEX) for part, setting in enumerate(FLEX_SETTINGS) if (FLEX, part) not in missing]
    for setting, name in [*wanted, *peers]:
        if time.monotonic() - started > options.seconds:
            print("out of time", flush=True)
            return
        show(setting, name)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # and wait for no job that hangs
