"""The benchmark's own modules: the compiler has to find their attention."""

import pytest
import torch

from trifast_inductor import explain
from trifast_inductor.bench import modules


@pytest.mark.parametrize(("model", "sites"), [("triangle attention", 1), ("pairformer block", 3)])
def test_every_site_is_rewritten(model: str, sites: int) -> None:
    module = modules.MODELS[model](C=16, H=2, D=8)
    s, z, mask = torch.randn(1, 5, 384), torch.randn(1, 5, 5, 16), torch.ones(1, 5, 5)
    torch._dynamo.reset()
    report = explain(module, s, z, mask)
    assert (report.rewritten, report.declined) == (sites, 0), str(report)


def test_the_ending_node_attends_along_the_other_axis() -> None:
    starting = modules.TriangleAttention(16, 2, 8)
    ending = modules.TriangleAttention(16, 2, 8, ending=True)
    ending.load_state_dict(starting.state_dict())
    z, mask = torch.randn(1, 5, 5, 16), (torch.rand(1, 5, 5) < 0.7).float()
    mask[..., 0] = mask[:, 0] = 1.0
    expected = starting(z.transpose(1, 2), mask.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(ending(z, mask), expected)
