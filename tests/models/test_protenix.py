"""Protenix: OpenFold's spelling, what the module's default `triangle_attention="torch"` selects."""

from tests.models.agreement import SIZES, BothNodes, Case, assert_agrees, every_case, node_inputs, pair_mask
from tests.models.published import protenix


@every_case
def test_both_nodes(case: Case, device: str) -> None:
    attention = protenix()
    model = BothNodes(
        attention.TriangleAttentionStartingNode(*SIZES),
        attention.TriangleAttentionEndingNode(*SIZES),
    )
    assert_agrees(model, node_inputs(case, pair_mask()), case, device, sites=2)
