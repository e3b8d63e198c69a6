"""What tests of several rooms share."""

import pytest
import torch
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def the_same_numbers():
    """Whatever ran before: which worker takes which tests differs from run to run."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def compiled_afresh(request):
    """No graph and no count of an earlier test; no cache either, for a warm one does not call the pass."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
