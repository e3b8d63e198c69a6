"""A peer that fails costs a note, not the run; what was measured before stays."""

import dataclasses

import pytest
import torch

from tests.bench.conftest import CPU, small
from trifast_inductor.bench.accuracy import Exact
from trifast_inductor.bench.case import Case
from trifast_inductor.bench.measure import in_short, measure
from trifast_inductor.bench.peers import PEERS, Peer
from trifast_inductor.bench.timing import Clock

CLOCK = Clock(CPU, seconds=0.001)


def test_every_figure_of_a_peer_that_works(case: Case) -> None:
    row = measure(case, PEERS["ours"], CPU, CLOCK, Exact(case, CPU))
    missing = [name for name, value in dataclasses.asdict(row).items() if value is None]
    assert missing == ["forward_mib", "step_mib", "forward_floor_ms", "backward_floor_ms"]
    assert row.note == ""
    assert row.group == f"B2-H2-D8-float32-padding-{case.layout}"


def test_a_peer_without_a_backward_keeps_its_forward() -> None:
    detached = Peer("detached", "brhid", lambda case: lambda q, k, v, bias, mask: v.detach())
    row = measure(small(), detached, CPU, CLOCK, None)
    assert row.forward_device_ms is not None
    assert row.backward_device_ms is None
    assert row.note.startswith("error: RuntimeError")


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.cuda.OutOfMemoryError("Tried to allocate 64 GiB"), "out of memory"),
        (RuntimeError("CUDA out of memory"), "out of memory"),
        (ValueError("\n  first line\nsecond"), "error: ValueError: first line second"),
        (KeyError(), "error: KeyError: "),
    ],
)
def test_notes_are_one_line(error: Exception, note: str) -> None:
    assert in_short(error) == note
