"""Every script of docs/recipes runs at a small size and ends as it says.

The three model recipes compile whole blocks, minutes of C++ for no more than tests/models shows already. They run
with the rewrite but without code generation; TRIFAST_SLOW_TESTS=1 runs them as a user does.
"""

import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import fx
from torch._dynamo.backends import registry

import trifast_inductor
from tests.afresh import without_cached_graphs
from tests.models import published
from trifast_inductor.rewrite import rewrite_all

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
SLOW = os.environ.get("TRIFAST_SLOW_TESTS") == "1"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """A recipe expects a process of its own: no graph, cached or not, and no `register()` of another."""
    torch._dynamo.reset()
    with without_cached_graphs():
        yield
    trifast_inductor.unregister()


@pytest.fixture
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled with "trifast" is rewritten and differentiated, and then run by torch."""

    def run_by_torch(gm: fx.GraphModule, inputs: Any, *, config_patches: dict[str, Any]) -> Callable[..., Any]:
        assert "pre_grad_custom_pass" in config_patches
        rewrite_all(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    torch._dynamo.lookup_backend("inductor")  # loads it, so that there is something to put back
    if not SLOW:
        monkeypatch.setitem(registry._COMPILER_FNS, "inductor", run_by_torch)


def run(name: str, *arguments: str) -> None:
    path = str(RECIPES / name)
    with mock.patch.object(sys, "argv", [path, *arguments]):
        runpy.run_path(path, run_name="__main__")


def differences(printed: str) -> list[float]:
    """What a recipe says about results beside eager's; each recipe holds them to its own budget."""
    return [float(text) for text in re.findall(r"(?:from eager|differ by) ([\d.e+-]+)", printed)]


@pytest.mark.usefixtures("without_code_generation")
class TestModels:
    def test_openfold_training_step(self, capsys: pytest.CaptureFixture[str]) -> None:
        published.openfold3()
        run("openfold_training_step.py", "--n", "12")
        printed = capsys.readouterr().out
        assert "2 rewritten, 0 declined, 0 other softmax in 1 graph" in printed
        (difference,) = differences(printed)
        assert 0 < difference < 3e-2  # 0: nothing but eager ran

    def test_boltz_trunk(self, capsys: pytest.CaptureFixture[str]) -> None:
        published.boltz()
        run("boltz_trunk.py", "--n", "12", "--blocks", "2")
        printed = capsys.readouterr().out
        assert "3 rewritten, 0 declined, 0 other softmax in 1 graph" in printed
        assert len(differences(printed)) == 2
        assert all(0 < difference < 1e-4 for difference in differences(printed))

    def test_esmfold_inference(self, capsys: pytest.CaptureFixture[str]) -> None:
        published.esmfold()
        run("esmfold_inference.py", "--sequence", "MQIFVKTLTGKTITLE", "--blocks", "1")
        printed = capsys.readouterr().out
        assert "16 residues, positions [8, 1, 16, 14, 3]" in printed
        assert "3 rewritten, 0 declined, 0 other softmax in 1 graph" in printed
        (difference,) = differences(printed)
        assert 0 < difference < 1e-4


def test_register_in_training(capsys: pytest.CaptureFixture[str]) -> None:
    """The same losses with and without; `strict` inside raises if the attention is not rewritten."""
    run("register_in_training.py", "--n", "12", "--steps", "2")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    trifast_inductor.unregister()
    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", lambda model: model):  # eager, the other path that --plain can take
        run("register_in_training.py", "--n", "12", "--steps", "2", "--plain")
    eager = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert losses == pytest.approx(eager, abs=3e-5)


def test_explain_declined(capsys: pytest.CaptureFixture[str]) -> None:
    run("explain_declined.py")
    first, second, third = capsys.readouterr().out.split("\n\n")
    assert "dropout is on: call model.eval() or set p=0" in first
    assert "the probabilities are also used elsewhere" in second
    assert "1 rewritten, 0 declined" in third


@pytest.mark.usefixtures("aot_packages")
def test_aot_inductor(capsys: pytest.CaptureFixture[str]) -> None:
    published.esmfold()
    run("aot_inductor.py")
    assert re.search(r"1 attention rewritten, .*\nN=17: as eager\nN=40: as eager\n", capsys.readouterr().out)


def test_every_recipe_has_a_test_and_a_place_on_the_page() -> None:
    page, tested = (RECIPES / "README.md").read_text(), Path(__file__).read_text()
    for path in RECIPES.glob("*.py"):
        assert f"({path.name})" in page, path.name
        assert f'run("{path.name}"' in tested, path.name
