"""ESMFold in transformers: OpenFold's spelling, with a graph break in bfloat16 that a shim takes away."""

import types

import pytest
import torch

from tests.models.agreement import (
    CASES,
    HEAD_DIM,
    HEADS,
    BothNodes,
    C,
    Case,
    N,
    assert_agrees,
    drawn,
    pair_mask,
    token_mask,
)
from tests.models.published import esmfold
from trifast_inductor import shims


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module, with a function of its own for the shim to mark: a mark stays for good."""
    module = esmfold()
    asked = module.is_deepspeed_initialized
    unmarked = types.FunctionType(asked.__code__, asked.__globals__, asked.__name__)
    monkeypatch.setattr(module, asked.__name__, unmarked)
    return module


def both_nodes(attention: types.ModuleType) -> BothNodes:
    return BothNodes(
        attention.EsmFoldTriangleAttention(C, HEAD_DIM, HEADS, starting=True),
        attention.EsmFoldTriangleAttention(C, HEAD_DIM, HEADS, starting=False),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_nodes(case: Case, attention: types.ModuleType, device: str) -> None:
    shims.esmfold()
    inputs = {"x": drawn(3, N, N, C)}
    if case.masked:
        inputs["mask"] = pair_mask()
    assert_agrees(both_nodes(attention), inputs, case, device, sites=2)


def test_without_the_shim_bfloat16_runs_as_it_is(attention: types.ModuleType, device: str) -> None:
    case = Case(torch.bfloat16, masked=True, training=False)
    inputs = {"x": drawn(3, N, N, C), "mask": pair_mask()}
    assert_agrees(both_nodes(attention), inputs, case, device, sites=0)


def test_block(attention: types.ModuleType, device: str) -> None:
    """A block of the trunk: the attention over the sequence, biased by the pairs, is a site too."""
    from transformers.models.esm.configuration_esm import TrunkConfig

    block = attention.EsmFoldTriangularSelfAttentionBlock(TrunkConfig(dropout=0.0))
    inputs = {"sequence_state": drawn(3, N, 1024), "pairwise_state": drawn(3, N, N, C), "mask": token_mask()}
    assert_agrees(block, inputs, Case(torch.float32, masked=True, training=True), device, sites=3)
