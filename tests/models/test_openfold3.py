"""OpenFold3: einsum inside an autocast of its own, mask and bias added in place."""

import pytest

from tests.models.agreement import SIZES, BothNodes, Case, assert_agrees, every_case, node_inputs, pair_mask
from tests.models.published import openfold3

# Its `autocast("cuda")` on a machine without.
pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available")


@every_case
def test_both_nodes(case: Case, device: str) -> None:
    attention = openfold3()
    model = BothNodes(
        attention.TriangleAttention(*SIZES),
        attention.TriangleAttentionEndingNode(*SIZES),
    )
    assert_agrees(model, node_inputs(case, pair_mask()), case, device, sites=2)
