"""Variants of the backward on one GPU: `PYTHONPATH=. python docs/benchmarks/variants/backward.py [--seconds 230]`.

First every variant is compiled and checked, one process for each part of a variant, so that one that fails takes no
other with it; then those that are right are timed beside the present backward and FlexAttention, B=1 and H=4, whole
backward by graph replay, and kernel by kernel with torch's profiler. Checks hold dq, dk, dv and dbias against float64
within the error budget of `trifast_inductor.testing`. Prints one line a figure, the decisive ones first.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[3])]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from trifast_inductor.testing import Inputs, assert_within_budget, logits_rounding, random_inputs  # noqa: E402

NAMES = ("dq", "dk", "dv", "dbias")
DEVICE = "cpu" if INTERPRETED else "cuda"
Run = Callable[[], object]


def variants() -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """By name; each takes what `backward.launch` takes."""
    import backward_fused as fused
    import backward_lean as lean

    from trifast_inductor.kernels.triangle_attention import backward

    T, C = lean.Tile, lean.Choice

    def of_lean(choice: Any) -> Callable[..., Any]:
        return lambda *args: lean.launch(*args, choice=choice)

    def of_fused(**options: Any) -> Callable[..., Any]:
        return lambda *args: fused.launch(*args, **options)

    def portable(*args: Any) -> tuple[Tensor, ...]:
        """The portable kernels, whichever others the package has."""
        package = getattr(backward, "lean", None)
        if package is None:
            return backward.launch(*args)
        backward._plans.clear()
        with mock.patch.object(package, "refusal", return_value="not asked for"):
            gradients = backward.launch(*args)
        backward._plans.clear()
        return gradients

    short = T(64, 64, 4, 1, 168)

    def in_package(*args: Any) -> tuple[Tensor, ...]:
        """What the package would take in place of the portable kernels, at any size."""
        backward._plans.clear()
        with mock.patch.multiple(backward.lean, SHORTEST=1, FEWEST_PROGRAMS=1):
            gradients = backward.launch(*args)
        backward._plans.clear()
        return gradients

    package = {"package": in_package} if hasattr(backward, "lean") else {}
    return {
        "present": portable,
        "lean": lean.launch,
        "fused": fused.launch,
        "fused, atomic": of_fused(atomic=True),
        "lean, 3 stages": of_lean(C(T(64, 64, 4, 3, 128), T(64, 64, 4, 3, 168), T(64, 64, 4, 3, 168))),
        "lean, no cap on registers": of_lean(C(T(64, 64, 4, 2), T(64, 64, 4, 2), T(64, 64, 4, 2))),
        "lean, wide": of_lean(C(T(128, 64, 8, 2, 128), T(32, 128, 4, 2, 168), T(64, 64, 4, 2, 168))),
        "lean, narrow": of_lean(C(T(64, 32, 4, 3), T(32, 64, 4, 3, 128), T(64, 32, 4, 3, 128))),
        "fused, atomic, no cap": of_fused(atomic=True, tile=T(64, 64, 4, 2), dbias_tile=T(64, 64, 4, 2)),
        "fused, atomic, 1 stage": of_fused(atomic=True, tile=short, dbias_tile=T(64, 64, 4, 3, 168)),
        "fused, atomic, 128 keys": of_fused(atomic=True, tile=T(64, 128, 8, 1, 128)),
        **package,
    }


# Checked in all cases; the others differ from these in their tiles alone.
CHECKED = ("lean", "fused", "fused, atomic")

# --- right ----------------------------------------------------------------------------------------------------------


def masked_row(x: Inputs) -> Inputs:
    for term in (x.key_bias, x.key_mask):
        if term is not None:
            term[0, 1] = -1e9 if term.is_floating_point() else True
    return x


def tail_masked(x: Inputs, kept: int) -> Inputs:
    for term in (x.key_bias, x.key_mask):
        if term is not None:
            term.zero_()
            term[..., kept:] = -1e9 if term.is_floating_point() else True
    return x


def check_parts() -> dict[str, list[tuple[str, Callable[[], Inputs]]]]:
    """Cases by name, in parts that one process each compiles and checks."""

    def draw(**given: Any) -> Inputs:
        sizes = {"H": 2, "R": 3, "D": 32, "dtype": torch.bfloat16, "device": DEVICE}
        return random_inputs(**{**sizes, **given})

    parts: dict[str, list[tuple[str, Callable[[], Inputs]]]] = {
        "bf16": [
            ("64", lambda: draw(I=64, J=64)),
            ("70 x 130", lambda: draw(I=70, J=130, B=2)),
            ("257", lambda: draw(I=257, J=257, R=5)),
            ("sharp", lambda: draw(I=128, J=128, sharpness=30.0)),
            ("no bias", lambda: draw(I=130, J=128, has_bias=False)),
            ("a bias of 1e4", lambda: replace(x := draw(I=64, J=64), bias=x.bias * 1e4)),
            ("70 rows, 512", lambda: draw(I=512, J=512, R=70)),
        ],
        "other": [
            ("fp16", lambda: draw(I=130, J=70, dtype=torch.float16)),
            ("D 64", lambda: draw(I=130, J=192, D=64, key_term="additive")),
            ("D 16", lambda: draw(I=64, J=64, D=16)),
        ],
    }
    for term in ("additive", "mask", "-inf mask"):
        parts[term] = [
            ("random", lambda term=term: draw(I=100, J=200, key_term=term)),
            ("random, before the bias", lambda term=term: draw(I=64, J=128, key_term=term, key_term_first=True)),
            ("tail", lambda term=term: tail_masked(draw(I=192, J=256, key_term=term), 100)),
            ("tail on a block", lambda term=term: tail_masked(draw(I=70, J=256, key_term=term), 128)),
            ("a row wholly masked", lambda term=term: masked_row(draw(I=128, J=128, key_term=term))),
            ("no bias", lambda term=term: draw(I=64, J=100, has_bias=False, key_term=term)),
        ]
    parts["tiles"] = [parts["bf16"][1], parts["additive"][2]]
    if INTERPRETED:
        parts = {
            name: [case for case in cases if case[0] not in ("257", "70 rows, 512")] for name, cases in parts.items()
        }
    return parts


def eager(x: Inputs) -> tuple[Tensor, ...]:
    from trifast_inductor.kernels.triangle_attention import reference

    leaves = [t.detach().clone().requires_grad_() for t in (x.q, x.k, x.v, x.bias) if t is not None]
    q, k, v = leaves[:3]
    p = torch.softmax(reference.logits(q, k, leaves[3] if x.bias is not None else None, *x.op[4:]), -1)
    return torch.autograd.grad(torch.einsum("brhij,brjhd->brihd", p, v), leaves, x.grad_out)


def faults(launch: Callable[..., tuple[Tensor, ...]], x: Inputs) -> list[str]:
    from trifast_inductor.kernels.triangle_attention import forward, reference

    got = launch(x.grad_out, *x.op[:6], *forward.launch(*x.op), *x.op[6:], True)
    again = launch(x.grad_out, *x.op[:6], *forward.launch(*x.op), *x.op[6:], True)
    exact = reference.backward(x.grad_out.double(), *x.to(torch.float64).op)
    terms = torch.einsum("brihd,brjhd->brhij", x.grad_out.double().abs(), x.v.double().abs())
    ds = torch.finfo(torch.float32).eps * terms.max().item()
    scale = x.scale
    cancelled = (ds * scale * x.k.abs().max().item(), ds * scale * x.q.abs().max().item(), 0.0, ds * x.q.shape[1])
    found = []
    for name, a, b, rounded, right, left in zip(NAMES, got, again, eager(x), exact, cancelled, strict=False):
        floor = left + logits_rounding(x) * right.abs().nan_to_num(0.0).max().item()
        try:
            assert_within_budget(a, rounded, right, name=name, floor=floor)
            assert torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0)), f"{name}: two runs differ"
        except AssertionError as error:
            found.append(str(error).replace("\n", " ")[:160])
    return found


def check(variant: str, part: str) -> list[str]:
    """In a process of its own. Faults, none of them where all is well."""
    found = []
    try:
        launch = variants()[variant]
        for name, make in check_parts()[part]:
            found += [f"{name}: {fault}" for fault in faults(launch, make())]
    except Exception:
        found.append(traceback.format_exc(limit=-2).replace("\n", " ")[-300:])
    return found


def compile_only(variant: str, settings: list[tuple[int, int, str, str]]) -> list[str]:
    """What will be timed, on few rows; in a process of its own."""
    try:
        for setting in settings:
            timed(variant, inputs(*setting, R=None if variant in PEERS else 64))()
        torch.cuda.synchronize()
    except Exception:
        return [traceback.format_exc(limit=-2).replace("\n", " ")[-300:]]
    return []


# --- fast -----------------------------------------------------------------------------------------------------------


def inputs(N: int, D: int, term: str, dtype: str, R: int | None = None) -> Inputs:
    shape, kind = (1, R or N, N, 4, D), getattr(torch, dtype)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE).to(kind)

    key = None
    if term != "none":
        left_out = torch.rand((1, R or N, N), generator=generator, device=DEVICE) < 0.3
        left_out[..., :1] = False
        key = (-1e9 * left_out.float()).to(kind)
    x = Inputs(
        normal(*shape), normal(*shape), normal(*shape), normal(1, 4, N, N), key, None, D**-0.5, float("-inf"), False,
        normal(*shape),
    )  # fmt: skip
    return tail_masked(x, N - N // 10) if term == "tail" else x


def _flex(x: Inputs) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    bias, key = x.bias[0], None if x.key_bias is None else x.key_bias[0]

    def score_mod(score: Tensor, r: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = score + bias[h, i, j]
        return score if key is None else score + key[r, j]

    q, k, v = (t[0].transpose(1, 2) for t in (x.q, x.k, x.v))
    return flex_attention(q, k, v, score_mod=score_mod).transpose(1, 2)[None]


def _eager(x: Inputs) -> Tensor:
    logits = torch.einsum("brihd,brjhd->brhij", x.q, x.k) * x.scale + x.bias[:, None]
    if x.key_bias is not None:
        logits = logits + x.key_bias[:, :, None, None]
    return torch.einsum("brhij,brjhd->brihd", torch.softmax(logits, -1), x.v)


PEERS = {"FlexAttention": _flex, "plain Inductor": _eager}


def timed(variant: str, x: Inputs) -> Run:
    """One whole backward."""
    from trifast_inductor.kernels.triangle_attention import forward

    if variant not in PEERS:
        saved = forward.launch(*x.op)
        launch = variants()[variant]
        return lambda: launch(x.grad_out, *x.op[:6], *saved, *x.op[6:], True)
    torch._dynamo.reset()
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias)]
    x = replace(x, q=leaves[0], k=leaves[1], v=leaves[2], bias=leaves[3])
    out = torch.compile(PEERS[variant], dynamic=False)(x)
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


def kernels(run: Run) -> str:
    """Microseconds of each kernel of one call."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    rows = [(e.key, e.device_time_total / 3) for e in profile.key_averages() if e.device_time_total > 0]
    return ", ".join(f"{name[:36]} {us:.1f}" for name, us in sorted(rows, key=lambda row: -row[1])[:7])


