"""The op as torch sees it: opcheck forward and backward, gradcheck, layouts, FLOPs, and what it refuses."""

import itertools
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import FlopCounterMode

import trifast_inductor
from trifast_inductor.errors import (
    DeviceError,
    DoubleBackwardError,
    DtypeError,
    ScaleError,
    ShapeError,
    TrifastError,
)
from trifast_inductor.kernels.triangle_attention import op, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, R, I, J, H, D = 2, 3, 5, 7, 2, 8


def arguments(
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    key_term: str = "none",
    requires_grad: bool = True,
    device: str = DEVICE,
) -> list[Tensor | float | None]:
    """Positional arguments of the op."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    q, k, v = draw(B, R, I, H, D), draw(B, R, J, H, D), draw(B, R, J, H, D)
    pair = draw(B, H, I, J) if bias else None
    masked = (torch.rand(B, R, J, generator=generator) < 0.3).to(device)
    key_bias = -1e9 * masked.to(dtype) if key_term == "add" else None
    key_mask = masked if key_term == "select" else None
    for t in (q, k, v, pair):
        if t is not None:
            t.requires_grad_(requires_grad)
    return [q, k, v, pair, key_bias, key_mask, 0.3, -1e9, False]


@pytest.mark.parametrize("key_term", ["none", "add", "select"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_opcheck_forward(bias: bool, key_term: str) -> None:
    torch.library.opcheck(op.triangle_attention, arguments(torch.float32, bias, key_term))


@pytest.mark.parametrize("needs_dbias", [True, False])
@pytest.mark.parametrize("key_term", ["none", "add", "select"])
@pytest.mark.parametrize("overload", [op.triangle_attention_gradients, op.triangle_attention_backward], ids=str)
def test_opcheck_backward(overload: Any, key_term: str, needs_dbias: bool) -> None:
    """All of opcheck's tests, on inputs that need no gradient: a derivative of the backward is a refusal."""
    given = arguments(torch.float32, key_term=key_term, requires_grad=False)
    out, row_max, row_sum = op.triangle_attention(*given)
    saved = (out, row_max, row_sum, needs_dbias)
    torch.library.opcheck(overload, (torch.randn_like(out), *given, *saved))


def test_opcheck_of_the_backward_stops_at_its_refusal_only() -> None:
    given = arguments(torch.float32, requires_grad=False)
    saved = op.triangle_attention(*given)
    call = (torch.randn_like(saved[0]).requires_grad_(), *given, *saved, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.triangle_attention_gradients, call, test_utils=tests)
    with pytest.raises(Exception, match="differentiable once"):
        torch.library.opcheck(op.triangle_attention_gradients, call, test_utils="test_aot_dispatch_dynamic")


@pytest.mark.parametrize("first", [True, False], ids=["key-first", "bias-first"])
@pytest.mark.parametrize("key_term", ["none", "add", "select"])
def test_gradcheck(key_term: str, first: bool) -> None:
    given = arguments(key_term=key_term)

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return op.triangle_attention(q, k, v, bias, *given[4:8], first)[0]

    assert torch.autograd.gradcheck(attention, given[:4])


