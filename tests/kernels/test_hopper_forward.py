"""The Hopper forward against the definition; what it compiles to is looked at without a GPU."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import reference
from trifast_inductor.testing import Inputs, assert_within_budget, random_inputs

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention.hopper import choice

if choice.gluon_refusal() is not None:
    pytest.skip(choice.gluon_refusal(), allow_module_level=True)
from trifast_inductor.kernels.triangle_attention import backward
from trifast_inductor.kernels.triangle_attention.hopper import forward

RING = choice.Shape(BLOCK_J=64, CHUNKS=1, STAGES=2, NUM_WARPS=8)  # 256 keys at a time


@pytest.fixture
def hopper() -> str:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    return "cuda"


def eager(x: Inputs) -> torch.Tensor:
    p = torch.softmax(reference.logits(*x.op[:2], *x.op[3:]), -1).to(x.v.dtype)
    return torch.einsum("brhij,brjhd->brihd", p, x.v)


def launch(x: Inputs, shape: choice.Shape | None = None):
    return forward.launch(x.q, x.k, x.v, x.bias, x.key_bias, x.key_mask, x.scale, x.fill, shape)


def as_projections(x: Inputs) -> Inputs:
    """q, k, v as heads of a projection `[B, R, N, 3·H·D]`, the bias as one of `[B, I, J, H]`."""

    def wide(t: torch.Tensor) -> torch.Tensor:
        B, R, N, H, D = t.shape
        storage = torch.full((B, R, N, 3 * H * D), float("nan"), dtype=t.dtype, device=t.device)
        return storage[..., H * D : 2 * H * D].view(B, R, N, H, D).copy_(t)

    bias = x.bias.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return replace(x, q=wide(x.q), k=wide(x.k), v=wide(x.v), bias=bias)


def as_ending_node(x: Inputs) -> Inputs:
    """Rows and residues stored the other way round."""

    def swapped(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    return replace(x, q=swapped(x.q), k=swapped(x.k), v=swapped(x.v), bias=x.bias.mT.contiguous().mT)


LAYOUTS = {"projections": as_projections, "ending node": as_ending_node, "contiguous": lambda x: x}


def check(x: Inputs, shape: choice.Shape | None = None) -> None:
    out, row_max, row_sum = launch(x, shape)
    exact = reference.forward(*x.to(torch.float64).op)
    assert_within_budget(out, eager(x), exact[0], name="out")
    # Bias over scale is rounded once more, and the sum is of probabilities as they are multiplied with v.
    rounding = torch.finfo(x.q.dtype).eps
    finite = exact[1].isfinite() & (exact[1] > -1e4)
    assert (row_max - exact[1])[finite].abs().max() <= rounding * x.bias.abs().max() + 1e-5
    log_sum, exact_sum = row_max + row_sum.log(), exact[1] + exact[2].log()
    assert (log_sum - exact_sum)[finite].abs().max() <= rounding * (1 + x.bias.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("D", [16, 32, 64])
@pytest.mark.parametrize("key_term", ["none", "additive", "mask", "-inf mask"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_reference(hopper, dtype, D, key_term, layout):
    x = random_inputs(B=2, R=3, I=200, J=333, H=2, D=D, dtype=dtype, device=hopper, key_term=key_term)
    check(LAYOUTS[layout](x))


@pytest.mark.gpu
@pytest.mark.parametrize("I", [1, 129, 300])
@pytest.mark.parametrize("J", [1, 64, 65, 333, 512])
def test_keys_in_a_ring(hopper, I, J):
    check(random_inputs(B=1, R=5, I=I, J=J, D=32, dtype=torch.bfloat16, device=hopper, key_term="additive"), RING)


@pytest.mark.gpu
@pytest.mark.parametrize("amount", [-1e9, float("-inf")])
def test_wholly_left_out_rows(hopper, amount):
    x = random_inputs(R=3, I=130, J=260, dtype=torch.bfloat16, device=hopper, key_term="additive")
    key_bias = x.key_bias.float()
    key_bias[key_bias != 0] = amount
    key_bias[0, 1] = amount
    x = replace(x, key_bias=key_bias)
    out, row_max, _ = launch(x)
    expected = reference.forward(*x.to(torch.float32).op)
    torch.testing.assert_close(out.float(), expected[0], rtol=2e-2, atol=2e-2, equal_nan=True)
    assert torch.equal(row_max[0, 1], expected[1][0, 1])


@pytest.mark.gpu
def test_backward_takes_its_statistics(hopper):
    x = random_inputs(R=4, I=256, J=256, dtype=torch.bfloat16, device=hopper, key_term="additive")
    ours = backward.launch(x.grad_out, *x.op[:6], *launch(x), x.scale, x.fill, x.key_term_first, True)

    def gradients(forward_of: Callable[[Inputs], torch.Tensor], y: Inputs) -> tuple[torch.Tensor, ...]:
        leaves = [t.detach().clone().requires_grad_() for t in (y.q, y.k, y.v, y.bias)]
        out = forward_of(replace(y, q=leaves[0], k=leaves[1], v=leaves[2], bias=leaves[3]))
        return torch.autograd.grad(out, leaves, y.grad_out)

    in_eager = gradients(eager, x)
    exact = gradients(lambda y: reference.forward(*y.op)[0], x.to(torch.float64))
    for name, actual, theirs, wanted in zip(("q", "k", "v", "bias"), ours, in_eager, exact, strict=True):
        assert_within_budget(actual, theirs, wanted, name=f"d{name}")


def test_other_devices_get_the_portable_kernel():
    x = random_inputs(J=256, dtype=torch.bfloat16)
    assert choice.refusal(x.q, x.k, x.v, x.bias, None, 1.0, 0.0, False) == "the device is no Hopper"


@pytest.mark.parametrize("D", [16, 32, 64])
def test_shapes_fit_into_shared_memory(D):
    for J in range(1, 5000, 50):
        shape = choice.shape_for(D, J)
        assert shape.STAGES * shape.CHUNKS * choice.CHUNK_J * D * 4 <= 216 * 1024
        assert shape.STAGES > 1 or shape.CHUNKS * choice.CHUNK_J >= J


COMPILE = """
import subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from trifast_inductor.kernels.triangle_attention import backward
from trifast_inductor.kernels.triangle_attention.hopper import forward

