"""Life in a process: import, threads, workers, another package of that name, no Triton, no network."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import trifast_inductor
from trifast_inductor.kernels.triangle_attention import validation

from ..once import once
from .sites import core, inputs

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _unregistered(compiled_afresh):
    yield
    trifast_inductor.unregister()


def told(module: str, **environ: str) -> dict:
    """The last line that a program of tests/process prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.process.{module}"],
        cwd=CHECKOUT,
        env={**os.environ, "TRITON_INTERPRET": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1", **environ},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """One process for all that it can show; a user without a GPU, even on a machine that has one."""
    return once(tmp_path_factory, "one_process", lambda: told("one_process", CUDA_VISIBLE_DEVICES=""))


class TestOneProcess:
    def test_the_import_touches_no_driver(self, found):
        """A process that forks, or picks its GPU later, must be able to."""
        assert Path(found["package"]).samefile(trifast_inductor.__file__)
        assert not found["cuda_initialised"]
        assert found["drivers"] == []
        assert found["kernels"] == []
        assert not found["lowerings"]  # whose import asks for the GPUs

    def test_the_import_configures_no_logging(self, found):
        assert found["handlers"] == 0

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_workers_of_a_loader(self, found, method):
        """They call the op by name and compile, after an import here."""
        assert found[method] is True

    def test_nothing_is_downloaded_or_sent(self, found):
        assert found["network"] == []

    def test_nothing_touches_the_driver_later_either(self, found):
        assert not found["cuda_initialised_at_the_end"]


class TestTriton:
    def test_without_it_plain_inductor_and_one_warning(self):
        """On the CPU nothing misses it; a graph that needs it is left to inductor, both of its sites."""
        found = told("without_triton")
        assert not found["imported"]
        assert found["on_cpu"]["counts"] == {"rewritten": 2}
        assert found["on_cpu"]["warnings"] == []
        assert found["needing_it"]["counts"] == {"declined": 2, "declined: no-triton": 2}
        (warning,) = found["needing_it"]["warnings"]
        assert "Triton cannot be imported (libtriton.so: undefined symbol)" in warning
        assert max(found["on_cpu"]["off"], found["needing_it"]["off"]) < 1e-5

    @pytest.mark.parametrize("error", [ModuleNotFoundError, ImportError, OSError, AttributeError])
    def test_a_broken_installation_may_raise_anything(self, error, monkeypatch):
        def fail(name):
            raise error("libtriton.so")

        monkeypatch.setattr(validation.importlib, "import_module", fail)
        validation.triton_works.cache_clear()
        try:
            assert not validation.triton_works()
        finally:
            validation.triton_works.cache_clear()


def test_compiles_from_several_threads():
    """At once, each its own function, under `register` and by name: every result is right."""
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def work(n: int) -> None:
        def own(q, bias):
            return core(q, bias).transpose(n, n + 1)  # a view, for which inductor writes no C++

        try:
            start.wait(timeout=300)
            compiled = torch.compile(own, dynamic=False, **({"backend": "trifast"} if n % 2 else {}))
            for N in (4, 5):
                torch.testing.assert_close(compiled(*inputs(N)), own(*inputs(N)))
        except BaseException as error:
            failures.append(error)

    # torch knows one flag for all threads that says whether a graph is being traced; a call that meets one of another
    # thread is an error unless it is let off, which then runs as it is.
    one_flag = torch._dynamo.config.patch(error_on_nested_fx_trace=False)
    with one_flag, trifast_inductor.register():
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert counters["trifast"]["declined"] == 0


def test_unregister_in_the_middle():
    """What was compiled before keeps its rewrite; what the same function compiles later has none; both are right."""
    compiled = torch.compile(core, dynamic=False)
    trifast_inductor.register()
    torch.testing.assert_close(compiled(*inputs(5)), core(*inputs(5)))
    assert counters["trifast"] == {"rewritten": 1}
    trifast_inductor.unregister()
    torch.testing.assert_close(compiled(*inputs(6)), core(*inputs(6)))
    torch.testing.assert_close(compiled(*inputs(5)), core(*inputs(5)))
    assert counters["trifast"] == {"rewritten": 1}
    trifast_inductor.register()
    torch.testing.assert_close(compiled(*inputs(7)), core(*inputs(7)))
    assert counters["trifast"] == {"rewritten": 2}


def test_the_op_namespace_of_trifast_is_left_to_it():
    """The package TriFast, which needs a GPU to be imported, owns `torch.ops.trifast`."""
    other = torch.library.Library("trifast", "FRAGMENT")
    other.define("triangle_attention_of_this_test(Tensor x) -> Tensor")
    other.impl("triangle_attention_of_this_test", torch.neg, "CPU")
    torch.testing.assert_close(torch.compile(core, backend="trifast")(*inputs()), core(*inputs()))
    assert counters["trifast"] == {"rewritten": 1}
    assert torch.ops.trifast.triangle_attention_of_this_test(torch.ones(1)) == -1
    ours = {name for name in torch._C._dispatch_get_all_op_names() if "triangle_attention" in name}
    assert {name.partition("::")[0] for name in ours} == {"trifast", "trifast_inductor"}


@pytest.mark.gpu
@pytest.mark.skipif(importlib.util.find_spec("trifast") is None, reason="needs the package trifast")
def test_beside_trifast_itself():
    import trifast

    x = torch.randn(1, 2, 32, 32, 32, device="cuda")
    bias, mask = torch.randn(1, 2, 32, 32, device="cuda"), torch.zeros(1, 32, 32, dtype=torch.bool, device="cuda")
    theirs = trifast.triangle_attention(x, x, x, bias, mask)
    ours = trifast_inductor.triangle_attention(x, x, x, bias, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
