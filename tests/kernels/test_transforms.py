"""torch.func and forward_ad around the op: as a function of torch's own, or an error that says what to do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from trifast_inductor.errors import DoubleBackwardError, ForwardModeError
from trifast_inductor.kernels.triangle_attention import batching, op

from .test_op import DEVICE, arguments

SAMPLES = 3
NAMES = ("q", "k", "v", "bias")


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return op.triangle_attention(q, k, v, bias, *rest)[0]


def loss(*inputs: Any) -> Tensor:
    return attention(*inputs).square().sum()


def by_hand(*inputs: Any) -> list[Tensor]:
    """What autograd alone gives for q, k, v and bias."""
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in inputs[:4]]
    return list(torch.autograd.grad(loss(*leaves, *inputs[4:]), [t for t in leaves if t is not None]))


def samples(mapped: tuple[str, ...], key_term: str = "none") -> tuple[list[Any], list[int | None]]:
    """Arguments of the op, those named with an axis of samples somewhere in the middle, and where it is."""
    given = arguments(key_term=key_term, requires_grad=False)
    in_dims: list[int | None] = [None] * len(given)
    for index, name in enumerate((*NAMES, "key_bias", "key_mask")):
        if name in mapped:
            t = given[index]
            many = [t.roll(n, -1) if t.dtype == torch.bool else t * (1 - n / 4) for n in range(SAMPLES)]
            given[index], in_dims[index] = torch.stack(many, 1), 1
    return given, in_dims


def one(given: list[Any], in_dims: list[int | None], n: int) -> list[Any]:
    return [t if dim is None else t.select(dim, n) for t, dim in zip(given, in_dims, strict=True)]


@pytest.mark.parametrize(
    ("mapped", "key_term"),
    [
        (("q",), "none"),
        (("bias",), "add"),
        (("q", "k", "v", "bias"), "none"),
        (("q", "key_bias"), "add"),
        (("v", "key_mask"), "select"),
    ],
    ids=str,
)
def test_vmap_is_one_call_for_each_sample(mapped: tuple[str, ...], key_term: str) -> None:
    given, in_dims = samples(mapped, key_term)
    out = torch.func.vmap(attention, tuple(in_dims))(*given)
    assert out.shape[0] == SAMPLES
    for n in range(SAMPLES):
        torch.testing.assert_close(out[n], attention(*one(given, in_dims, n)))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
def test_gradients_of_each_sample(with_bias: bool) -> None:
    """`vmap(grad)`: of what the samples share, too."""
    given, in_dims = samples(("q", "v"), "select")
    wanted = (0, 1, 2, 3)
    if not with_bias:
        given[3], wanted = None, (0, 1, 2)
    gradients = torch.func.vmap(torch.func.grad(loss, wanted), tuple(in_dims))(*given)
    for n in range(SAMPLES):
        torch.testing.assert_close([g[n] for g in gradients], by_hand(*one(given, in_dims, n)))


def test_the_gradient_of_a_vmap_sums_over_what_is_shared() -> None:
    given, in_dims = samples(("q", "bias"))

    def total(*inputs: Any) -> Tensor:
        return torch.func.vmap(attention, tuple(in_dims))(*inputs).square().sum()

    gradients = torch.func.grad(total, (0, 1, 2, 3))(*given)
    each = [by_hand(*one(given, in_dims, n)) for n in range(SAMPLES)]
    for index, name in enumerate(NAMES):
        parts = [gradient[index] for gradient in each]
        expected = torch.stack(parts, 1) if in_dims[index] is not None else sum(parts)
        torch.testing.assert_close(gradients[index], expected, msg=name)


def test_vmap_of_a_vmap() -> None:
    given = arguments(requires_grad=False)
    q, k = (torch.stack([t * n for n in (1, 2, 3)]) for t in given[:2])
    over_k = torch.func.vmap(attention, (None, 0, *(None,) * 7))
    out = torch.func.vmap(over_k, (0, *(None,) * 8))(q, k, *given[2:])
    assert out.shape[:2] == (3, 3)
    torch.testing.assert_close(out[2, 1], attention(q[2], k[1], *given[2:]))


def test_a_jacobian_by_rows() -> None:
    given = arguments(requires_grad=False)
    jacobian = torch.func.jacrev(attention)(*given)
    assert jacobian.shape == (*given[0].shape, *given[0].shape)
    along = torch.randn_like(given[0])
    (dq,) = torch.func.vjp(lambda q: attention(q, *given[1:]), given[0])[1](along)
    torch.testing.assert_close(torch.tensordot(along, jacobian, along.dim()), dq)


def test_outer_parameters_get_their_gradient_through_a_vmap() -> None:
    given, in_dims = samples(("q",))
    given[1].requires_grad_()
    (dk,) = torch.autograd.grad(torch.func.vmap(attention, tuple(in_dims))(*given).square().sum(), given[1])
    torch.testing.assert_close(dk, sum(by_hand(*one(given, in_dims, n))[1] for n in range(SAMPLES)))


def test_one_call_serves_all_samples_of_a_single_batch_without_a_copy() -> None:
    """What is not mapped over is expanded: at B = 1 its memory is that of one sample."""
    seen: list[tuple[Any, ...]] = []

    def once(*args: Any) -> tuple[Tensor, ...]:
        seen.append(args)
        return tuple(args[0].new_zeros(2 * SAMPLES // 2, 5) for _ in range(3))

    class Info:
        batch_size = SAMPLES

    q, bias = torch.zeros(SAMPLES, 1, 4, 5, 2, 8), torch.zeros(1, 2, 5, 5)
    results, out_dims = batching.folded(once)(Info, (0, None), q, bias)
    ((folded_q, folded_bias),) = seen
    assert folded_q.shape == (SAMPLES, 4, 5, 2, 8)
    assert folded_bias.shape == (SAMPLES, 2, 5, 5)
    assert (folded_q.data_ptr(), folded_bias.data_ptr()) == (q.data_ptr(), bias.data_ptr())
    assert folded_bias.stride(0) == 0
    assert [t.shape for t in results] == [(SAMPLES, 1, 5)] * 3
    assert out_dims == (0, 0, 0)


@pytest.mark.parametrize(
    "second",
    [
        lambda f, q: torch.func.grad(lambda q: torch.func.grad(f)(q).sum())(q),
        lambda f, q: torch.autograd.functional.hessian(f, q[:1, :1, :2]),
        lambda f, q: torch.func.jacrev(torch.func.grad(f))(q),
    ],
    ids=["grad of grad", "hessian", "jacrev of grad"],
)
def test_a_second_derivative_is_refused_by_name(second: Callable[..., Any]) -> None:
    """Silence would be worse: the inner gradient is a constant to a level that does not know the op."""
    given = arguments(requires_grad=False)

    def of_q(q: Tensor) -> Tensor:
        return loss(q, *(t[: q.shape[0], : q.shape[1]] for t in given[1:3]), None, *given[4:])

    with pytest.raises(DoubleBackwardError, match="differentiable once"):
        second(of_q, given[0])


def test_gradgradcheck_meets_the_same_refusal() -> None:
    given = arguments(bias=False)
    with pytest.raises(DoubleBackwardError):
        torch.autograd.gradgradcheck(lambda q, k, v: attention(q, k, v, *given[3:]), given[:3], fast_mode=True)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["gradients on", "gradients off"])
def test_forward_mode_is_refused_by_name(grad_mode: bool) -> None:
    """A tangent travels with gradients off, too: kernels would drop it without a word."""
    given = arguments(torch.float32, requires_grad=False)
    with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
        dual = forward_ad.make_dual(given[0], torch.ones_like(given[0]))
        with pytest.raises(ForwardModeError, match="reverse mode"):
            attention(dual, *given[1:])
        assert attention(*given).isfinite().all()  # what carries no tangent is not concerned


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, q: torch.func.jvp(f, (q,), (q,)),
        lambda f, q: torch.func.jacfwd(f)(q),
        lambda f, q: torch.func.hessian(lambda q: f(q).sum())(q),
    ],
    ids=["jvp", "jacfwd", "hessian"],
)
def test_forward_transforms_are_refused_by_name(transform: Callable[..., Any]) -> None:
    given = arguments(torch.float32, requires_grad=False)
    with pytest.raises(ForwardModeError, match="triangle_attention has no forward-mode derivative"):
        transform(lambda q: attention(q, *given[1:]), given[0])


def test_a_compiled_vmap_is_right() -> None:
    """Whether the pass reads it or not."""
    q, k, v, bias = arguments(torch.float32, requires_grad=False)[:4]
    assert q.device.type == torch.device(DEVICE).type

    def core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        logits = q.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2) + bias[:, None]
        return logits.softmax(-1) @ v.transpose(2, 3)

    torch._dynamo.reset()
    mapped = torch.func.vmap(core, (0, None, None, None))
    many = torch.stack([q, 2 * q])
    torch.testing.assert_close(torch.compile(mapped, backend="trifast")(many, k, v, bias), mapped(many, k, v, bias))
