"""OpenFold3: einsum under an autocast of its own, mask and bias added in place."""

import pytest

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
)
from tests.models.published import openfold3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_nodes(case: Case, device: str) -> None:
    attention = openfold3()
    model = BothNodes(
        attention.TriangleAttention(C, HEAD_DIM, HEADS),
        attention.TriangleAttentionEndingNode(C, HEAD_DIM, HEADS),
    )
    inputs = {"x": drawn(3, N, N, C)}
    if case.masked:
        inputs["mask"] = pair_mask()
    assert_agrees(model, inputs, case, device, sites=2)
