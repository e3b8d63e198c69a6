"""An existing training script, plus one line: `python docs/recipes/register_in_training.py [--n 48] [--steps 5]`.

The script below calls `torch.compile` by itself, deep inside, and knows nothing of this package. `register()` in front
of it is all that changes; `--plain` runs it without, and both print the same losses.
"""

import argparse

import torch
from torch import Tensor, nn

import trifast_inductor


class Node(nn.Module):
    """Gated triangle attention around the starting node, with a bool mask."""

    def __init__(self, c: int = 32, heads: int = 2, d: int = 16) -> None:
        super().__init__()
        self.norm, self.heads, self.d = nn.LayerNorm(c), heads, d
        self.qkv, self.bias = nn.Linear(c, 3 * heads * d, bias=False), nn.Linear(c, heads, bias=False)
        self.gate, self.out = nn.Linear(c, heads * d), nn.Linear(heads * d, c)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(z)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.d)).transpose(2, 4).unbind(3)
        logits = (self.d**-0.5 * q) @ k.mT + self.bias(x).permute(0, 3, 1, 2)[:, None]
        logits = logits.masked_fill(~mask[:, :, None, None], torch.finfo(logits.dtype).min)
        o = (logits.softmax(-1) @ v).transpose(2, 3).flatten(-2)
        return z + self.out(self.gate(x).sigmoid() * o)


class Trainer:
    """Stands for a framework that compiles what it is given."""

    def __init__(self, model: nn.Module, lr: float = 1e-2) -> None:
        self.model = torch.compile(model)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def step(self, z: Tensor, mask: Tensor, target: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(z, mask), target)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=48, help="residues")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="do not register: plain inductor")
    options = parser.parse_args()
    if not options.plain:
        trifast_inductor.register(strict=True)  # the one line; strict: stop rather than train without

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    z, target = (torch.randn(2, options.n, options.n, 32, device=device) for _ in range(2))
    kept = torch.arange(options.n, device=device) < torch.tensor([[options.n], [options.n - 5]], device=device)
    trainer = Trainer(Node().to(device))
    for step in range(options.steps):
        print(f"step {step}: loss {trainer.step(z, kept[:, :, None] & kept[:, None, :], target):.5f}")


if __name__ == "__main__":
    main()
