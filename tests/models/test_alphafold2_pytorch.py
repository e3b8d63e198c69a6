"""alphafold2-pytorch: rows folded into the batch, one boolean mask over queries and keys, their outer product."""

import torch
from torch import Tensor, nn

from tests.models.agreement import HEAD_DIM, HEADS, C, Case, assert_agrees, drawn, every_case, pair_mask
from tests.models.published import alphafold2_pytorch


class BothNodes(nn.Module):
    """Rows and columns of the same pair representation, which also makes the bias."""

    def __init__(self) -> None:
        super().__init__()
        attention = alphafold2_pytorch().AxialAttention
        size = {"dim": C, "heads": HEADS, "dim_head": HEAD_DIM, "accept_edges": True}
        self.starting = attention(**size, row_attn=True, col_attn=False)
        self.ending = attention(**size, row_attn=False, col_attn=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.starting(x, edges=x, mask=mask), self.ending(x, edges=x, mask=mask)


@every_case
def test_both_nodes(case: Case, device: str) -> None:
    kept = pair_mask().bool()
    inputs = {"x": drawn(*kept.shape, C), **({"mask": kept} if case.masked else {})}
    assert_agrees(BothNodes(), inputs, case, device, sites=2)


def test_an_averaged_query_is_left_alone(device: str) -> None:
    """`global_query_attn`: queries averaged over the rows, and no bias."""
    attention = alphafold2_pytorch().AxialAttention(
        dim=C, heads=HEADS, dim_head=HEAD_DIM, row_attn=False, col_attn=True, global_query_attn=True
    )

    class Column(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.attention(x),)

    case = Case(torch.float32, masked=False, training=False)
    assert_agrees(Column(), {"x": drawn(3, 17, 17, C)}, case, device, sites=0)
