"""The outside: backend by name, options, register and unregister, strict, threads, caches across processes."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import trifast_inductor
from trifast_inductor import rewrite
from trifast_inductor.errors import DeclinedError, UnknownOptionError
from trifast_inductor.rewrite import TriangleAttentionPass

from .afresh import without_cached_graphs
from .patterns.near_misses import ProbabilitiesReturned
from .patterns.spellings import MatmulInPlace, inputs

config = torch._inductor.config
CHECKOUT = Path(__file__).parents[1]
PACKAGE = Path(trifast_inductor.__file__).parent


is_installed = pytest.mark.skipif(
    not importlib.metadata.entry_points(group="torch_dynamo_backends", name="trifast"),
    reason="needs the package installed: the entry point is what makes the name known",
)


@pytest.fixture(autouse=True)
def _fresh(compiled_afresh):
    yield
    trifast_inductor.unregister()


class CountingPass(CustomGraphPass):
    """A pass that a user had set before."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str:
        return "counting"


def core(q, k, v, bias):
    """The smallest site, quick to compile."""
    return torch.softmax(q @ k.mT + bias, -1) @ v


def core_inputs():
    q, k, v = (torch.randn(1, 5, 2, 5, 8) for _ in range(3))
    return q, k, v, torch.randn(1, 1, 2, 5, 5)


def run_core(**options):
    arguments = core_inputs()
    torch.testing.assert_close(torch.compile(core, **options)(*arguments), core(*arguments))
    return counters["trifast"]["rewritten"]


class TestBackend:
    def test_by_name(self):
        assert run_core(backend="trifast") == 1

    @is_installed
    def test_by_name_in_a_process_that_never_imported_the_package(self):
        program = (
            "import torch, torch._functorch.config, torch._inductor.config, sys\n"
            "assert 'trifast_inductor' not in sys.modules\n"
            "torch._inductor.config.fx_graph_cache = False\n"  # on a hit the pass is not called
            "torch._functorch.config.enable_autograd_cache = False\n"
            "f = torch.compile(lambda q, b: torch.softmax(q @ q.mT + b, -1) @ q, backend='trifast')\n"
            "f(torch.randn(1, 5, 2, 5, 8), torch.randn(2, 5, 5))\n"
            "print(dict(torch._dynamo.utils.counters['trifast']))"
        )
        assert run_python(program).strip() == "{'rewritten': 1}"

    @is_installed
    def test_it_can_be_reset_before_anything_was_compiled(self):
        """Where inductor has not been imported: torch walks a list of backends then, to which an import would add."""
        run_python(
            "import sys, torch\n"
            "torch.compile(torch.nn.Linear(2, 2), backend='trifast')\n"
            "assert 'torch._inductor.cudagraph_trees' not in sys.modules\n"
            "torch._dynamo.reset()"
        )

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
    def test_modes(self, mode):
        assert run_core(backend="trifast", mode=mode) == 1

    def test_options_reach_inductor(self):
        seen = []

        def post_pass(graph):
            seen.append(config.max_fusion_size)

        options = {"max-fusion-size": 7, "post_grad_custom_post_pass": post_pass}
        assert run_core(backend="trifast", options=options) == 1
        assert seen == [7]

    def test_fullgraph_and_dynamic(self):
        compiled = torch.compile(core, backend="trifast", fullgraph=True, dynamic=True)
        for n in (5, 9, 12):
            q, bias = torch.randn(1, n, 2, n, 8), torch.randn(1, 1, 2, n, n)
            torch.testing.assert_close(compiled(q, q, q, bias), core(q, q, q, bias))
        assert counters["trifast"]["rewritten"] == 1  # one graph serves all sizes
        assert counters["stats"]["unique_graphs"] == 1

    def test_unknown_option_lists_the_known_ones(self):
        with pytest.raises(Exception, match=r"stric.*did you mean strict.*Known: .*max_autotune") as raised:
            run_core(backend="trifast", options={"stric": True})
        assert UnknownOptionError.__name__ in str(raised.value)

    def test_strict_raises_what_the_report_says(self):
        model, arguments = ProbabilitiesReturned(), inputs(ProbabilitiesReturned)
        with pytest.raises(Exception, match="probabilities are also used elsewhere") as raised:
            torch.compile(model, backend="trifast", options={"strict": True})(*arguments)
        assert DeclinedError.__name__ in str(raised.value)
        assert "near_misses.py:" in str(raised.value)

    def test_the_users_pass_keeps_running(self):
        users = CountingPass()
        assert run_core(backend="trifast", options={"pre_grad_custom_pass": users}) == 1
        assert users.calls == 1

    def test_a_model_without_softmax_is_left_to_inductor(self):
        x = torch.randn(4)
        torch.testing.assert_close(torch.compile(torch.sin, backend="trifast")(x), x.sin())
        assert counters["trifast"] == {}

    def test_training_matches_eager(self):
        torch.manual_seed(0)
        model, (x, mask) = MatmulInPlace(), inputs(MatmulInPlace)
        out = model(x, mask)
        out.square().sum().backward()
        expected = [out, *(p.grad for p in model.parameters())]
        model.zero_grad()
        out = torch.compile(model, backend="trifast")(x, mask)
        out.square().sum().backward()
        torch.testing.assert_close([out, *(p.grad for p in model.parameters())], expected, rtol=1e-4, atol=1e-5)
        assert counters["trifast"] == {"rewritten": 1}

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_training_under_cuda_graphs(self):
        """Nothing in forward or backward waits for the device, or reads a tensor that a replay does not update."""
        torch.manual_seed(0)
        model = MatmulInPlace().cuda()
        compiled = torch.compile(model, backend="trifast", mode="reduce-overhead")
        for _ in range(4):  # warm-up, recording, replays
            x, mask = (t.cuda() for t in inputs(MatmulInPlace))
            results = []
            for run in (model, compiled):
                torch.compiler.cudagraph_mark_step_begin()
                model.zero_grad(set_to_none=True)
                out = run(x, mask)
                out.square().sum().backward()
                results.append([t.clone() for t in (out.detach(), *(p.grad for p in model.parameters()))])
            torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
        assert counters["trifast"] == {"rewritten": 1}
        assert counters["inductor"]["cudagraph_skips"] == 0

    def test_an_unsupported_device_is_left_alone(self):
        meta = [t.to("meta") for t in core_inputs()]
        (row,) = trifast_inductor.explain(core, *meta).rows
        assert (row.reason, row.message) == (
            "device",
            "no kernel exists for this device (meta): run on CUDA or on the CPU",
        )


