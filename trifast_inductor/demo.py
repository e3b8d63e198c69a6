"""`python -m trifast_inductor demo`: a published folding trunk, unmodified, three ways.

Runs the folding trunk of transformers' ESMFold (random weights, published sizes: pair width 128, 4 heads of 32) on
two real proteins, forward and backward: eagerly, with plain inductor, and with backend="trifast". Its blocks are
compiled with `nn.Module.compile`; its structure module, which has no triangle attention, stays eager throughout.
Where transformers is not installed, a stand-in of the same sizes runs instead, and the output says so.

What is compared are the trunk's sequence and pair representations and the gradients of a loss on them. The positions
are left out: under random weights the structure module turns a change of 1e-6 in the weights into one of order 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from trifast_inductor.demo_trunk import StandInTrunk
from trifast_inductor.explain import explain

PROTEINS = {
    "human ubiquitin": "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "hen lysozyme": (
        "KVFGRCELAAAMKRHGLDNYRGYSLGNWVCAAKFESNFNTQATNRNTDGSTDYGILQINSRWWCNDGRTPGSRNLC"
        "NIPCSALLSSDITASVNCAKKIVSDGNGMNAWVAWRNRCKGTDVQAWIRGCRL"
    ),
}
RESIDUES = "ARNDCQEGHILKMFPSTWYV"  # AlphaFold's order
SITES_A_BLOCK = 3  # starting node, ending node, and sequence attention with pair bias
# Relative to the norm of each tensor, in float32: two blocks and a structure module of sums taken in another order
# reach 1e-6 to 1e-5 between eager and plain inductor; a wrong attention is above 1e-2.
BUDGET = 1e-3
_STAND_IN = "stand-in for ESMFold's trunk (the published one with: pip install 'transformers>=5')"


@dataclasses.dataclass
class Run:
    """One variant on one protein."""

    results: dict[str, Tensor]
    forward_ms: float
    backward_ms: float
    peak_mib: float
    fused_calls: int


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; 0 when every site was rewritten and every difference is within the budget."""
    argparse.ArgumentParser(prog="python -m trifast_inductor demo", description=str(__doc__)).parse_args(argv)
    warnings.filterwarnings("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not _has_compiler():
        print("inductor needs a C++ compiler on the CPU: install g++ or clang, or set CXX", file=sys.stderr)
        return 2
    trunk, name = _trunk(blocks=2)
    trunk = trunk.to(device)
    print(f"{name}, {len(trunk.blocks)} blocks, random weights, float32, {_device_name(device)}")
    failures: list[str] = []
    _report_sites(trunk, device, failures)
    print(f"\n{'':10}{'':22}{'forward':>12}{'backward':>12}{'peak memory':>14}{'difference':>12}")
    eager: dict[str, Run] = {}
    for backend in (None, "inductor", "trifast"):
        _compile_blocks(trunk, backend)
        for name, sequence in PROTEINS.items():
            label = f"{backend or 'eager':10}{name}, {len(sequence)}"
            print(f"{label} ...", end="\r", flush=True)
            run = _measure(trunk, sequence, device)
            where, difference = _largest_difference(run.results, eager.setdefault(name, run).results)
            _print_run(label, run, difference)
            if not difference <= BUDGET:
                failures.append(f"{label}: {where} differs by {difference:.1e}, budget {BUDGET:.0e}")
            if backend == "trifast" and run.fused_calls != SITES_A_BLOCK * len(trunk.blocks):
                failures.append(f"{label}: {run.fused_calls} fused calls in {len(trunk.blocks)} blocks")
    print("\ndifference: largest ‖x - eager‖ / ‖eager‖ over the outputs, the input's and all parameters' gradients")
    for failure in failures:
        print(f"FAILED {failure}")
    if not failures:
        print(f"OK: every site rewritten, every difference within {BUDGET:.0e}")
    return bool(failures)


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return shutil.which(get_cpp_compiler()) is not None
    except InvalidCxxCompiler:
        return False


def _trunk(blocks: int) -> tuple[Any, str]:
    """The published module and its name, or the stand-in; final projections that start at 0 would hide errors."""
    torch.manual_seed(0)
    trunk, name = _published_trunk(blocks) or (StandInTrunk(blocks), _STAND_IN)
    with torch.no_grad():
        for weight in trunk.blocks.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape) * 0.5 / weight.shape[-1] ** 0.5)
    return trunk, name


