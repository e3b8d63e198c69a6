"""What to do about a model that declines: `python docs/recipes/explain_declined.py`.

The attention below drops probabilities in training and hands them back for plotting, as many models do. Either alone
keeps it from being rewritten: what is returned, or multiplied by a random mask, has to exist. `explain` names the
first thing in the way; one line each mends them.
"""

import torch
from torch import Tensor, nn

import trifast_inductor


class TriangleAttention(nn.Module):
    """Starting node, 4 heads of 8, with the probabilities as a second result."""

    def __init__(self, dropout: float = 0.1, keep_weights: bool = True) -> None:
        super().__init__()
        self.qkv, self.bias, self.out = nn.Linear(32, 96), nn.Linear(32, 4), nn.Linear(32, 32)
        self.dropout, self.keep_weights = nn.Dropout(dropout), keep_weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(-3)
        logits = torch.einsum("brihd,brjhd->brhij", q * 8**-0.5, k) + self.bias(x).permute(0, 3, 1, 2)[:, None]
        weights = self.dropout(logits.softmax(-1))
        out = self.out(torch.einsum("brhij,brjhd->brihd", weights, v).flatten(-2))
        return out, weights if self.keep_weights else None


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What `python -m trifast_inductor explain docs.recipes.explain_declined:example` reports on."""
    return TriangleAttention(), (torch.randn(1, 16, 16, 32),)


def main() -> None:
    x = torch.randn(1, 16, 16, 32)
    print("as it is:")
    print(trifast_inductor.explain(TriangleAttention(), x))
    print("\nwith dropout off:")
    print(trifast_inductor.explain(TriangleAttention(dropout=0.0), x))
    print("\nand without returning the weights:")
    print(trifast_inductor.explain(TriangleAttention(dropout=0.0, keep_weights=False), x))


if __name__ == "__main__":
    main()
