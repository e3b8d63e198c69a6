"""CUDA in a process: a fork before its first use, a second GPU, capture into a graph."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import op
from trifast_inductor.testing import random_inputs, results

from ..graphs.block import Block, inputs
from ..graphs.block import results as results_of_block

CHECKOUT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def attend(*arguments):
    return op.triangle_attention(*arguments)[0]


def test_a_fork_after_the_import_may_use_cuda():
    """CUDA cannot be used in a child of a process that has used it: the import must not."""
    program = (
        "import os, torch, trifast_inductor\n"
        "assert not torch.cuda.is_initialized()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    x = torch.randn(1, 2, 16, 16, 16, device='cuda')\n"
        "    trifast_inductor.triangle_attention(x, x, x, x[..., 0]).sum().item()\n"
        "    os._exit(0)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert multiprocessing.get_start_method() is not None


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_model_on_the_second_gpu():
    """While the first one is current: launches, streams and what is remembered of a launch go by the tensors."""
    assert torch.cuda.current_device() == 0
    on_both = []
    for device in ("cuda:0", "cuda:1"):
        x = random_inputs(R=20, I=20, J=20, D=32, dtype=torch.bfloat16, device=device, key_term="mask")
        on_both.append({name: t.cpu() for name, t in results(attend, x).items()})
    for name, value in on_both[0].items():
        assert torch.equal(value, on_both[1][name]), name
    torch._dynamo.reset()
    model = Block().to("cuda:1")
    x, mask = inputs(9, device="cuda:1")
    compiled = torch.compile(model, backend="trifast")
    torch.testing.assert_close(
        results_of_block(compiled, x, mask), results_of_block(model, x, mask), rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_capture_into_a_graph(dtype):
    """Forward and backward recorded once and replayed on other values: nothing is read on the host."""

    def drawn(seed):
        return random_inputs(R=33, I=33, J=33, D=32, dtype=dtype, device="cuda", key_term="additive", seed=seed)

    x = drawn(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            results(attend, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = results(attend, x)
    for seed in (1, 2):
        other = drawn(seed)
        for name in ("q", "k", "v", "bias", "key_bias", "grad_out"):
            getattr(x, name).copy_(getattr(other, name))
        graph.replay()
        for name, value in results(attend, other).items():
            assert torch.equal(recorded[name], value), (seed, name)


def test_memory_is_flat_over_compiled_calls():
    torch._dynamo.reset()
    model = Block().cuda()
    compiled = torch.compile(model, backend="trifast")
    x, mask = inputs(32, device="cuda")
    used = []
    for _ in range(50):
        results_of_block(compiled, x, mask)
        used.append(torch.cuda.memory_allocated())
    assert used[-1] == used[5]
