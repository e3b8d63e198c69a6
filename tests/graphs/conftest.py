import os

import pytest
import torch
from torch._dynamo.utils import counters


def pytest_collection_modifyitems(items):
    if os.environ.get("TRIFAST_SLOW_TESTS") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set TRIFAST_SLOW_TESTS=1"))


@pytest.fixture(autouse=True)
def _fresh(request):
    """No graph and no count of an earlier test; no cache either, for a warm one does not call the pass."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
