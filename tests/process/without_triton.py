"""A process whose Triton cannot be imported: prints counts, warnings and differences as JSON."""

import importlib.abc
import json
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Triton is found, as an installed package is, and fails when it is imported, as one that does not fit does."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name.partition(".")[0] == "triton" else None

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError("libtriton.so: undefined symbol")


sys.meta_path.insert(0, Broken())

# ruff: noqa: E402
import torch
import torch._functorch.config
import torch._inductor.config
from torch import Tensor
from torch._dynamo.utils import counters

from tests.process.sites import core, inputs
from trifast_inductor.kernels.triangle_attention import validation

torch._inductor.config.fx_graph_cache = False
torch._functorch.config.enable_autograd_cache = False
messages: list[str] = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
logging.getLogger("trifast_inductor").addHandler(handler)


def twice(q: Tensor, bias: Tensor) -> Tensor:
    return core(core(q, bias), bias)


def run() -> dict[str, Any]:
    torch._dynamo.reset()
    counters.clear()
    off = torch.compile(twice, backend="trifast")(*inputs()) - twice(*inputs())
    return {"off": off.abs().max().item(), "counts": dict(counters["trifast"]), "warnings": list(messages)}


on_cpu = run()
# What a CUDA tensor would ask for; inductor's CPU code stands in for what it makes of the graph.
validation.needs_triton = lambda *_: True
print(json.dumps({"on_cpu": on_cpu, "needing_it": run(), "imported": "triton" in sys.modules}))
