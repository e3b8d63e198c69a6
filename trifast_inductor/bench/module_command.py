"""`bench --module`: whole modules compiled with backend="trifast", with "inductor", and around cuEquivariance."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trifast_inductor.bench import launches, modules
from trifast_inductor.bench.case import DTYPES, dtype_name
from trifast_inductor.bench.measure import in_short
from trifast_inductor.bench.tables import figure, ratio
from trifast_inductor.bench.timing import Clock, freed_afterwards
from trifast_inductor.tables import CsvFile, header_text, markdown

C_PAIR, C_SINGLE = 128, 384
LENGTHS = {"cuda": [128, 256, 384, 512, 768], "cpu": [16, 32]}
QUICK = {"cuda": [128], "cpu": [16]}
REFERENCE = "inductor"


@dataclass(frozen=True)
class ModuleRow:
    """A line of the CSV file; step is forward with a graph, and backward; the rest as in `measure.Row`."""

    model: str
    variant: str
    B: int
    H: int
    D: int
    N: int
    dtype: str
    forward_device_ms: float | None = None
    step_device_ms: float | None = None
    forward_call_ms: float | None = None
    step_call_ms: float | None = None
    forward_mib: float | None = None
    step_mib: float | None = None
    difference: float | None = None  # ‖x - x of plain inductor‖ / ‖x of plain inductor‖, on the pair representation
    note: str = ""


@dataclass(frozen=True)
class Variant:
    name: str
    backend: str
    core: modules.Core = modules.eager_core


# Plain inductor comes first: the others are compared with it.
VARIANTS: dict[str, Callable[[], Variant]] = {
    REFERENCE: lambda: Variant(REFERENCE, "inductor"),
    "trifast": lambda: Variant("trifast", "trifast"),
    "cuequivariance": lambda: Variant("inductor, cuequivariance called", "inductor", modules.cuequivariance_core()),
}


def variants(wanted: Sequence[str], device: torch.device) -> list[Variant]:
    """Those of `VARIANTS` that can run."""
    has_cuequivariance = device.type == "cuda" and importlib.util.find_spec("cuequivariance_torch") is not None
    return [
        make() for name, make in VARIANTS.items() if name in wanted and (name != "cuequivariance" or has_cuequivariance)
    ]


def run(arguments: argparse.Namespace, device: torch.device, header: dict[str, str], directory: Path) -> int:
    """0 unless backend="trifast" failed."""
    print(header_text(header), flush=True)
    deadline = time.monotonic() + arguments.budget
    clock = Clock(device, 0.05 if arguments.quick else arguments.seconds)
    rows: list[ModuleRow] = []
    listings: list[str] = []
    file = CsvFile(directory / "modules.csv", header, ModuleRow)
    for model, B, H, D, dtype, N in _grid(arguments):
        reference: Tensor | None = None
        for variant in variants(arguments.variants, device):
            with freed_afterwards(device):
                bench = _Bench(model, variant, B, H, D, N, DTYPES[dtype], device)
                rows.append(bench.measured(clock, reference, deadline))
                if variant.name == REFERENCE:
                    reference = bench.result
                if arguments.kernels == N and not rows[-1].note:
                    listings.append(bench.listing())
            file.add(rows[-1])
    file.close()
    table = module_tables(rows)
    print(f"\n{table}\n")
    for name, parts in (("modules.md", [table]), ("launches.md", listings)):
        if parts:
            text = "\n\n".join([header_text(header), *parts])
            (directory / name).write_text(text + "\n", encoding="utf-8")
            print(f"wrote {directory / name}")
    return int(any(row.note.startswith("error") for row in rows if row.variant == "trifast"))


def compile_only(arguments: argparse.Namespace, device: torch.device) -> int:
    """Inference and training of every variant once, for the compilers' caches on disk."""
    for model, B, H, D, dtype, N in _grid(arguments):
        for variant in variants(arguments.variants, device):
            with freed_afterwards(device), contextlib.suppress(Exception):
                bench = _Bench(model, variant, B, H, D, N, DTYPES[dtype], device)
                bench.forward()
                bench.step()
    return 0


def _grid(arguments: argparse.Namespace) -> Iterator[tuple[str, int, int, int, str, int]]:
    yield from itertools.product(
        arguments.models, arguments.b, arguments.h, arguments.d, arguments.dtype, sorted(arguments.n)
    )


