"""The torch implementation against the definition."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trifast_inductor.kernels.triangle_attention import cpu, reference
from trifast_inductor.testing import KEY_TERMS, Inputs, assert_within_budget, random_inputs

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On sizes this small, several threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(x: Inputs, needs_dbias: bool = True) -> dict[str, Tensor]:
    """Both passes; row statistics too."""
    out, row_max, row_sum = cpu.forward(*x.op)
    gradients = cpu.backward(x.grad_out, *x.op[:6], out, row_max, row_sum, *x.op[6:], needs_dbias)
    names = ("out", "row_max", "row_sum", "dq", "dk", "dv", "dbias")
    return dict(zip(names, (out, row_max, row_sum, *gradients), strict=True))


def define(x: Inputs) -> dict[str, Tensor]:
    """The same by the definition; without a bias, dbias is left out."""
    names = ("out", "row_max", "row_sum", "dq", "dk", "dv", "dbias")
    values = (*reference.forward(*x.op), *reference.backward(x.grad_out, *x.op))
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def check(x: Inputs) -> dict[str, Tensor]:
    """Exact for float64; within the budget of eager in the same dtype for others."""
    actual, exact = run(x), define(x.to(torch.float64))
    if x.q.dtype == torch.float64:
        for name, value in exact.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-12, atol=1e-12, equal_nan=True, msg=name)
        return actual
    eager, in_float32 = define(x), define(x.to(torch.float32))
    for name, value in exact.items():
        # The statistics are float32 whatever q is. The vectorised exp is good to 20 units in the last place.
        is_statistic = name.startswith("row_")
        # The others are sums in float32, whose order differs from machine to machine.
        summed = max(x.q.shape[2], x.k.shape[2]) ** 0.5 * torch.finfo(torch.float32).eps / 2
        floor = (2.5e-6 if is_statistic else summed) * value[value.isfinite()].abs().max().item()
        by_definition = in_float32[name] if is_statistic else eager[name]
        assert_within_budget(actual[name], by_definition, value, name=name, floor=floor)
    return actual


def stored(t: Tensor, *order: int) -> Tensor:
    """The same values, stored with the axes in this order."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return t.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_term_first", [False, True], ids=["term first", "bias first"])
@pytest.mark.parametrize("key_term", KEY_TERMS)
@pytest.mark.parametrize(("I", "J", "D"), [(1, 1, 16), (17, 17, 8), (17, 40, 33), (64, 1, 32), (100, 100, 130)])
def test_agrees_with_reference(dtype, I, J, D, key_term, key_term_first):
    x = random_inputs(2, 3, I, J, 2, D, dtype=dtype, key_term=key_term, key_term_first=key_term_first)
    actual = check(x)
    assert all(t.is_contiguous() for t in actual.values())
    assert {actual[name].dtype for name in ("out", "dq", "dk", "dv", "dbias")} == {dtype}
    assert actual["row_max"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "R", "H"),
    [(1, 7, 2), (2, 7, 3), (3, 1, 2), (5, 2, 2), (1, 1, 6), (1, 1, 7)],
    ids=lambda size: str(size),
)
@pytest.mark.parametrize("matrices_in_chunk", [0.5, 1, 3, 4, 100])
def test_chunk_boundaries(monkeypatch, dtype, matrices_in_chunk, B, R, H):
    itemsize = 8 if dtype == torch.float64 else 4
    monkeypatch.setattr(cpu, "CHUNK_BYTES", int(matrices_in_chunk * 12 * 9 * itemsize))
    check(random_inputs(B, R, 12, 9, H, 8, dtype=dtype, key_term="mask"))
    check(random_inputs(B, R, 12, 9, H, 8, dtype=dtype, key_term="additive", key_term_first=True))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("layout", ["heads first", "ending node", "channels first", "expanded", "sliced"])
