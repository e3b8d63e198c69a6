"""Who is there, and who says why not."""

import pytest
import torch

from tests.bench.conftest import CPU, small
from trifast_inductor.bench.peers import OURS, PEERS


def test_peers_that_need_a_gpu_or_a_package_say_so() -> None:
    assert all(PEERS[name].absent(CPU) is None for name in (*OURS, "eager", "inductor", "sdpa", "sdpa-compiled"))
    for name in ("flex", "trifast", "cuequivariance"):
        assert PEERS[name].absent(CPU) == "needs a CUDA device"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert PEERS["trifast"].absent(torch.device("cuda")) == "trifast is not installed"


@pytest.mark.parametrize("name", ["inductor", "sdpa-compiled", "flex", "ours-compiled"])
def test_each_build_is_a_fresh_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: called.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda run, **options: called.append(options))
    PEERS[name].build(small())
    assert called == ["reset", {"backend": PEERS[name].backend, "dynamic": False}]
