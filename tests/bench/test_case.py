"""Inputs: the same values for every peer, in the strides that a layout promises."""

import pytest
import torch

from tests.bench.conftest import CPU, small
from trifast_inductor.bench.case import Case, as_called, draw, heads


def test_values_do_not_depend_on_the_order_of_axes() -> None:
    ours, theirs = (draw(small(), axes, CPU, seed=3) for axes in ("bhrid", "brhid"))
    for n in range(3):
        assert ours.leaves[n].is_contiguous()
        assert theirs.leaves[n].is_contiguous()
        assert torch.equal(ours.leaves[n].transpose(1, 2), theirs.leaves[n])
    assert torch.equal(ours.leaves[3], theirs.leaves[3])
    assert torch.equal(ours.grad_out.transpose(1, 2), theirs.grad_out)


def test_both_layouts_hold_the_same_values() -> None:
    friendly, model = (draw(small(layout=layout), "bhrid", CPU, seed=1) for layout in ("friendly", "model"))
    for n in range(3):
        assert torch.equal(heads(model.leaves[n], 2, "bhrid"), friendly.leaves[n])
    assert torch.equal(model.leaves[3].permute(0, 3, 1, 2), friendly.leaves[3])


def test_a_model_gives_views_of_projections_and_takes_a_gate() -> None:
    case = small(layout="model")
    seen = []

    def attend(q, k, v, bias, mask):
        seen.append((q, bias))
        return v

    inputs = draw(case, "bhrid", CPU, seed=0)
    out = as_called(attend, case, "bhrid")(*inputs.arguments)
    ((q, bias),) = seen
    assert q.shape == (2, 2, 6, 6, 8)
    assert q.stride() == (6 * 6 * 16, 8, 6 * 16, 16, 1)
    assert bias.shape == (2, 2, 6, 6)
    assert bias.stride(1) == 1
    torch.testing.assert_close(out, torch.sigmoid(inputs.leaves[4]) * inputs.leaves[2])


@pytest.mark.parametrize("kind", ["padding", "random"])
def test_no_row_is_wholly_masked_and_few_keys_are(kind: str) -> None:
    mask = draw(small(N=64, mask=kind), "bhrid", CPU, seed=0).mask
    assert mask is not None
    assert not mask.all(-1).any()
    assert 0.05 < mask.float().mean() < 0.15
    assert (mask[..., :-6].any().item(), mask[..., -6:].all().item()) == (kind == "random", kind == "padding")
    assert draw(small(mask="none"), "bhrid", CPU, seed=0).mask is None


def test_input_bytes_counts_what_is_drawn(case: Case) -> None:
    inputs = draw(case, "bhrid", CPU, seed=0)
    tensors = [*inputs.leaves, inputs.grad_out, inputs.mask]
    assert case.input_bytes == sum(t.numel() * t.element_size() for t in tensors if t is not None)
