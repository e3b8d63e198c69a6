"""alphafold3-pytorch: rows folded into the batch, bias and mask repeated over them, a select by einx."""

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
    token_mask,
)
from tests.models.published import alphafold3_pytorch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_nodes(case: Case, device: str) -> None:
    attention = alphafold3_pytorch().TriangleAttention
    size = {"dim": C, "heads": HEADS, "dim_head": HEAD_DIM}
    model = BothNodes(attention(**size, node_type="starting"), attention(**size, node_type="ending"))
    inputs = {"x": drawn(3, N, N, C)}
    if case.masked:
        inputs["mask"] = token_mask().bool()
    assert_agrees(model, inputs, case, device, sites=2)
