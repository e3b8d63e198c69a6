"""One of two processes of a distributed run: `python two_processes.py RANK FOLDER`; started by test_distributed.py."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.afresh import without_cached_graphs
from tests.graphs.block import Block, inputs


class Two(nn.Module):
    """Two blocks, so that there is a bucket for each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(self.first(x, mask), mask)


def data_parallel(model: nn.Module) -> nn.Module:
    # Buckets smaller than a block: Dynamo splits the graph where they end. The first may not be larger than the rest.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 500
    return DistributedDataParallel(model, bucket_cap_mb=0.0005)


def sharded(model: Two) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for block in (model.first, model.second):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def step(model: nn.Module, rank: int, compiled: bool) -> list[Tensor]:
    """Output and averaged gradients of one step on this process's own data."""
    torch.manual_seed(10 + rank)
    x, mask = inputs()
    out = (torch.compile(model, backend="trifast") if compiled else model)(x, mask)
    out.square().sum().backward()
    return [out.detach(), *(full(parameter.grad) for parameter in model.parameters())]


def largest_difference(make: Callable[[Two], nn.Module], rank: int) -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = Two()
    eager = step(make(model), rank, compiled=False)
    torch.manual_seed(0)
    model = Two()
    actual = step(make(model), rank, compiled=True)
    assert len(actual) == len(eager)
    difference = max((a - b).abs().max().item() for a, b in zip(actual, eager, strict=True))
    return {"difference": difference, "trifast": counters["trifast"], "graphs": counters["stats"]["unique_graphs"]}


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    with without_cached_graphs():
        found = {"data_parallel": largest_difference(data_parallel, rank), "sharded": largest_difference(sharded, rank)}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
