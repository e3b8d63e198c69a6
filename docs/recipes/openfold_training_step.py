"""A training step of an OpenFold-like pair stack: `python docs/recipes/openfold_training_step.py [--n 64]`.

Blocks are OpenFold3's own (pip install openfold3), compiled one by one, under bfloat16 autocast and with activation
checkpointing, as such models are trained. Triangle attention alone is at stake, so a block here is its two nodes.
"""

import argparse

import torch
from openfold3.core.model.layers.triangular_attention import TriangleAttention, TriangleAttentionEndingNode
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trifast_inductor


class Block(nn.Module):
    """Both nodes of triangle attention, with residuals; what is between is computed again in the backward."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.starting, self.ending = TriangleAttention(c, 32, 4), TriangleAttentionEndingNode(c, 32, 4)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        return checkpoint(self.nodes, z, mask, use_reentrant=False)

    def nodes(self, z: Tensor, mask: Tensor) -> Tensor:
        z = z + self.starting(z, mask=mask)
        return z + self.ending(z, mask=mask)


def step(blocks: nn.ModuleList, z: Tensor, mask: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """The loss, and the gradient of all parameters as one vector."""
    blocks.zero_grad()
    with torch.autocast(z.device.type, torch.bfloat16):
        for block in blocks:
            z = block(z, mask)
    loss = nn.functional.mse_loss(z.float() * mask[..., None], target)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in blocks.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=64, help="residues")
    parser.add_argument("--blocks", type=int, default=2)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(64) for _ in range(options.blocks))
    for weight in blocks.parameters():  # output projections start at 0, where a wrong attention would not show
        if weight.ndim > 1:
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    blocks = blocks.to(device)
    z, target = (torch.randn(1, options.n, options.n, 64, device=device) for _ in range(2))
    kept = (torch.arange(options.n, device=device) < options.n - 3).float()  # the last three are padding
    mask = (kept[:, None] * kept)[None]

    eager_loss, eager = step(blocks, z, mask, target)
    print(trifast_inductor.explain(blocks[0], z, mask))
    for block in blocks:
        block.compile(backend="trifast", options={"strict": True})
    loss, gradient = step(blocks, z, mask, target)
    difference = ((gradient - eager).norm() / eager.norm()).item()
    print(f"loss {loss:.5f}, eager {eager_loss:.5f}; gradients differ by {difference:.1e}, relative")
    assert difference < 3e-2  # bfloat16 rounds to 4e-3, and eager rounds logits and probabilities as well


if __name__ == "__main__":
    main()
