"""What docs/support.md says, as the cases that the tests run; `python -m tests.docs.support` writes the page."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.models import agreement
from tests.patterns.page import PACKAGES, table
from trifast_inductor.kernels.triangle_attention.op import implementation

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEAD_SIZES = (1, 8, 16, 24, 32, 64, 96, 128)
TOO_LARGE = 129
CALLS = ("op, inference", "op, training", "compiled, inference", "compiled, training")


@dataclass(frozen=True)
class Case:
    """One call of the op, or of attention in torch that is rewritten; test_support.py runs each."""

    device: str
    dtype: torch.dtype
    D: int
    call: str

    def __str__(self) -> str:
        return f"{self.device}-{_short(self.dtype)}-D{self.D}-{self.call}"


CASES = [
    Case(*choices)
    for choices in itertools.product(DEVICES, DTYPES, HEAD_SIZES, CALLS)
    if choices[2] > 1 or choices[3].startswith("op")  # a head of one channel is a product that the pass does not see
]

# Where a mode is tested: on the CPU in every run, on CUDA by tests that are skipped without a GPU.
_REGIONS, _EXPORT, _MODES = (f"tests/graphs/test_{name}.py" for name in ("regions", "export", "modes"))
_PACKAGE = f"{_EXPORT}::TestPackage"
MODES = (
    ("`dynamic=True`, and sizes that change", f"{_MODES}::test_automatic_dynamic_sizes_in_inference", ""),
    ('`mode="reduce-overhead"`, CUDA graphs', f"{_MODES}::test_modes", f"{_MODES}::test_modes"),
    ('`mode="max-autotune"`', f"{_MODES}::test_modes", f"{_MODES}::test_modes"),
    ("training under CUDA graphs", "", "tests/test_backend.py::TestBackend::test_training_under_cuda_graphs"),
    ("`fullgraph=True`", "tests/test_backend.py::TestBackend::test_fullgraph_and_dynamic", ""),
    ("autocast, outside and inside", f"{_REGIONS}::TestAutocast", ""),
    ("`no_grad` and `inference_mode`", f"{_REGIONS}::TestGradientModes", ""),
    ("activation checkpointing inside what is compiled", f"{_REGIONS}::TestCheckpoint", ""),
    ("`cond`, regions compiled once, graph breaks", f"{_REGIONS}::TestBodies", ""),
    ("data parallel in two processes", "tests/graphs/test_distributed.py", ""),
    ("`torch.export`", f"{_EXPORT}::TestRegions", ""),
    ("AOTInductor", f"{_PACKAGE}::test_on_the_cpu_under_register", f"{_PACKAGE}::test_on_cuda_by_name"),
    ("`register()`, in all threads", "tests/test_backend.py::TestRegister", ""),
    ("a warm compile cache", "tests/test_backend.py::TestCaches", ""),
)  # fmt: skip

INTRODUCTION = """\
# What runs where

Generated from the tests by `python -m tests.docs.support`; do not edit. "CPU" is tested in every run of the suite.
"CUDA" is tested by the same cases on a machine with a GPU, and skipped without one:
[benchmarks](benchmarks/README.md) says what has run on which GPU, and what has not yet.

Python 3.10 to 3.13, torch 2.11 or later, Triton 3.6 or later. Other devices are left to inductor.
"""


def render() -> str:
    parts = [INTRODUCTION, "## Dtype, head size, device\n"]
    parts += [f"Each cell is {len(CALLS)} cases: {'; '.join(CALLS)}. It names what runs.\n"]
    header = ("device", "dtype", *(f"D={D}" for D in HEAD_SIZES), f"D≥{TOO_LARGE}")
    rows = [
        (
            _title(device),
            _short(dtype),
            *(_cell(device, dtype, D) for D in HEAD_SIZES),
            "declined",
        )
        for device, dtype in itertools.product(DEVICES, DTYPES)
    ]
    parts += [table(header, rows)]
    parts += ['"op only": by name, not by the pass.\n']
    parts += ["N is any size, and rows, queries and keys may differ in number. `TRITON_INTERPRET=1` runs the Triton"]
    parts += ["kernels on the CPU, for small sizes; the suite does, in a process of its own.\n"]
    parts += ["## Modes\n"]
    parts += [
        '"Every run" has it; what says "with a GPU" is skipped without one; the rest has no test of its own there.\n'
    ]
    modes = [
        (name, "every run" if cpu else "", "with a GPU" if cuda else "", _files(cpu, cuda)) for name, cpu, cuda in MODES
    ]
    parts += [table(("mode", "CPU", "CUDA", "tests"), modes)]
    parts += ["## Published packages\n"]
    parts += [f"{', '.join(name for name, _ in PACKAGES)}: both nodes, in each of these.\n"]
    published = [
        (_published(case), *("yes" if case in cases else "" for cases in (agreement.COVERING, agreement.ALL)))
        for case in agreement.ALL
    ]
    parts += [table(("case", "CPU", "CUDA"), published)]
    return "\n".join(parts)


def _cell(device: str, dtype: torch.dtype, D: int) -> str:
    run = [call for call in CALLS if Case(device, dtype, D, call) in CASES]
    name = {"torch": "torch", "triton": "Triton"}[implementation(torch.device(device), dtype)]
    return name if len(run) == len(CALLS) else f"{name}, op only"


def _files(*tests: str) -> str:
    return ", ".join(dict.fromkeys(f"`{test.partition('::')[0]}`" for test in tests if test))


def _published(case: agreement.Case) -> str:
    dtype = "bfloat16 autocast" if case.autocast else _short(case.dtype)
    return f"{dtype}, {'mask' if case.masked else 'no mask'}, {'training' if case.training else 'inference'}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _title(device: str) -> str:
    return {"cpu": "CPU", "cuda": "CUDA"}[device]


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