class _Bench:
    """One variant of one model at one size, with its own weights, alike in all variants."""

    def __init__(
        self, model: str, variant: Variant, B: int, H: int, D: int, N: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        torch.manual_seed(0)
        torch._dynamo.reset()
        self.title = f"{model}, {variant.name}, B={B} H={H} D={D} N={N} {dtype_name(dtype)}"
        self.figures: dict[str, Any] = {
            "model": model,
            "variant": variant.name,
            "B": B,
            "H": H,
            "D": D,
            "N": N,
            "dtype": dtype_name(dtype),
        }
        self.device = device
        self.module: nn.Module = modules.MODELS[model](C_PAIR, H, D, core=variant.core).to(device, dtype)
        self.backend = variant.backend
        self.compiled = self._compile()
        self.s = torch.randn(B, N, C_SINGLE).to(device, dtype).requires_grad_()
        self.z = torch.randn(B, N, N, C_PAIR).to(device, dtype).requires_grad_()
        present = torch.arange(N, device=device) < N - N // 10  # padding, as a batch has it
        self.mask = (present[:, None] & present[None, :]).expand(B, N, N).to(dtype)
        self.grads_out = [torch.randn(x.shape).to(device, dtype) for x in (self.s, self.z)]
        self.leaves = [self.s, self.z, *self.module.parameters()]
        self.result: Tensor | None = None

    def _compile(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return torch.compile(self.module, backend=self.backend, dynamic=False)

    def forward(self, turn: int = 0) -> Tensor:
        with torch.no_grad():
            return self.compiled(self.s, self.z, self.mask)[1]

    def step(self, turn: int = 0) -> Sequence[Tensor]:
        return torch.autograd.grad(self.compiled(self.s, self.z, self.mask), self.leaves, self.grads_out)

    def measured(self, clock: Clock, reference: Tensor | None, deadline: float) -> ModuleRow:
        figures = self.figures
        if time.monotonic() > deadline:
            return ModuleRow(**figures, note="not run: the time budget is spent")
        try:
            self.result = self.forward()
            if reference is not None:
                distance = (self.result.double() - reference.double()).norm() / reference.double().norm()
                figures["difference"] = distance.nan_to_num(float("inf")).item()
            figures["forward_mib"] = clock.peak_mib(self.forward)
            figures["forward_device_ms"] = clock.device_ms(self.forward)
            figures["forward_call_ms"] = clock.call_ms(self.forward)
            self.step()
            figures["step_mib"] = clock.peak_mib(self.step)
            figures["step_device_ms"] = clock.device_ms(self.step)
            figures["step_call_ms"] = clock.call_ms(self.step)
        except Exception as error:  # of whatever kind: the other variants go on
            figures["note"] = in_short(error)
        return ModuleRow(**figures)

    def listing(self) -> str:
        """Markdown: what inference and training launch."""
        parts = [f"### launches: {self.title}"]
        for name, call in (("inference", self.forward), ("training", self.step)):
            self.compiled = self._compile()
            lines = launches.generated(call)
            parts.append("\n".join([f"{name}, generated calls in order:", "", "```text", *lines, "```"]))
            if self.device.type == "cuda":
                columns = ("kernel", "launches", "ms")
                cells = [[key[:100].replace("|", "/"), str(n), f"{ms:.4f}"] for key, n, ms in launches.profiled(call)]
                parts.append(markdown(columns, cells))
        return "\n\n".join(parts)


def module_tables(rows: Sequence[ModuleRow]) -> str:
    """Times with how many times faster than plain inductor each is."""
    columns = ["model", "N", "variant", "fwd ms", "gain", "fwd+bwd ms", "gain", "fwd call ms", "gain"]
    columns += ["fwd+bwd call ms", "gain", "fwd MiB", "fwd+bwd MiB", "difference", "note"]
    same = ("model", "B", "H", "D", "N", "dtype")
    lines = []
    for row in rows:
        alike = (r for r in rows if r.variant == REFERENCE and all(getattr(r, x) == getattr(row, x) for x in same))
        plain = next(alike, None)
        cells = [row.model, str(row.N), row.variant]
        for name in ("forward_device_ms", "step_device_ms", "forward_call_ms", "step_call_ms"):
            cells += [figure(getattr(row, name)), ratio(getattr(plain, name, None), getattr(row, name))]
        cells += ["" if x is None else f"{x:.0f}" for x in (row.forward_mib, row.step_mib)]
        lines.append([*cells, "" if row.difference is None else f"{row.difference:.1e}", row.note])
    shape = ", ".join(dict.fromkeys(f"B={r.B} H={r.H} D={r.D} {r.dtype}" for r in rows))
    return f"### modules, {shape}\n\n{markdown(columns, lines)}"
