"""Each relative is rewritten as often as it should be, and agrees with eager in output and gradients."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from .graphs import gradients, rewriting
from .relatives import RELATIVES, Relative


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("relative", RELATIVES, ids=lambda r: r.__name__)
def test_relative_is_rewritten_and_agrees(relative: type[Relative], dynamic: bool) -> None:
    model = relative().double()
    inputs = relative.example(2, 12, torch.float64)
    expected = gradients(copy.deepcopy(model), *inputs)
    actual = gradients(torch.compile(model, backend=rewriting, dynamic=dynamic), *inputs)
    assert counters["trifast"] == {"rewritten": relative.rewrites}
    for name, value in expected.items():
        near = relative.tolerance
        torch.testing.assert_close(actual[name], value, rtol=near, atol=near, msg=lambda t, name=name: f"{name}: {t}")
