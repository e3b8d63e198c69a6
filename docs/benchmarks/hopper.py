"""The Hopper forward's shapes beside the portable kernel and FlexAttention, in one run of at most four minutes.

    python docs/benchmarks/hopper.py [--sizes 512,1024,256,2048] [--seconds 240] [NAME ...]

B=1, H=4, D=32, bfloat16, all passes of a call included: ms without a key term / with the last tenth of the keys left
out / with a random tenth of each row's, median of graph replays. Each name is a process of its own. All of them compile
at once, on small inputs that they also check; then they are timed one after the other, each after a check of some rows
against float64. A process that fails, or hangs, costs its own line only.

What a kernel waits for (about a minute; `--clock-control none` leaves the clocks alone):

    ncu --clock-control none --set full --import-source no -k regex:triangle_attention_fwd_hopper -c 1 \\
        python docs/benchmarks/hopper.py --once default --sizes 512
"""

import argparse
import contextlib
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.kernels.triangle_attention.hopper.choice import Shape
from trifast_inductor.testing import Inputs

# log-hopper.md, step 7, says why and what was predicted.
SHAPES = {
    "default": Shape(),  # "2x2" there: a partition for each warpgroup
    "q": Shape(BLOCKS=1, NUM_WARPS=8),  # two partitions of two warpgroups
    "sums": Shape(SUM_BY_PRODUCT=False),  # row sums by addition: less for the tensor cores
}
PEERS = ("portable", "flex")
LEFT_OUT = ("none", "tail", "random")
COMPILING = 110.0  # seconds for all to get ready
TIMING = 30.0  # seconds for one


