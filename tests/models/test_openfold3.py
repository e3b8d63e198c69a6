"""OpenFold3: einsum inside an autocast of its own, mask and bias added in place."""

import pytest

from tests.models.agreement import (
    CASES,
    HEAD_DIM,
    HEADS,
    BothNodes,
    C,
    Case,
    assert_agrees,
    node_inputs,
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
    assert_agrees(model, node_inputs(case, pair_mask()), case, device, sites=2)
