"""Protenix: OpenFold's spelling, which `triangle_attention="torch"`, the default of the module, selects."""

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
from tests.models.published import protenix


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_nodes(case: Case, device: str) -> None:
    attention = protenix()
    model = BothNodes(
        attention.TriangleAttentionStartingNode(C, HEAD_DIM, HEADS),
        attention.TriangleAttentionEndingNode(C, HEAD_DIM, HEADS),
    )
    inputs = {"x": drawn(3, N, N, C)}
    if case.masked:
        inputs["mask"] = pair_mask()
    assert_agrees(model, inputs, case, device, sites=2)