class TestRegister:
    def test_register_and_unregister(self):
        assert run_core() == 0
        trifast_inductor.register()
        trifast_inductor.register()
        torch._dynamo.reset()
        assert run_core() == 1
        trifast_inductor.unregister()
        trifast_inductor.unregister()
        torch._dynamo.reset()
        counters.clear()
        assert run_core() == 0
        assert config.pre_grad_custom_pass is None

    def test_as_a_context_manager(self):
        with trifast_inductor.register():
            assert isinstance(config.pre_grad_custom_pass, TriangleAttentionPass)
        assert config.pre_grad_custom_pass is None

    def test_a_pass_that_was_there_keeps_running_and_stays(self):
        users = CountingPass()
        with config.patch(pre_grad_custom_pass=users):
            with trifast_inductor.register():
                assert run_core() == 1
                assert users.calls == 1
            assert config.pre_grad_custom_pass is users

    def test_holds_in_other_threads(self):
        counted = []

        def run():
            with without_cached_graphs():
                counted.append(run_core())

        with trifast_inductor.register():
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        assert counted == [1]

    def test_with_backend_trifast_the_pass_runs_once(self):
        with trifast_inductor.register():
            assert run_core(backend="trifast") == 1


class TestCaches:
    def test_uuid_tells_passes_apart(self):
        plain, strict = TriangleAttentionPass(), TriangleAttentionPass(strict=True)
        assert plain.uuid() == TriangleAttentionPass().uuid()
        assert plain.uuid() != strict.uuid()
        assert TriangleAttentionPass(before=CountingPass()).uuid() not in (plain.uuid(), None)
        assert TriangleAttentionPass(before=lambda graph: None).uuid() is None

    @pytest.mark.parametrize("changed", ["backend.py", "kernels/triangle_attention/forward.py", "patterns/axes.py"])
    def test_the_hash_covers_every_source_of_a_checkout(self, changed, tmp_path, monkeypatch):
        """In a checkout `kernels` and `patterns` are links, which `Path.rglob` leaves out."""
        copied_package(tmp_path)

        def hash_now() -> bytes:
            get_hash_for_files.cache_clear()
            return rewrite.sources_hash.__wrapped__()

        monkeypatch.setattr(rewrite, "__file__", str(tmp_path / "trifast_inductor" / "rewrite.py"))
        before = hash_now()
        path = tmp_path / "trifast_inductor" / changed
        path.write_bytes(path.read_bytes() + b"\n")
        assert hash_now() != before

    @is_installed
    def test_a_second_process_hits_the_cache_unless_our_sources_changed(self, tmp_path):
        program = (
            "import torch\n"
            "from torch._dynamo.utils import counters\n"
            "from torch._inductor.utils import run_and_get_code\n"
            "torch.manual_seed(0)\n"
            "f = lambda q, b: torch.softmax(q @ q.mT + b, -1) @ q\n"
            "q, b = torch.randn(1, 5, 2, 5, 8), torch.randn(2, 5, 5)\n"
            "from torch.profiler import profile\n"
            "compiled = torch.compile(f, backend='trifast')\n"
            "compiled(q, b)\n"
            "with profile() as prof:\n"
            "    torch.testing.assert_close(compiled(q, b), f(q, b))\n"
            "names = {event.key for event in prof.key_averages()}\n"
            "hits = counters['inductor']['fxgraph_cache_hit'] + counters['aot_autograd']['autograd_cache_hit']\n"
            "print('trifast_inductor::triangle_attention_forward' in names, hits > 0)"
        )
        environ = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        assert run_python(program, environ).split() == ["True", "False"]
        assert run_python(program, environ).split() == ["True", "True"]
        copied = copied_package(tmp_path / "copy")
        kernel = copied / "trifast_inductor" / "kernels" / "triangle_attention" / "cpu.py"
        kernel.write_bytes(kernel.read_bytes() + b"\n")
        assert run_python(program, environ, copied).split() == ["True", "False"]


def copied_package(to: Path) -> Path:
    """The sources as they are, links and all, under a folder that can stand on the path."""
    shutil.copytree(PACKAGE, to / "trifast_inductor", symlinks=True)
    for name in ("kernels", "patterns"):
        if (PACKAGE / name).is_symlink():
            shutil.copytree(PACKAGE / name, to / name)
    return to


def run_python(program: str, environ: dict[str, str] | None = None, checkout: Path = CHECKOUT) -> str:
    """A process of its own, outside the checkout, as a user's would be."""
    path = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **(environ or {}), "PYTHONPATH": path},
        cwd=os.sep,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