def test_any_strides(dtype, layout):
    x = random_inputs(2, 5, 16, 16, 2, 8, dtype=dtype, key_term="mask")
    names = ("q", "k", "v", "grad_out")
    if layout == "expanded":
        x = replace(x, **{name: getattr(x, name)[:, :1].expand(-1, 5, -1, -1, -1) for name in names})
        x = replace(x, bias=x.bias[:, :1].expand(-1, 2, -1, -1), key_mask=x.key_mask[:, :1].expand(-1, 5, -1))
    elif layout == "sliced":
        x = replace(x, **{name: getattr(x, name).repeat_interleave(2, -1)[..., ::2] for name in names})
    else:
        order = {
            "heads first": (0, 3, 1, 2, 4),
            "ending node": (0, 2, 1, 3, 4),
            "channels first": (0, 3, 4, 1, 2),
        }
        x = replace(x, **{name: stored(getattr(x, name), *order[layout]) for name in names})
        x = replace(x, bias=stored(x.bias, 0, 2, 3, 1))
    check(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_is_optional_and_has_a_dtype_of_its_own(dtype):
    x = random_inputs(dtype=dtype, has_bias=False)
    assert run(x)["dbias"].shape == (0,)
    check(x)
    x = random_inputs(dtype=dtype)
    assert run(x, needs_dbias=False)["dbias"].shape == (0,)
    assert run(x, needs_dbias=False)["dbias"].dtype == dtype
    in_float32 = replace(x, bias=x.bias.float())
    assert run(in_float32)["dbias"].dtype == torch.float32
    torch.testing.assert_close(run(in_float32)["out"], run(x)["out"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("key_term_first", [False, True])
@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9, 0.0, float("-inf")])
def test_wholly_masked_row(dtype, fill, key_term_first):
    x = random_inputs(R=3, I=5, J=17, D=8, dtype=dtype, key_term="mask", key_term_first=key_term_first)
    x.key_mask[0, 1] = True
    x = replace(x, fill=fill)
    # Measured in the same dtype: at -1e9 a bias added later is kept by float64 and rounded away by float32.
    actual, expected = run(x), define(x)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
    assert (actual["dq"][0, 1] == 0).all()
    if fill == float("-inf"):
        assert actual["out"][0, 1].isnan().all()
        assert (actual["row_sum"][0, 1] == 0).all()


@pytest.mark.parametrize("amount", [-1e9, float("-inf")])
@pytest.mark.parametrize("key_term_first", [False, True])
def test_row_wholly_left_out_by_an_additive_term(key_term_first, amount):
    x = random_inputs(R=3, I=5, J=17, D=8, key_term="additive", key_term_first=key_term_first)
    x.key_bias[x.key_bias != 0] = amount
    x.key_bias[0, 1] = amount
    actual, expected = run(x), define(x)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_term_first", [False, True])
def test_adds_keep_their_order(dtype, key_term_first):
    """At -1e9 a float32 is a multiple of 64: 20 + 30 - 1e9 differs from 20 - 1e9 + 30."""
    x = random_inputs(R=3, I=9, J=17, D=8, dtype=dtype, key_term="additive", key_term_first=key_term_first)
    x.key_bias[:] = -1e9
    # Whole numbers, so that every sum but the one with the key term is exact.
    x = replace(x, q=(x.q * 2).round(), k=(x.k * 2).round(), bias=(x.bias * 20).round(), scale=1.0)
    out = run(x)["out"]
    in_float32 = reference.forward(*x.to(torch.float32).op)[0]
    torch.testing.assert_close(out, in_float32.to(dtype), rtol=torch.finfo(dtype).eps * 4, atol=1e-6)


@pytest.mark.parametrize("left_out", [float("nan"), float("inf"), float("-inf")])
def test_select_hides_whatever_the_logit_was(left_out):
    x = random_inputs(R=3, I=5, J=17, D=8, key_term="mask")
    x.key_mask[0, :, 3] = True
    x.bias[0, :, :, 3] = left_out
    out = run(x)["out"]
    assert out.isfinite().all()
    torch.testing.assert_close(out, reference.forward(*x.op)[0])


def test_minus_infinity_in_the_bias():
    x = random_inputs(R=3, I=5, J=17, D=8)
    x.bias[0, 0, 2, 4:] = float("-inf")
    check(x)
    x.bias[0, 0, 2] = float("-inf")
    check(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axis", ["B", "R", "I", "J", "H"])
def test_empty(dtype, axis):
    x = random_inputs(**{"B": 2, "R": 3, "I": 4, "J": 5, "H": 2, axis: 0}, dtype=dtype)
    actual = run(x)
    assert all((actual[name] == 0).all() for name in ("out", "dq", "dk", "dv", "dbias"))
    assert actual["dbias"].shape == x.bias.shape
    assert [actual[name].shape for name in ("dq", "dk", "dv")] == [x.q.shape, x.k.shape, x.v.shape]
    if axis == "J":
        assert (actual["row_sum"] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_autocast_around_it_changes_nothing(dtype):
    x = random_inputs(I=17, J=17, dtype=dtype, key_term="additive")
    outside = run(x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(x)
    for name, value in outside.items():
        torch.testing.assert_close(inside[name], value, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest storage that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, (tuple, list)) else (result,)
        for t in tensors:
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.itemsize)
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key_term", KEY_TERMS)
def test_memory_grows_with_n_squared(monkeypatch, dtype, key_term):
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1 << 12)
    B, N, H, D = 2, 40, 2, 4
    x = random_inputs(B, N, N, N, H, D, dtype=dtype, key_term=key_term)
    x = replace(x, q=stored(x.q, 0, 2, 1, 3, 4), bias=stored(x.bias, 0, 3, 1, 2))
    with LargestTensor() as seen:
        run(x)
    assert 0 < seen.elements <= B * N * N * H * D
    assert B * N * N * H * D < B * N * H * N * N // 5
