"""The demo's trunk, published or stood in for, and what the demo says when it cannot run."""

from unittest import mock

import pytest
import torch

from trifast_inductor import demo


@pytest.fixture
def stand_in():
    with mock.patch.object(demo, "_published_trunk", return_value=None):
        trunk, name = demo._trunk(blocks=1)
    assert "transformers>=5" in name
    return trunk


def test_every_site_of_the_stand_in_is_rewritten(stand_in, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    failures: list[str] = []
    demo._report_sites(stand_in, torch.device("cpu"), failures)
    assert failures == []
    assert "3 rewritten, 0 declined, 0 other softmax in 1 graph" in capsys.readouterr().out


def test_the_stand_in_takes_what_the_published_trunk_takes(stand_in) -> None:
    """Both give finite results that depend on every weight, from the same inputs."""
    pytest.importorskip("transformers")
    published = demo._trunk(blocks=1)[0]
    for trunk in (stand_in, published):
        results, *_ = demo._step(trunk, "MQIFV", torch.device("cpu"))
        assert results["s_s"].shape == (1, 5, 1024)
        assert results["s_z"].shape == (1, 5, 5, 128)
        assert all(torch.isfinite(x).all() for x in results.values())
    missing = {name for name, p in stand_in.blocks.named_parameters() if p.grad is None or not p.grad.any()}
    assert missing == set()


@pytest.mark.usefixtures("without_cuda")
def test_without_a_compiler_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_has_compiler", lambda: False)
    assert demo.main([]) == 2
    assert "install g++ or clang" in capsys.readouterr().err
