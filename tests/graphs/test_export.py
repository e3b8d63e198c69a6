"""torch.export, and AOTInductor packages that run in a process of their own."""

import functools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import trifast_inductor
from trifast_inductor.errors import DeclinedError
from trifast_inductor.rewrite import TriangleAttentionPass, rewrite, rewrite_all

from .block import Around, Block, core_with_softmax_in_float32, inputs

CHECKOUT = Path(__file__).parents[2]
bfloat16 = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def exported(model, device="cpu"):
    """The program of a model, for any N."""
    N = torch.export.Dim("N", min=2, max=1024)
    x, mask = inputs(device=device)
    return torch.export.export(model, (x, mask), dynamic_shapes=({1: N, 2: N}, {1: N, 2: N}))


def in_bfloat16(block, x, mask):
    with bfloat16():
        return block(x, mask)


def without_gradients(block, x, mask):
    with torch.no_grad():
        y = block(x, mask)
    return y * 2


class TestRegions:
    """Export cuts regions out into bodies; an attention is read through them."""

    @pytest.mark.parametrize(
        "model",
        [
            Block(),
            Block(core_with_softmax_in_float32),
            Around(in_bfloat16, Block(core_with_softmax_in_float32)),
            Around(without_gradients),
        ],
        ids=["plain", "softmax in float32", "bfloat16 around it", "no_grad around it"],
    )
    def test_is_rewritten_once(self, model):
        program = exported(model).module()
        rewrite_all(program)
        assert counters["trifast"] == {"rewritten": 1}
        x, mask = inputs(11)
        torch.testing.assert_close(program(x, mask), model(x, mask), rtol=2e-2, atol=2e-2)

    def test_what_is_declined_in_a_body_is_said_once_by_the_program(self):
        """Inductor visits the body first; alone, it cannot say why."""

        def returns_probabilities(block, x, mask):
            a = x @ x.mT + mask[:, None]
            with torch.autocast("cpu", enabled=False):
                p = torch.softmax(a, -1)
            return p @ x, p

        program = exported(Around(returns_probabilities)).module()
        assert program.meta
        body = next(module for name, module in program.named_children() if name.startswith("submod"))
        assert rewrite(body.graph, strict=True) == []
        with pytest.raises(DeclinedError, match="probabilities are also used elsewhere"):
            rewrite(program.graph, strict=True)
        assert counters["trifast"] == {"declined": 1, "declined: probabilities-used": 1}


def run_elsewhere(package: str, x: torch.Tensor, mask: torch.Tensor, folder: Path, *imports: str) -> torch.Tensor:
    """The package's result in a new process that imports torch and what is named, no more."""
    torch.save((x, mask), folder / "inputs.pt")
    program = (
        f"import sys, torch, {', '.join(imports) or 'os'}\n"
        f"x, mask = torch.load({str(folder / 'inputs.pt')!r})\n"
        f"out = torch._inductor.aoti_load_package({package!r})(x, mask)\n"
        f"assert ('trifast_inductor' in sys.modules) == {'trifast_inductor' in imports}\n"
        f"torch.save(out, {str(folder / 'out.pt')!r})\n"
    )
    path = CHECKOUT if imports else folder
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program], cwd=path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt")


def sources_of(package: str) -> str:
    """What was generated: C++, the ops it calls by name, and the names of all files."""
    with zipfile.ZipFile(package) as files:
        texts = [files.read(name).decode() for name in files.namelist() if name.endswith((".cpp", ".json"))]
        return "\n".join([*texts, *files.namelist()])


@pytest.mark.usefixtures("aot_packages")
class TestPackage:
    @torch.no_grad()
    def test_on_the_cpu_under_register(self, tmp_path):
        """The op is called by name, so the process that loads the package imports trifast_inductor."""
        model = Block()
        with trifast_inductor.register():
            package = torch._inductor.aoti_compile_and_package(
                exported(model), package_path=str(tmp_path / "block.pt2")
            )
        assert counters["trifast"] == {"rewritten": 1}
        generated = sources_of(package)
        assert "trifast_inductor::triangle_attention" in generated
        assert "bmm" not in generated
        x, mask = inputs(11)
        out = run_elsewhere(package, x, mask, tmp_path, "trifast_inductor")
        torch.testing.assert_close(out, model(x, mask), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    @torch.no_grad()
    def test_by_inductor_configs(self, tmp_path):
        """OpenFold's softmax in float32, inside bfloat16."""
        model = Around(in_bfloat16, Block(core_with_softmax_in_float32))
        package = torch._inductor.aoti_compile_and_package(
            exported(model),
            package_path=str(tmp_path / "block.pt2"),
            inductor_configs={"pre_grad_custom_pass": TriangleAttentionPass()},
        )
        assert counters["trifast"] == {"rewritten": 1}
        assert "bmm" not in sources_of(package)
        x, mask = inputs(11)
        out = torch._inductor.aoti_load_package(package)(x, mask)
        torch.testing.assert_close(out, model(x, mask), rtol=2e-2, atol=2e-2)

    @pytest.mark.gpu
    @torch.no_grad()
    def test_on_cuda_by_name(self, tmp_path):
        """As on the CPU: the process that loads the package imports trifast_inductor."""
        model = Block().cuda()
        with trifast_inductor.register():
            package = torch._inductor.aoti_compile_and_package(
                exported(model, "cuda"), package_path=str(tmp_path / "block.pt2")
            )
        assert "trifast_inductor::triangle_attention" in sources_of(package)
        x, mask = inputs(11, device="cuda")
        out = run_elsewhere(package, x, mask, tmp_path, "trifast_inductor")
        torch.testing.assert_close(out, model(x, mask), rtol=2e-3, atol=1e-3)

    @pytest.mark.gpu
    @torch.no_grad()
    def test_on_cuda_without_this_package(self, tmp_path):
        """The kernel's machine code is in the package, which needs neither this package nor Triton."""
        model = Block().cuda()
        package = torch._inductor.aoti_compile_and_package(
            exported(model, "cuda"),
            package_path=str(tmp_path / "block.pt2"),
            inductor_configs={"pre_grad_custom_pass": TriangleAttentionPass(packages_kernels=True)},
        )
        assert counters["trifast"] == {"rewritten": 1}
        generated = sources_of(package)
        assert "_triangle_attention_fwd" in generated
        assert ".cubin" in generated
        assert "bmm" not in generated
        assert "aoti_torch_proxy_executor_call_function(" not in generated
        for N in (11, 64, 200):
            x, mask = inputs(N, device="cuda")
            out = run_elsewhere(package, x, mask, tmp_path)
            torch.testing.assert_close(out, model(x, mask), rtol=2e-3, atol=1e-3)
