"""The largest N that fits, forward and training, ours beside its peers: `python docs/benchmarks/largest_n.py`.

B=1, H=4, D=32, bfloat16, an additive mask: one attention from projections, as a model calls it. Every attempt is a
process of its own, which starts with an empty GPU; N doubles until it fails and is then halved to a multiple of 256.
Prints a table; with --budget (default 300 s) nothing begins after that time, and what is left shows how far it came.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

STEP = 256
LARGEST = 16384
NAMES = ("ours", "eager", "inductor", "flex")

ATTEMPT = """
import sys, torch, trifast_inductor
name, N, training = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "training"
torch.manual_seed(0)

def draw(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=training)

q, k, v = (draw(1, N, N, 4, 32).transpose(2, 3) for _ in range(3))
bias, mask = draw(1, 4, N, N), torch.zeros(1, N, N, dtype=torch.bool, device="cuda")
mask[..., -N // 10:] = True

def eager(q, k, v, bias, mask):
    a = torch.matmul(q * 32 ** -0.5, k.transpose(-1, -2))
    a = a + (-1e9 * mask.to(q.dtype))[:, :, None, None, :]
    a = a + bias[:, None]
    return torch.matmul(a.softmax(-1), v)

def flex(q, k, v, bias, mask):
    from torch.nn.attention.flex_attention import flex_attention
    def score(s, r, h, i, j):
        return torch.where(mask[0, r, j], -1e9, s + bias[0, h, i, j])
    return flex_attention(q[0], k[0], v[0], score_mod=score)[None]

backend = {"ours": "trifast", "inductor": "inductor", "flex": "inductor"}.get(name)
attend = flex if name == "flex" else eager
attend = attend if backend is None else torch.compile(attend, backend=backend, dynamic=False)
with torch.set_grad_enabled(training):
    out = attend(q, k, v, bias, mask)
    if training:
        out.backward(torch.ones_like(out))
torch.cuda.synchronize()
print("PEAK", torch.cuda.max_memory_allocated())
"""


def attempt(name: str, N: int, mode: str, timeout: float) -> int | None:
    """Peak bytes, or None where it does not fit, or not in time."""
    command = [sys.executable, "-W", "ignore", "-c", ATTEMPT, name, str(N), mode]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == 0:
        return int(done.stdout.split()[-1])
    if "out of memory" not in done.stderr:
        print(f"{name}, {mode}, N={N}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)
    return None


def largest(name: str, mode: str, until: float) -> tuple[int, int | None, bool]:
    """N, its peak, and whether the search came to its end."""
    fits, too_large, peak, N = 0, LARGEST + STEP, None, 1024
    while too_large - fits > STEP:
        left = until - time.monotonic()
        if left < 5:
            return fits, peak, False
        found = attempt(name, N, mode, left)
        if found is None:
            too_large = N
        else:
            fits, peak = N, found
        N = 2 * fits if too_large > LARGEST and fits else (fits + too_large) // 2 // STEP * STEP
        N = min(max(N, STEP), LARGEST)
    return fits, peak, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds")
    parser.add_argument("--names", default=",".join(NAMES))
    options = parser.parse_args()
    searches = [(name, mode) for mode in ("forward", "training") for name in options.names.split(",")]
    start = time.monotonic()
    print("| implementation | mode | largest N | GiB at that N |\n|---|---|---|---|")
    for index, (name, mode) in enumerate(searches):
        # What is left is shared out, so that the first ones cannot use it up.
        share = (start + options.budget - time.monotonic()) / (len(searches) - index)
        N, peak, is_final = largest(name, mode, time.monotonic() + share)
        memory = "" if peak is None else f"{peak / 2**30:.1f}"
        print(f"| {name} | {mode} | {N if is_final else f'{N} or more'} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
