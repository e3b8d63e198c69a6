"""Compiling anew, with what compilers of kernels keep on disk still in use: they take most of the time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch._functorch.config
import torch._inductor.config


@contextmanager
def without_cached_graphs() -> Iterator[None]:
    """Graphs from a cache have been rewritten already: no pass would run, nothing would be counted. In this thread."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
