"""Boltz's trunk in inference: `python docs/recipes/boltz_trunk.py [--n 64] [--blocks 4]` (pip install boltz).

Weights are random here; with a checkpoint nothing changes. Boltz uses a fused kernel of its own where it is installed:
`use_kernels=False`, the default of its layers, selects the eager core that is rewritten. In a whole model that is
`Boltz2(use_kernels=False, ...)`, on the command line `boltz predict --no_kernels`.
"""

import argparse

import torch
from boltz.model.layers.pairformer import PairformerModule

import trifast_inductor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=64, help="tokens")
    parser.add_argument("--blocks", type=int, default=4)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    trunk = PairformerModule(token_s=64, token_z=128, num_blocks=options.blocks, num_heads=4, v2=True)
    for weight in trunk.parameters():  # output projections start at 0, where a wrong attention would not show
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    trunk = trunk.to(device).eval()
    s, z = torch.randn(1, options.n, 64, device=device), torch.randn(1, options.n, options.n, 128, device=device)
    mask = (torch.arange(options.n, device=device) < options.n - 3).float()[None]  # the last three are padding
    pair_mask = mask[:, :, None] * mask[:, None, :]

    with torch.no_grad():
        eager = trunk(s, z, mask, pair_mask)
        print(trifast_inductor.explain(trunk.layers[0], s, z, mask, pair_mask))
        for layer in trunk.layers:
            layer.compile(backend="trifast")  # one graph, which all blocks share
        fused = trunk(s, z, mask, pair_mask)
    for name, ours, theirs in zip("sz", fused, eager, strict=True):
        difference = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"{name}: relative difference from eager {difference:.1e}")
        assert difference < 1e-4, name


if __name__ == "__main__":
    main()
