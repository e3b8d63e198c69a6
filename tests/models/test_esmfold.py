"""ESMFold in transformers: OpenFold's spelling, with a graph break in bfloat16 that a shim takes away."""

import types

import pytest
import torch

from tests.models.agreement import (
    SIZES,
    BothNodes,
    C,
    Case,
    N,
    assert_agrees,
    drawn,
    every_case,
    node_inputs,
    pair_mask,
    token_mask,
)
from tests.models.published import esmfold
from trifast_inductor import shims


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """ESMFold with a copy of the function that the shim marks: a mark stays."""
    module = esmfold()
    asked = module.is_deepspeed_initialized
    copied = types.FunctionType(asked.__code__, asked.__globals__, asked.__name__)
    monkeypatch.setattr(module, asked.__name__, copied)
    return module


def both_nodes(module: types.ModuleType) -> BothNodes:
    return BothNodes(
        module.EsmFoldTriangleAttention(*SIZES, starting=True),
        module.EsmFoldTriangleAttention(*SIZES, starting=False),
    )


@every_case
def test_both_nodes(case: Case, module: types.ModuleType, device: str) -> None:
    shims.esmfold()
    assert_agrees(both_nodes(module), node_inputs(case, pair_mask()), case, device, sites=2)


def test_without_the_shim_a_graph_break_is_reported(module: types.ModuleType, device: str) -> None:
    case = Case(torch.bfloat16, masked=True, training=False)
    # One softmax: both nodes run the same graph, which holds nothing else.
    assert_agrees(both_nodes(module), node_inputs(case, pair_mask()), case, device, sites=0, declined=1)


def test_block(module: types.ModuleType, device: str) -> None:
    """A block of the trunk, whose attention over the sequence is a site too.

    Its integer mask makes a float32 term, added in place to bfloat16 logits.
    """
    from transformers.models.esm.configuration_esm import TrunkConfig

    shims.esmfold()
    case = Case(torch.bfloat16, masked=True, training=False)
    block = module.EsmFoldTriangularSelfAttentionBlock(TrunkConfig(dropout=0.0))
    inputs = {
        "sequence_state": drawn(2, N, 1024),
        "pairwise_state": drawn(2, N, N, C),
        "mask": token_mask()[:2],  # this attention is NaN, in eager too, for a sequence that is all padding
    }
    assert_agrees(block, inputs, case, device, sites=3)