def inputs(N: int, left_out: str, J: int | None = None, R: int | None = None) -> Inputs:
    """`left_out` is one of `LEFT_OUT`, of which "padded" leaves out what "tail" does."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    R, J = R or N, J or N
    key_bias = torch.zeros((1, R, J), device="cuda", dtype=torch.bfloat16) if left_out != "none" else None
    if key_bias is not None and left_out == "random":
        key_bias[torch.rand(key_bias.shape, generator=generator, device="cuda") < 0.1] = -1e9
    elif key_bias is not None:
        key_bias[..., int(0.9 * J) :] = -1e9
    q = normal(1, R, N, 4, 32)
    k, v, bias = normal(1, R, J, 4, 32), normal(1, R, J, 4, 32), normal(1, 4, N, J)
    return Inputs(q, k, v, bias, key_bias, None, 32**-0.5, 0.0, False, grad_out=q)


def _flex() -> Callable[[Inputs], torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 16  # a length and a key term each

    def attend(q: Any, k: Any, v: Any, bias: Any, key: Any, scale: float) -> torch.Tensor:
        def score_mod(score: Any, r: Any, h: Any, i: Any, j: Any) -> Any:
            score = score + bias[h, i, j]
            return score if key is None else score + key[r, j]

        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attention(q, k, v, score_mod=score_mod, scale=scale).transpose(1, 2)

    compiled = torch.compile(attend, dynamic=False)

    def call(x: Inputs) -> torch.Tensor:
        key = None if x.key_bias is None else x.key_bias[0]
        return compiled(x.q[0], x.k[0], x.v[0], x.bias[0], key, x.scale)[None]

    return call


def call_of(name: str) -> Callable[[Inputs], torch.Tensor]:
    if name == "flex":
        return _flex()
    if name == "portable":
        from trifast_inductor.kernels.triangle_attention import forward

        return lambda x: forward.portable(*x.op)[0]
    from trifast_inductor.kernels.triangle_attention.hopper import forward as hopper

    plans: dict[Any, Any] = {}

    def call(x: Inputs) -> torch.Tensor:
        what = (x.q.shape, x.k.shape, x.key_bias is None)
        if what not in plans:
            plans[what] = hopper.Plan(*x.op, SHAPES[name])
        return plans[what](*x.op[:6])[0]

    return call


def largest_error(x: Inputs, out: torch.Tensor) -> float:
    """Over the first two rows and the last, in float64."""
    rows = [0, 1, -1]
    key_bias = None if x.key_bias is None else x.key_bias[:, rows].double()
    q, k, v = (t[:, rows].double() for t in (x.q, x.k, x.v))
    exact = reference.forward(q, k, v, x.bias.double(), key_bias, None, x.scale, x.fill, False)[0]
    return (out[:, rows].double() - exact).abs().max().item()


def rows_computed_again(name: str, x: Inputs) -> int:
    from trifast_inductor.kernels.triangle_attention.hopper import forward as hopper

    plan = hopper.Plan(*x.op, SHAPES[name])
    return int(plan.fixed_shift(x.q, x.k, x.v, x.bias, x.key_bias)[2].isnan().sum())


def work(name: str, sizes: list[int]) -> None:
    """One process: get ready, wait for a word, time."""
    import triton

    call = call_of(name)
    for left_out in ("none", "tail"):
        if name == "flex":  # compiles for each length
            for N in sizes:
                call(inputs(N, left_out))
            continue
        x = inputs(200, left_out, J=333, R=5)
        error = largest_error(x, call(x))
        assert error < 0.02, f"largest error {error:.1e} at I=200, J=333"
    torch.cuda.synchronize()
    print("ready", flush=True)
    sys.stdin.readline()
    for N in sizes:
        times, errors, again = [], [], 0
        for left_out in LEFT_OUT:
            x = inputs(N, left_out)
            errors.append(largest_error(x, call(x)))
            if name in SHAPES:
                again += rows_computed_again(name, x)
            times.append(triton.testing.do_bench_cudagraph(lambda x=x: call(x), rep=40, return_mode="median"))
            del x
        note = f" ({again} rows again)" if again else ""
        print(f"  N={N} {times[0]:.4f}/{times[1]:.4f}/{times[2]:.4f} err {max(errors):.0e}{note}", end="", flush=True)
    print("", flush=True)


class Process:
    """One name at work. Its standard error is kept for the last line of what went wrong."""

    def __init__(self, name: str, sizes: list[int], script: str = __file__) -> None:
        self.name = name
        command = [sys.executable, script, "--work", name, "--sizes", ",".join(map(str, sizes))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self.said = b""
        self.errors = b""

    def hear(self, seconds: float, until: bytes | None) -> bool:
        """Read until a line comes, or the end of it all if `until` is None; False when time is up or it has died."""
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for stream in (self.process.stdout, self.process.stderr):
                assert stream is not None
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map() and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    data = os.read(key.fd, 65536)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is self.process.stdout:
                        self.said += data
                    else:
                        self.errors = (self.errors + data)[-4000:]
                if until is not None and until in self.said:
                    return True
            closed = not selector.get_map()
        return until is None and closed and self.process.wait(10) == 0

    def why_not(self) -> str:
        if self.process.poll() is None:
            return "no answer in time"
        lines = self.errors.decode(errors="replace").strip().splitlines()
        return next((line for line in reversed(lines) if line.strip()), f"exit status {self.process.returncode}")[:200]

    def end(self) -> None:
        self.process.kill()
        # A process whose kernel hangs takes a while to let go of the GPU, or never does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=10)


def main(names: list[str], sizes: list[int], seconds: float, script: str = __file__) -> None:
    end = time.monotonic() + seconds
    processes = [Process(name, sizes, script) for name in names]
    ready_by = time.monotonic() + min(COMPILING, 0.6 * seconds)
    ready = {p.name: p.hear(max(ready_by - time.monotonic(), 0.1), b"ready\n") for p in processes}
    for p in processes:
        if not ready[p.name]:
            print(f"{p.name:10} failed before it was timed: {p.why_not()}", flush=True)
            p.end()
    for p in processes:
        if not ready[p.name]:
            continue
        p.said = b""
        assert p.process.stdin is not None
        p.process.stdin.write(b"go\n")
        p.process.stdin.flush()
        finished = p.hear(min(TIMING, end - time.monotonic()), None)
        note = "" if finished else f"  cut short: {p.why_not()}"
        print(f"{p.name:10}{p.said.decode().strip()}{note}", flush=True)
        p.end()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[*PEERS, *SHAPES])
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=[512, 1024, 256, 2048])
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--work", metavar="NAME", help="what each process is started with")
    parser.add_argument("--once", metavar="NAME", help="one call, for a profiler")
    given = parser.parse_args()
    if unknown := {*given.names} - {*PEERS, *SHAPES}:
        parser.error(f"no such name: {', '.join(sorted(unknown))}; there are {', '.join([*PEERS, *SHAPES])}")
    if given.work:
        work(given.work, given.sizes)
    elif given.once:
        call_of(given.once)(inputs(given.sizes[0], "none"))
        torch.cuda.synchronize()
    else:
        main(given.names, given.sizes, given.seconds)
