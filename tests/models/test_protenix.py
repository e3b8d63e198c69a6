"""Protenix: OpenFold's spelling, which is what `triangle_attention="torch"` runs, the default of the module."""

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
from tests.models.published import protenix


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_nodes(case: Case, device: str) -> None:
    attention = protenix()
    model = BothNodes(
        attention.TriangleAttentionStartingNode(C, HEAD_DIM, HEADS),
        attention.TriangleAttentionEndingNode(C, HEAD_DIM, HEADS),
    )
    assert_agrees(model, node_inputs(case, pair_mask()), case, device, sites=2)
