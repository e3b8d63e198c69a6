"""What tests of several rooms share."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._triton import has_triton

from .afresh import without_cached_graphs
from .once import once


@pytest.fixture(autouse=True)
def the_same_numbers():
    """Whatever ran before: which worker takes which tests differs from run to run."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def compiled_afresh(request):
    """No graph and no count of an earlier test, none from a cache either."""
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch._dynamo.reset()
    counters.clear()
    with without_cached_graphs():
        yield


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a GPU; what torch concludes about Triton meanwhile, and keeps, is forgotten after."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield
    has_triton.cache_clear()


LOADED = """
import sys, torch
folder = sys.argv[1]
model, x = torch.nn.Linear(16, 16).cuda(), torch.randn(4, 16, device="cuda")
with torch.no_grad():
    program = torch.export.export(model, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/linear.pt2")
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x), rtol=2e-3, atol=1e-3)
"""


@pytest.fixture(scope="session")
def aot_packages(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where torch cannot load its own AOTInductor package of one Linear: then there is nothing of ours to test.

    Seen with torch 2.11.0+cu130 on machines with H200s, for the CPU too: a segmentation fault in its loader.
    """

    def loads() -> bool:
        command = [sys.executable, "-W", "ignore", "-c", LOADED, str(tmp_path_factory.mktemp("package"))]
        return subprocess.run(command, timeout=600, capture_output=True).returncode == 0

    if torch.cuda.is_available() and not once(tmp_path_factory, "aot_packages", loads):
        pytest.skip("torch crashes when it loads its own AOTInductor package of a Linear on this machine")
