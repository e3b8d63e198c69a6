"""Inductor's modes, and sizes that change: no compile more than inductor makes by itself."""

import pytest
import torch
from torch._dynamo.utils import counters

from .block import Block, assert_agrees, inputs, results


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_modes(mode, device):
    model = Block().to(device)
    compiled = torch.compile(model, backend="trifast", mode=mode)
    assert_agrees(model, compiled=compiled)
    x, mask = inputs(device=device)
    eager = results(model, x, mask)
    for _ in range(3):  # recorded as a CUDA graph on the second call, replayed on the third
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(results(compiled, x, mask), eager, rtol=2e-3, atol=1e-4)


def graphs_compiled(model, backend, sizes, **options) -> list[int]:
    """How many graphs there are after each size."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend, **options)
    counts = []
    for N in sizes:
        x, mask = inputs(N)
        actual = results(compiled, x, mask)
        if N < 50:
            torch.testing.assert_close(actual, results(model, x, mask), rtol=1e-4, atol=1e-4)
        counts.append(counters["stats"]["unique_graphs"])
    return counts


# 400 makes a second graph in both: on the CPU inductor guards on the length of a sum in the bias gradient.
TRAINED = (17, 18, 33)
SIZES = (17, 18, 400, 33)


@pytest.mark.slow
def test_dynamic_sizes_in_training():
    model = Block()
    ours = graphs_compiled(model, "trifast", TRAINED, dynamic=True)
    assert counters["trifast"] == {"rewritten": ours[-1]}
    assert ours == graphs_compiled(model, "inductor", TRAINED, dynamic=True)


@torch.no_grad()
def test_automatic_dynamic_sizes_in_inference():
    """The first graph is static, the second serves every other size."""
    model = Block()
    ours = graphs_compiled(model, "trifast", SIZES)
    assert counters["trifast"] == {"rewritten": 2}
    assert ours == graphs_compiled(model, "inductor", SIZES) == [1, 2, 2, 2]