box = [1, 1, 128, 1, 32]
desc = f"tensordesc<bf16{box},{gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)!r}>"
constants = dict(D=32, BLOCK_J=64, CHUNK_J=128, CHUNKS=4, STAGES=1, KEY_TERM="none", NUM_WARPS=8)
pointers = dict(q="*bf16", words="*i32", key="*fp32", flags="*i32", out="*bf16", row_max="*fp32", row_sum="*fp32")
types = {"k_desc": desc, "v_desc": desc, "scale": "fp32", "fill": "fp32"}
types |= {f"{name}_ptr": kind for name, kind in pointers.items()} | {name: "constexpr" for name in constants}
kernel = forward._triangle_attention_fwd_hopper
signature = {name: types.get(name, "i32") for name in kernel.arg_names}
aligned = {(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if "ptr" in name}
source = GluonASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, aligned)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "maxnreg": 128})
with tempfile.TemporaryDirectory() as folder:
    ptx = Path(folder, "kernel.ptx")
    ptx.write_text(compiled.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name", "sm_90a", ptx, "-o", "/dev/null"]
    subprocess.run(command, check=True, stderr=sys.stdout)
"""


def test_products_stay_asynchronous():
    """ptxas waits after each product, and says so, when it meets something in their way or lacks registers."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120
    )
    assert "Used" in done.stdout, done.stderr
    assert "serialized" not in done.stdout, done.stdout
    assert "Used 128 registers" in done.stdout, done.stdout
