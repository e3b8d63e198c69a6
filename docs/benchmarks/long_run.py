"""Training curves of a small trunk, eager, plain inductor and trifast: `python -m docs.benchmarks.long_run`.

Two Pairformer-like blocks (tests/graphs/trunk.py) from one seed. Every run drifts from float64 as roundings add up over
the steps; the question is whether trifast's does so faster than eager's own. Writes docs/benchmarks/long_run.png and
prints the largest relative differences.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import torch

from tests.graphs.trunk import apart, losses

FIGURE = Path(__file__).with_suffix(".png")
COLOURS = {"eager": "black", "inductor": "tab:blue", "trifast": "tab:red"}


def plot(curves: dict[str, list[float]], exact: list[float], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(6, 5), sharex=True, layout="constrained")
    for width, (name, curve) in zip((4, 2.5, 1), curves.items(), strict=True):
        above.plot(curve, label=name, color=COLOURS[name], linewidth=width)
        off = [max(abs(a - b) / abs(b), 1e-9) for a, b in zip(curve, exact, strict=True)]
        below.plot(off, label=name, color=COLOURS[name], linewidth=1)
    above.set(ylabel="loss", yscale="log")
    above.legend()
    below.set(ylabel="|loss - float64's| / loss", yscale="log", xlabel="step")
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--N", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    common = {"N": options.N, "device": device, "seed": options.seed}
    exact = losses(options.steps, dtype=torch.float64, **common)
    curves = {}
    for name, backend in (("eager", None), ("inductor", "inductor"), ("trifast", "trifast")):
        torch._dynamo.reset()
        curves[name] = losses(options.steps, backend=backend, **common)
        print(
            f"{name:9} loss {curves[name][0]:.4f} to {curves[name][-1]:.4f}; largest relative difference from "
            f"float64 {apart(curves[name], exact):.1e}, from eager {apart(curves[name], curves['eager']):.1e}",
            flush=True,
        )
    plot(curves, exact, FIGURE)
    print(
        f"torch {torch.__version__}, {device}, {options.steps} steps, N={options.N}, seed {options.seed}: {FIGURE.name}"
    )


if __name__ == "__main__":
    main()
