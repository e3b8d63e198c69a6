"""alphafold3-pytorch: rows folded into the batch, bias and mask repeated over them, a select by einx."""

from tests.models.agreement import SIZES, BothNodes, Case, assert_agrees, every_case, node_inputs, token_mask
from tests.models.published import alphafold3_pytorch


@every_case
def test_both_nodes(case: Case, device: str) -> None:
    attention = alphafold3_pytorch().TriangleAttention
    size = dict(zip(("dim", "dim_head", "heads"), SIZES, strict=True))
    model = BothNodes(attention(**size, node_type="starting"), attention(**size, node_type="ending"))
    assert_agrees(model, node_inputs(case, token_mask().bool()), case, device, sites=2)