def schedule() -> Iterator[tuple[tuple[int, int, str, str], list[str]]]:
    """(N, D, key term, dtype) and who is timed on it, the decisive ones first."""
    ours = list(variants())
    best = ["present", "lean", "fused", "fused, atomic", "FlexAttention"]
    for N in (512, 256):
        for term in ("none", "tail"):
            yield (N, 32, term, "bfloat16"), [*ours, "FlexAttention"]
    yield (1024, 32, "none", "bfloat16"), [*ours[:5], "FlexAttention"]
    for N in (128, 64, 384):
        yield (N, 32, "tail", "bfloat16"), best
    for N in (256, 512):
        yield (N, 32, "none", "float32"), ["present", "plain Inductor"]
    yield (512, 32, "random", "bfloat16"), best[:-1]
    yield (1024, 32, "tail", "bfloat16"), best[:-1]
    for N in (256, 512):
        yield (N, 64, "none", "bfloat16"), best


def compile_parts(name: str) -> list[list[tuple[int, int, str, str]]]:
    """What one variant is timed on, in one part; for a peer, which takes long to compile, each apart."""
    settings = [setting for setting, names in schedule() if name in names]
    return [[setting] for setting in settings] if name in PEERS else [settings] if settings else []


def in_process(name: str, part: str, seconds: float) -> list[str]:
    """Faults of one job, in a process that may die."""
    command = [sys.executable, __file__, "--job", name, part]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [f"took more than {seconds:.0f} s"]
    found = [line[7:] for line in done.stdout.splitlines() if line.startswith("fault: ")]
    if done.returncode and not found:
        found = [f"ended with {done.returncode}: {done.stderr[-300:]!r}"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=230.0)
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--job", nargs=2, metavar=("VARIANT", "PART"), help="what the processes are started with")
    options = parser.parse_args()
    started = time.monotonic()
    if options.job:
        name, part = options.job
        settings = compile_parts(name)
        found = compile_only(name, settings[int(part[8:])]) if part.startswith("compile ") else check(name, part)
        print("\n".join(f"fault: {fault}" for fault in found))
        return

    def left() -> float:
        return options.seconds - (time.monotonic() - started)

    jobs: dict[Any, tuple[str, str]] = {}
    wrong: set[str] = set()
    fatal: set[str] = set()  # would leave this process without its GPU
    pool = ThreadPoolExecutor(1 if INTERPRETED else os.cpu_count())
    for name in [*variants(), *PEERS]:
        parts = check_parts() if name in CHECKED else ["tiles"]
        if name in PEERS or name == "present":
            parts = []
        if not options.check_only:
            parts = [*(f"compile {n}" for n in compile_parts(name)), *parts]
        for part in parts:
            jobs[pool.submit(in_process, name, part, 0.6 * options.seconds)] = (name, part)
    with suppress(TimeoutError):
        for job in as_completed(jobs, timeout=None if INTERPRETED else 0.6 * options.seconds):
            name, part = jobs[job]
            found = job.result()
            for fault in found:
                print(f"WRONG {name}, {part}: {fault}", flush=True)
            if found:
                wrong.add(name)
                if any(sign in fault for fault in found for sign in ("CUDA error", "illegal", "ended with")):
                    fatal.add(name)
            elif part in check_parts():
                print(f"right {name}, {part}", flush=True)
    unfinished = [what for job, what in jobs.items() if not job.done()]
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"checked in {time.monotonic() - started:.0f} s; unfinished: {unfinished}", flush=True)
    if options.check_only:
        return
    for setting, names in schedule():
        x = inputs(*setting)
        for name in names:
            if name in fatal:
                continue
            if left() < 0:
                print("out of time", flush=True)
                return
            mark = " (WRONG)" if name in wrong else ""
            try:
                ms = replayed_ms(lambda name=name, x=x: timed(name, x))
                print(f"{setting} {name}{mark}: {ms:.4f} ms", flush=True)
                if setting[0] in (256, 512) and setting[1:3] == (32, "none"):
                    print(f"    {kernels(timed(name, x))}", flush=True)
            except Exception as error:
                print(f"{setting} {name}: {error!r:.300}", flush=True)
                if "CUDA error" in str(error) or "illegal" in str(error):
                    return  # nothing runs in this process any more


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # and wait for no job that hangs
