"""One peer on one case: a row of figures, or why there is none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trifast_inductor.bench.accuracy import Exact
from trifast_inductor.bench.case import Case, InputSet, draw, dtype_name
from trifast_inductor.bench.floors import floors_ms
from trifast_inductor.bench.peers import Peer
from trifast_inductor.bench.timing import Clock, freed_afterwards, turns_for


@dataclass(frozen=True)
class Row:
    """A line of the CSV file. None: not measured; `note` says why.

    forward: without a graph. backward: the gradients alone. step: forward with a graph, and backward.
    device: the GPU's own time. call: wall time in a stream of calls, launches included.
    """

    peer: str
    B: int
    H: int
    D: int
    N: int
    dtype: str
    mask: str
    layout: str
    forward_device_ms: float | None = None
    backward_device_ms: float | None = None
    forward_call_ms: float | None = None
    step_call_ms: float | None = None
    forward_mib: float | None = None
    step_mib: float | None = None
    forward_error: float | None = None
    backward_error: float | None = None
    worst_gradient: str = ""
    forward_floor_ms: float | None = None
    backward_floor_ms: float | None = None
    seconds: float | None = None  # what the row itself took, compiling and a peer's own tuning included
    note: str = ""

    @property
    def group(self) -> str:
        """All that was given but N, as a file name: the rows of a group share a table and a plot."""
        return f"B{self.B}-H{self.H}-D{self.D}-{self.dtype}-{self.mask}-{self.layout}"


def row(case: Case, peer: str, **figures: Any) -> Row:
    return Row(
        peer=peer,
        B=case.B,
        H=case.H,
        D=case.D,
        N=case.N,
        dtype=dtype_name(case.dtype),
        mask=case.mask,
        layout=case.layout,
        **figures,
    )


def measure(case: Case, peer: Peer, device: torch.device, clock: Clock, exact: Exact | None) -> Row:
    """All figures of a peer. Running out of memory, or any error, ends as a note; what came before it is kept."""
    figures: dict[str, Any] = {}
    floors = floors_ms(case, torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if floors is not None:
        figures["forward_floor_ms"], figures["backward_floor_ms"] = floors
    start = time.monotonic()
    with freed_afterwards(device):
        try:
            _measure(case, peer, device, clock, exact, figures)
        except Exception as error:  # a peer may fail in any way of its own; the others go on
            figures["note"] = in_short(error)
    figures["seconds"] = time.monotonic() - start
    return row(case, peer.name, **figures)


def compile_only(case: Case, peer: Peer, device: torch.device) -> None:
    """What a measurement compiles, and nothing else; the compilers keep it on disk. Failures show when measured."""
    with freed_afterwards(device), contextlib.suppress(Exception):
        run = peer.build(case)
        inputs = draw(case, peer.axes, device, seed=0)
        with torch.no_grad():
            run(*inputs.arguments)
        torch.autograd.grad(run(*inputs.arguments), inputs.leaves, inputs.grad_out)


def _measure(
    case: Case, peer: Peer, device: torch.device, clock: Clock, exact: Exact | None, figures: dict[str, Any]
) -> None:
    sets = [draw(case, peer.axes, device, seed) for seed in range(turns_for(case.input_bytes, device))]
    run = peer.build(case)

    def of_turn(turn: int) -> InputSet:
        return sets[turn % len(sets)]

    def forward(turn: int) -> Tensor:
        with torch.no_grad():
            return run(*of_turn(turn).arguments)

    def with_graph(turn: int) -> tuple[Tensor, InputSet]:
        given = of_turn(turn)
        return run(*given.arguments), given

    def backward(given: tuple[Tensor, InputSet]) -> tuple[Tensor, ...]:
        out, inputs = given
        return torch.autograd.grad(out, inputs.leaves, inputs.grad_out)

    def step(turn: int) -> tuple[Tensor, ...]:
        return backward(with_graph(turn))

    forward(0)  # compiles, and tunes where a peer does
    figures["forward_mib"] = clock.peak_mib(lambda: forward(0))
    figures["forward_device_ms"] = clock.device_ms(forward)
    figures["forward_call_ms"] = clock.call_ms(forward)
    if exact is not None:
        _compare(exact, peer, with_graph, backward, figures)
    else:
        step(0)
    figures["step_mib"] = clock.peak_mib(lambda: step(0))
    figures["backward_device_ms"] = clock.device_ms(backward, with_graph)
    figures["step_call_ms"] = clock.call_ms(step)


def _compare(
    exact: Exact,
    peer: Peer,
    with_graph: Callable[[int], tuple[Tensor, InputSet]],
    backward: Callable[[tuple[Tensor, InputSet]], tuple[Tensor, ...]],
    figures: dict[str, Any],
) -> None:
    out, inputs = with_graph(0)
    gradients = backward((out, inputs))
    errors = exact.errors((out.detach(), *gradients), peer.axes)
    figures["forward_error"], figures["backward_error"], figures["worst_gradient"] = errors


def in_short(error: Exception) -> str:
    """A note for a table: one line, and the same words for every way of running out of memory."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    text = " ".join(str(error).split())  # what torch.compile raises says only in its second line what happened
    return f"error: {type(error).__name__}: {text[:160]}"
