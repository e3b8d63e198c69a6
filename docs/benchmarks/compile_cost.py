"""What the pass adds to a compile: `python docs/benchmarks/compile_cost.py [--train] [--dynamic] [BLOCKS ...]`.

A stack of triangle attention blocks in OpenFold's spelling, starting and ending node in turn, compiled by inductor for
the CPU with all caches off. The pass is timed inside that compile; the share is of the same run, so a busy machine
slows both alike. `wall` includes the C++ compiler and the first call, `cpu` is this process alone.
"""

import argparse
import math
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import trifast_inductor
from trifast_inductor.rewrite import TriangleAttentionPass

C, H, D, N = 32, 4, 8, 16


class Block(nn.Module):
    """LayerNorm, gated triangle attention with pair bias and additive mask, residual."""

    def __init__(self, ending: bool) -> None:
        super().__init__()
        self.ending = ending
        self.norm = nn.LayerNorm(C)
        self.bias = nn.Linear(C, H, bias=False)
        self.q, self.k, self.v = (nn.Linear(C, H * D, bias=False) for _ in range(3))
        self.gate, self.out = nn.Linear(C, H * D), nn.Linear(H * D, C)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        x = z
        if self.ending:
            x, mask = x.transpose(-2, -3), mask.transpose(-1, -2)
        x = self.norm(x)
        mask_bias = (1e9 * (mask - 1))[..., :, None, None, :]
        pair_bias = self.bias(x).permute(0, 3, 1, 2).unsqueeze(-4)
        q, k, v = (p(x).unflatten(-1, (H, D)).transpose(-2, -3) for p in (self.q, self.k, self.v))
        q /= math.sqrt(D)
        a = torch.matmul(q, k.transpose(-1, -2))
        a += mask_bias
        a += pair_bias
        o = torch.matmul(torch.softmax(a, -1), v).transpose(-2, -3).flatten(-2)
        o = self.out(torch.sigmoid(self.gate(x)) * o)
        return z + (o.transpose(-2, -3) if self.ending else o)


class Plain(nn.Module):
    """As many nodes and no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        x = z
        for _ in range(4):
            x = x + self.down(torch.sigmoid(self.up(self.norm(x)))) * mask[..., None]
        return x


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            z = block(z, mask)
        return z


class Clock:
    """Wall and CPU seconds of this process, summed over calls."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def around(self, function: Callable[..., object]) -> Callable[..., None]:
        def timed(*args: object) -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            function(*args)
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu

        return timed


def compile_once(model: nn.Module, train: bool, dynamic: bool) -> tuple[Clock, Clock]:
    """Time of the whole compile, and of the pass in it."""
    torch._dynamo.reset()
    z, mask = torch.randn(1, N, N, C), torch.ones(1, N, N)
    whole, ours = Clock(), Clock()
    original = TriangleAttentionPass.__call__
    TriangleAttentionPass.__call__ = ours.around(original)
    try:
        with torch.set_grad_enabled(train):
            compiled = torch.compile(model, backend="trifast", dynamic=dynamic or None)

            def first_call() -> None:
                out = compiled(z, mask)
                if train:
                    out.sum().backward()

            whole.around(first_call)()
    finally:
        TriangleAttentionPass.__call__ = original
    return whole, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("blocks", nargs="*", type=int, default=[6, 12, 24, 48])
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--dynamic", action="store_true")
    options = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {trifast_inductor.__version__}")
    print("| blocks | compile wall, s | compile cpu, s | pass, s | pass a block, ms | share of wall | share of cpu |")
    print("|---|---|---|---|---|---|---|")
    compile_once(Stack([Block(False)]), options.train, options.dynamic)  # what only a first compile pays
    models = [(str(n), Stack([Block(i % 2 == 1) for i in range(n)]), n) for n in options.blocks]
    models.append(("48, no softmax", Stack([Plain() for _ in range(48)]), 48))
    for name, model, blocks in models:
        whole, ours = compile_once(model, options.train, options.dynamic)
        print(
            f"| {name} | {whole.wall:.1f} | {whole.cpu:.1f} | {ours.cpu:.3f} | {1e3 * ours.cpu / blocks:.1f} "
            f"| {100 * ours.wall / whole.wall:.2f} % | {100 * ours.cpu / whole.cpu:.2f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
