"""What tests of several rooms share."""

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture
def compiled_afresh(request):
    """No graph and no count of an earlier test; no cache either, for a warm one does not call the pass."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
