"""Launches are compiled and kept, whichever way a launcher makes them; nothing of it stays behind."""

import contextlib

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import tuning
from trifast_inductor.static.recording import launches_for

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _fill(x_ptr, value, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    i = tl.arange(0, BLOCK_I)[:, None] * BLOCK_J + tl.arange(0, BLOCK_J)[None, :]
    tl.store(x_ptr + i, tl.zeros_like(i) + value)


def test_by_name_and_by_position_and_again() -> None:
    x = torch.zeros(16, 32, dtype=torch.int32)
    with launches_for("sm_80") as launches:
        _fill[(1,)](x_ptr=x, value=3, BLOCK_I=16, BLOCK_J=32, num_warps=1)
        compiled = _fill[(1,)](x, 3, 16, 32, num_warps=2)
        compiled[(1,)](x.data_ptr(), 3)
    assert [launch.name for launch in launches] == ["fill", "fill"]
    assert [launch.compiled.metadata.num_warps for launch in launches] == [1, 2]
    assert all(launch.constants["BLOCK_I"] == 16 and launch.constants["BLOCK_J"] == 32 for launch in launches)
    assert launches[0].compiled.asm["cubin"][:4] == b"\x7fELF"
    assert compiled.metadata.num_warps == 2
    assert x.sum() == 0, "something ran"


def test_nothing_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[str] = []
    monkeypatch.setattr(tuning, "_listeners", [lambda: dropped.append("plans")])
    driver = triton.runtime.driver
    before = (triton.runtime.jit.JITFunction.run, driver._active, torch.cuda.get_device_capability)
    with contextlib.suppress(KeyError), launches_for("sm_80") as launches:
        assert torch.cuda.get_device_capability() == (8, 0)
        assert driver.active.get_current_target().arch == 80
        assert dropped == ["plans"]
        raise KeyError
    assert launches == []
    assert dropped == ["plans", "plans"]
    assert (triton.runtime.jit.JITFunction.run, driver._active, torch.cuda.get_device_capability) == before
