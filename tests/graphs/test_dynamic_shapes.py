"""One dynamic graph serves every length: the rewrite adds no guard of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests.patterns.spellings import SPELLINGS, Projections, inputs
from trifast_inductor.explain import Looked

LENGTHS = (17, 18, 33, 7)


def graphs_after_each_length(spelling: type[Projections], backend: str | Callable[..., Any]) -> list[int]:
    """Guards are made while Dynamo traces, so nothing needs to be compiled for counting."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    compiled = torch.compile(spelling(), backend=backend)
    counted = []
    for N in LENGTHS:
        compiled(*inputs(spelling, B=1, N=N))
        counted.append(counters["stats"]["unique_graphs"])
    return counted


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.__name__)
def test_no_more_graphs_than_without_the_rewrite(spelling: type[Projections]) -> None:
    """The first length is static, the second makes the graph dynamic, and the others find it."""
    plain = graphs_after_each_length(spelling, "eager")
    ours = graphs_after_each_length(spelling, Looked("eager"))
    assert counters["trifast"] == {"rewritten": plain[-1]}
    assert ours == plain
