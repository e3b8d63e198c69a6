"""The report: what a person reads and what a program reads."""

import json

import pytest
import torch

import trifast_inductor
from trifast_inductor.__main__ import main

from .patterns.near_misses import DropoutOn, SoftmaxOfAProjection
from .patterns.spellings import EinsumHeadsLast, MatmulInPlace, inputs


class Block(torch.nn.Module):
    """One of each: rewritten twice at one place, rewritten elsewhere, declined, no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MatmulInPlace(), MatmulInPlace()
        self.third, self.fourth, self.fifth = EinsumHeadsLast(), DropoutOn(), SoftmaxOfAProjection()

    def forward(self, x, mask):
        x = x + self.first(x, mask)
        x = x + self.second(x, mask)
        x = x + self.third(x, mask > 0)
        x = x + self.fourth(x, mask)
        return x + self.fifth(x, mask)


def report():
    torch._dynamo.reset()
    return trifast_inductor.explain(Block(), *inputs(MatmulInPlace))


def test_table() -> None:
    lines = str(report()).splitlines()
    assert lines[0].startswith("2 x rewritten  ")
    assert "spellings.py:" in lines[0]
    assert lines[0].endswith("(forward)")
    assert lines[1].split() == [
        "B=2",
        "R=12",
        "H=2",
        "I=12",
        "J=12",
        "D=8",
        "float32,",
        "bias:",
        "pair,",
        "mask:",
        "additive,",
        "kernel:",
        "torch",
    ]
    assert "mask: select -1e+09" in lines[3]
    assert lines[5].strip() == "declined: dropout is on: call model.eval() or set p=0"
    assert lines[6].startswith("not ours  ")
    assert lines[-1] == "3 rewritten, 1 declined, 1 other softmax in 1 graph"


def test_to_dict() -> None:
    plain = report().to_dict()
    assert {key: plain[key] for key in ("graphs", "rewritten", "declined")} == {
        "graphs": 1,
        "rewritten": 3,
        "declined": 1,
    }
    first, *_, dropout, _ = plain["sites"]
    assert first["sizes"] == {"B": "2", "R": "12", "H": "2", "I": "12", "J": "12", "D": "8"}
    assert (dropout["rewritten"], dropout["reason"]) == (False, "dropout")


def test_compiled_models_are_unwrapped_and_symbolic_sizes_named() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(MatmulInPlace(), dynamic=True)
    assert trifast_inductor.explain(compiled, *inputs(MatmulInPlace)).rewritten == 1


def test_a_compile_that_starts_over_is_reported_once() -> None:
    """Under dynamic=True a float in the module makes Dynamo start the frame again."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(assume_static_by_default=False):
        found = trifast_inductor.explain(MatmulInPlace(), *inputs(MatmulInPlace))
    assert (found.rewritten, found.graphs) == (1, 1)


def block_and_inputs() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """What the command line is pointed at."""
    return Block(), inputs(MatmulInPlace)


def not_a_pair() -> torch.nn.Module:
    return Block()


HERE = __name__


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    assert main(["explain", f"{HERE}:block_and_inputs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 rewritten, 1 declined, 1 other softmax in 1 graph"


def test_command_line_as_json_and_strict(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    assert main(["explain", "--json", "--strict", "--inference", f"{HERE}:block_and_inputs"]) == 1
    assert json.loads(capsys.readouterr().out)["declined"] == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "write a colon"),
        ("no.such.module:f", "cannot be imported"),
        (f"{HERE}:nothing", "has no function 'nothing'"),
        (f"{HERE}:not_a_pair", "must return"),
    ],
)
def test_command_line_says_what_is_wrong(path: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", path]) == 2
    assert message in capsys.readouterr().err