def test_gradcheck_of_a_bias_shared_over_the_batch() -> None:
    """[1, H, I, J] expanded to the batch: its gradient is summed over both."""
    given = arguments()

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return op.triangle_attention(q, k, v, bias.expand(B, H, I, J), *given[4:])[0]

    shared = given[3].detach()[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(attention, (*given[:3], shared), fast_mode=True)


@pytest.mark.parametrize("key_term", ["none", "add", "select"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_strides_of_the_gradient(dtype: torch.dtype, key_term: str) -> None:
    """Expanded from one number, every second of a wider tensor, heads first: the same as a contiguous copy."""
    given = arguments(dtype, key_term=key_term)
    out = op.triangle_attention(*given)[0]
    layouts = {
        "expanded": torch.randn((), device=DEVICE).to(dtype).expand(out.shape),
        "expanded over rows": torch.randn_like(out[:, :1]).expand(out.shape),
        "sliced": torch.randn(*out.shape[:-1], 2 * D + 3, device=DEVICE).to(dtype)[..., 3::2],
        "heads first": torch.randn_like(out.transpose(1, 3).contiguous()).transpose(1, 3),
    }
    for name, grad_out in layouts.items():
        assert not grad_out.is_contiguous(), name
        got = torch.autograd.grad(out, given[:4], grad_out, retain_graph=True)
        want = torch.autograd.grad(out, given[:4], grad_out.contiguous(), retain_graph=True)
        for g, w in zip(got, want, strict=True):
            # A product over other strides may sum in another order.
            torch.testing.assert_close(g, w, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_deterministic_as_it_is(dtype: torch.dtype) -> None:
    """Two backward runs agree to the bit, and with `use_deterministic_algorithms`, which forbids nothing here."""
    given = arguments(dtype, key_term="add")

    def run() -> list[Tensor]:
        out = op.triangle_attention(*given)[0]
        return [out, *torch.autograd.grad(out, given[:4], torch.ones_like(out))]

    first, second = run(), run()
    torch.use_deterministic_algorithms(True)
    try:
        asked = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for runs in zip(first, second, asked, strict=True):
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=4)), ids=str)
def test_gradients_of_some_inputs_only(wanted: tuple[bool, ...]) -> None:
    given = arguments(key_term="select", requires_grad=False)
    for t, is_wanted in zip(given[:4], wanted, strict=True):
        t.requires_grad_(is_wanted)
    out = op.triangle_attention(*given)[0]
    assert out.requires_grad == any(wanted)
    if any(wanted):
        grad_out = torch.randn_like(out).transpose(1, 2).contiguous().transpose(1, 2)
        out.backward(grad_out)
        expected = reference.backward(grad_out, *given)
        for t, is_wanted, gradient in zip(given[:4], wanted, expected, strict=True):
            if is_wanted:
                torch.testing.assert_close(t.grad, gradient)
            else:
                assert t.grad is None


def test_statistics_are_not_differentiable_and_unused_output_costs_nothing() -> None:
    given = arguments()
    out, row_max, row_sum = op.triangle_attention(*given)
    assert not row_max.requires_grad
    assert not row_sum.requires_grad
    assert out.is_contiguous()
    assert out.shape == (B, R, I, H, D)
    assert row_max.shape == row_sum.shape == (B, R, H, I)


@pytest.mark.parametrize("by", ["key_mask", "key_bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_masked_rows_are_zero_as_in_sdpa(dtype: torch.dtype, by: str) -> None:
    """Nothing but -inf: 0 and no gradient, whichever term brought it; all other rows as without the flag."""
    given = arguments(dtype, key_term="none", requires_grad=False)
    q, k, v, bias = given[:4]
    lost = torch.zeros(B, R, H, I, dtype=torch.bool, device=DEVICE)
    if by == "bias":
        bias[1, 0, 2] = -torch.inf
        lost[1, :, 0, 2] = True
    else:
        masked = torch.zeros(B, R, J, dtype=torch.bool, device=DEVICE)
        masked[1, 2], masked[0, 0, 3] = True, True
        lost[1, 2] = True
        given[5 if by == "key_mask" else 4] = masked if by == "key_mask" else torch.where(masked, -torch.inf, 0.0)
    given[7] = -torch.inf
    for t in (q, k, v, bias):
        t.requires_grad_()
    grad_out = torch.randn(B, R, I, H, D, device=DEVICE).to(dtype)

    def run(*flag: bool) -> list[Tensor]:
        out = op.triangle_attention(*given, *flag)[0]
        return [out, *torch.autograd.grad(out, given[:4], grad_out * ~lost.transpose(2, 3)[..., None])]

    zeroed = run(True)
    assert all(torch.isfinite(t).all() for t in zeroed)
    assert (zeroed[0].transpose(2, 3)[lost] == 0).all()
    assert (zeroed[1].transpose(2, 3)[lost] == 0).all()
    kept = ~lost.transpose(2, 3)
    plain = op.triangle_attention(*given)[0]
    assert plain[~kept].isnan().all()
    assert torch.equal(plain[kept], zeroed[0][kept])
    if dtype == torch.float64:
        x = reference.logits(q, k, bias, *given[4:])
        p = x.softmax(-1).nan_to_num(0.0).detach()
        dv = torch.einsum("brhij,brihd->brjhd", p, grad_out * kept[..., None])
        torch.testing.assert_close(zeroed[3], dv)


def test_flops_are_counted() -> None:
    given = arguments(torch.float32)
    with FlopCounterMode(display=False) as counter:
        op.triangle_attention(*given)[0].sum().backward()
    product = 2 * B * R * H * I * J * D
    assert counter.get_total_flops() == 2 * product + 5 * product


def test_double_backward_is_refused_by_name() -> None:
    given = arguments()
    (dq,) = torch.autograd.grad(op.triangle_attention(*given)[0].sum(), given[0], create_graph=True)
    with pytest.raises(DoubleBackwardError, match="differentiable once"):
        dq.sum().backward()


def test_a_graph_of_the_backward_can_be_built() -> None:
    """`create_graph=True` costs nothing until the graph is used: the gradients are the same."""
    given = arguments()
    grads = [
        torch.autograd.grad(op.triangle_attention(*given)[0].square().sum(), given[:4], create_graph=create_graph)
        for create_graph in (False, True)
    ]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_a_compiled_graph_calls_what_has_no_autograd_of_its_own() -> None:
    """A second passage through Python for each call would cost about what the call does."""
    seen: list[str] = []

    def compiler(gm: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in gm.graph.nodes if "trifast" in str(node.target))
        return make_boxed_func(gm.forward)

    given = arguments(torch.float32, key_term="add")
    attention = torch.compile(lambda *args: op.triangle_attention(*args)[0], backend=aot_autograd(fw_compiler=compiler))
    attention(*given).sum().backward()
    assert seen == [
        "trifast_inductor.triangle_attention_forward.default",
        "trifast_inductor.triangle_attention_backward.default",
    ]


def test_a_key_bias_that_wants_a_gradient_is_refused() -> None:
    given = arguments(key_term="add")
    given[4].requires_grad_()
    with pytest.raises(DtypeError, match=r"key_bias must not require a gradient.*detach"):
        op.triangle_attention(*given)


class TestDirectCall:
    """`trifast_inductor.triangle_attention`, layout [B, H, N, N, D]."""

    def inputs(self, n: int = 6, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(2, 2, n, n, 8, generator=generator, dtype=torch.float64) for _ in range(3))
        bias = torch.randn(2, 2, n, n, generator=generator, dtype=torch.float64)
        mask = torch.rand(2, n, n, generator=generator) < 0.3
        mask[0, 1] = True
        return [t.to(DEVICE, dtype) for t in (q, k, v, bias)] + [mask.to(DEVICE)]

    def eager(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias[:, :, None]
        logits = logits.masked_fill(mask[:, None, :, None, :], torch.finfo(torch.float32).min)
        return logits.softmax(-1) @ v

    @pytest.mark.parametrize("scale", [None, 0.0, 2])
    def test_is_what_eager_computes(self, scale: float | None) -> None:
        q, k, v, bias, mask = self.inputs()
        out = trifast_inductor.triangle_attention(q, k, v, bias, mask, scale=scale)
        torch.testing.assert_close(out, self.eager(q, k, v, bias, mask, scale))

    def test_without_mask_and_without_bias(self) -> None:
        q, k, v, bias, _ = self.inputs()
        torch.testing.assert_close(
            trifast_inductor.triangle_attention(q, k, v, bias),
            (q @ k.mT * 8**-0.5 + bias[:, :, None]).softmax(-1) @ v,
        )
        torch.testing.assert_close(
            trifast_inductor.triangle_attention(q, k, v, None), (q @ k.mT * 8**-0.5).softmax(-1) @ v
        )

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            (
                {"q": lambda t: t[0]},
                ShapeError,
                r"q must be \[B, H, R, I, D\], got \[2, 6, 6, 8\] of rank 4: .*unsqueeze",
            ),
            ({"bias": lambda t: t[0]}, ShapeError, r"bias must be \[B, H, I, J\], got \[2, 6, 6\] of rank 3"),
            (
                {"bias": lambda t: t[:1]},
                ShapeError,
                r"bias must be \[B, H, I, J\] = \[2, 2, 6, 6\], got \[1, 2, 6, 6\].*expand",
            ),
            ({"k": lambda t: t[..., :4]}, ShapeError, r"k must be .* = \[2, 2, 6, 6, 8\], got \[2, 2, 6, 6, 4\]"),
            ({"v": lambda t: t[:, :, :, :5]}, ShapeError, r"v must be .*got \[2, 2, 6, 5, 8\]"),
            ({"mask": lambda t: t[:, :5]}, ShapeError, r"mask must be \[B, R, J\] = \[2, 6, 6\], got \[2, 5, 6\]"),
            ({"mask": lambda t: t.float()}, DtypeError, r"mask must be bool .* got torch.float32: use `mask == 0`"),
            (
                {"bias": lambda t: t > 0},
                DtypeError,
                r"bias must be floating point, got torch.bool: a bool mask is passed as mask=",
            ),
            (
                {"k": lambda t: t.float()},
                DtypeError,
                r"k must have the dtype of q, torch.float64, got torch.float32: .*k.to\(q.dtype\)",
            ),
            ({"q": lambda t: t.long()}, DtypeError, r"q must be floating point, got torch.int64"),
            ({"v": lambda t: t.tolist()}, DtypeError, r"v must be a tensor, got list: .*as_tensor"),
            ({"v": lambda t: t.to("meta")}, DeviceError, r"v must be on the device of q, .*, got meta"),
            ({"scale": -1.0}, ScaleError, r"scale must be finite and not negative, got -1.0"),
            ({"scale": float("nan")}, ScaleError, r"got nan"),
            (
                {"scale": torch.tensor(1.0)},
                ScaleError,
                r"scale must be a Python number or None, got Tensor: multiply q",
            ),
        ],
        ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
    )
    def test_one_clear_error(self, change, error: type[TrifastError], message: str) -> None:
        given = dict(zip(("q", "k", "v", "bias", "mask"), self.inputs(), strict=True)) | {"scale": None}
        for name, how in change.items():
            given[name] = how(given[name]) if callable(how) else how
        with pytest.raises(error, match=message):
            trifast_inductor.triangle_attention(**given)

    def test_several_problems_are_all_listed(self) -> None:
        q, k, v, bias, mask = self.inputs()
        with pytest.raises(ShapeError, match=r"k must be .*; mask must be"):
            trifast_inductor.triangle_attention(q, k[..., :4], v, bias, mask[:1])
