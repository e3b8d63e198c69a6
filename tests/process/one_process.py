"""A user's process from its first import on; prints what it found as JSON. Started by test_process.py."""

import json
import logging
import re
import socket
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.process.sites import core, inputs


def drivers() -> list[str]:
    """Libraries of the CUDA driver that are mapped into this process."""
    maps = Path("/proc/self/maps")
    return sorted(set(re.findall(r"\S*libcuda\.so\S*", maps.read_text()))) if maps.exists() else []


def by_name(q: Tensor, bias: Tensor) -> Tensor:
    import trifast_inductor

    heads_first = q.transpose(1, 2)
    return trifast_inductor.triangle_attention(heads_first, heads_first, heads_first, bias[None], scale=1.0)


class Attended(Dataset[Tensor]):
    """Each item is an attention, computed in the worker: by name, and compiled there."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        q, bias = inputs(4 + index)
        return by_name(q, bias).sum() if index == 0 else torch.compile(core, backend="trifast")(q, bias).sum()


def loaded(method: str) -> bool:
    """Whether one worker, started by this method, gives what this process computes."""
    found = list(DataLoader(Attended(), batch_size=None, num_workers=1, multiprocessing_context=method))
    q, bias = inputs(4)
    expected = [by_name(q, bias).sum(), core(*inputs(5)).sum()]
    return all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(found, expected, strict=True))


class NoNetwork:
    """No connection, no name looked up."""

    def __init__(self) -> None:
        self.tried: list[str] = []

    def refuse(self, *args: Any, **_: Any) -> Any:
        self.tried.append(repr(args))
        raise OSError("this test has no network")

    def __enter__(self) -> "NoNetwork":
        self._patches = [
            mock.patch.object(socket, "getaddrinfo", self.refuse),
            mock.patch.object(socket, "create_connection", self.refuse),
            mock.patch.object(socket.socket, "connect", lambda _, *args: self.refuse(*args)),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in self._patches:
            patch.stop()


def offline() -> list[str]:
    """A user's way through the package; what it tried to reach."""
    with NoNetwork() as network:
        import trifast_inductor

        q, bias = inputs(6)
        torch.testing.assert_close(torch.compile(core, backend="trifast")(q, bias), core(q, bias))
        assert "1 rewritten" in str(trifast_inductor.explain(core, q, bias))
        by_name(q, bias)
    return network.tried


def main() -> None:
    # What a user's loop has imported anyway.
    import torch._dynamo
    import torch._inductor.config

    before = drivers()
    import trifast_inductor

    found = {
        "package": trifast_inductor.__file__,
        "cuda_initialised": torch.cuda.is_initialized(),
        "drivers": [driver for driver in drivers() if driver not in before],
        "kernels": sorted(name for name in sys.modules if name.endswith(("triangle_attention.forward", ".backward"))),
        "lowerings": "torch._inductor.lowering" in sys.modules,
        "handlers": len(logging.getLogger("trifast_inductor").handlers),
        "fork": loaded("fork"),
        "spawn": loaded("spawn"),
        "network": offline(),
        "cuda_initialised_at_the_end": torch.cuda.is_initialized(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