def _published_trunk(blocks: int) -> tuple[Any, str] | None:
    try:
        from transformers.models.esm.configuration_esm import EsmFoldConfig
        from transformers.models.esm.modeling_esmfold import EsmFoldingTrunk
    except ImportError:
        return None
    trunk = EsmFoldingTrunk(EsmFoldConfig(trunk={"num_blocks": blocks, "dropout": 0.0}).trunk)
    trunk.set_chunk_size(None)
    return trunk, "ESMFold folding trunk"


def _inputs(sequence: str, device: torch.device) -> tuple[Any, ...]:
    """What EsmForProteinFolding gives its trunk; residue embeddings stand in for the language model's."""
    residues = torch.tensor([[RESIDUES.index(letter) for letter in sequence]])
    n = len(sequence)
    generator = torch.Generator().manual_seed(1)
    s = torch.randn(len(RESIDUES), 1024, generator=generator)[residues].to(device).requires_grad_()
    z = torch.zeros(1, n, n, 128, device=device)
    index = torch.arange(n, device=device)[None]
    return s, z, residues.to(device), index, torch.ones(1, n, device=device), 0


def _report_sites(trunk: Any, device: torch.device, failures: list[str]) -> None:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = trunk.blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        trunk(*_inputs(PROTEINS["human ubiquitin"], device))
        handle.remove()
        args, kwargs = seen[0]
        report = explain(trunk.blocks[0], *args, **kwargs)
    print(f"\nsites in one block:\n{report}")
    if report.rewritten != SITES_A_BLOCK or report.declined:
        failures.append(f"explain: {report.rewritten} sites rewritten, {report.declined} declined")


def _compile_blocks(trunk: Any, backend: str | None) -> None:
    """One graph serves all blocks and, being dynamic, both proteins."""
    for block in trunk.blocks:
        block._compiled_call_impl = None
        if backend is not None:
            block.compile(backend=backend, dynamic=True)


def _measure(trunk: Any, sequence: str, device: torch.device, repeats: int = 3) -> Run:
    results = _step(trunk, sequence, device)[0]  # compiles
    baseline = _reset_peak(device)
    times = [_step(trunk, sequence, device)[1:] for _ in range(repeats)]
    peak = (_peak(device) - baseline) / 2**20
    forward, backward = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    # Calls are counted where they happen: a warm compile cache never calls the pass, which then counts nothing.
    module, name = _implementation(device)
    with mock.patch.object(module, name, wraps=getattr(module, name)) as fused:
        _step(trunk, sequence, device)
    return Run(results, forward, backward, peak, fused.call_count)


def _implementation(device: torch.device) -> tuple[ModuleType, str]:
    """What the op calls for a forward on this device."""
    from trifast_inductor.kernels.triangle_attention import cpu

    if device.type == "cpu":
        return cpu, "forward"
    from trifast_inductor.kernels.triangle_attention import forward

    return forward, "launch"


def _step(trunk: Any, sequence: str, device: torch.device) -> tuple[dict[str, Tensor], float, float]:
    """Outputs and gradients by name, and seconds forward and backward."""
    inputs = _inputs(sequence, device)
    trunk.zero_grad(set_to_none=True)
    start = _now(device)
    out = trunk(*inputs)
    between = _now(device)
    outputs = {name: out[name] for name in ("s_s", "s_z")}
    loss = sum(x.square().mean() for x in outputs.values())
    loss.backward()
    end = _now(device)
    gradients = {f"grad of {name}": p.grad for name, p in trunk.named_parameters() if p.grad is not None}
    results = {name: x.detach() for name, x in outputs.items()} | {"grad of input": inputs[0].grad} | gradients
    return results, between - start, end - between


def _largest_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[str, float]:
    """NaN counts as infinite. A gradient below the rounding of the largest one is measured against that."""
    floor = 1e-6 * max(x.norm().item() for name, x in expected.items() if name.startswith("grad"))
    differences = {
        name: ((actual[name] - x).norm() / x.norm().clamp(min=floor)).nan_to_num(float("inf")).item()
        for name, x in expected.items()
    }
    where = max(differences, key=lambda name: differences[name])
    return where, differences[where]


def _print_run(name: str, run: Run, difference: float) -> None:
    print(
        f"{name:32}{run.forward_ms:9.1f} ms{run.backward_ms:9.1f} ms{run.peak_mib:10.0f} MiB{difference:12.1e}",
        flush=True,
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(device: torch.device) -> int:
    """Bytes in use; from here on the peak is counted anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _status_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    """A line of this process's status on Linux, in bytes; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
