"""Boltz: OpenFold's spelling, with scale, mask and bias applied in place."""

from typing import Any

import torch

from tests.models.agreement import SIZES, BothNodes, Case, assert_agrees, every_case, node_inputs, pair_mask
from tests.models.published import boltz


def both_nodes(**options: Any) -> BothNodes:
    attention = boltz()
    return BothNodes(
        attention.TriangleAttentionStartingNode(*SIZES),
        attention.TriangleAttentionEndingNode(*SIZES),
        **options,
    )


@every_case
def test_both_nodes(case: Case, device: str) -> None:
    assert_agrees(both_nodes(), node_inputs(case, pair_mask()), case, device, sites=2)


def test_chunks(device: str) -> None:
    """All rows of the batch in one axis, which is cut; each chunk of rows is a site."""
    case = Case(torch.float32, masked=True, training=False)
    model = both_nodes(chunk_size=32)  # 51 rows
    assert_agrees(model, node_inputs(case, pair_mask()), case, device, sites=4)
