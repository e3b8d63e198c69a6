"""alphafold3-pytorch: rows folded into the batch, bias and mask repeated over them, a select by einx."""

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
    token_mask,
)
from tests.models.published import alphafold3_pytorch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_nodes(case: Case, device: str) -> None:
    attention = alphafold3_pytorch().TriangleAttention
    size = {"dim": C, "heads": HEADS, "dim_head": HEAD_DIM}
    model = BothNodes(attention(**size, node_type="starting"), attention(**size, node_type="ending"))
    assert_agrees(model, node_inputs(case, token_mask().bool()), case, device, sites=2)
