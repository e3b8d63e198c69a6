"""Cases and fixtures that the kernels' tests share.

The kernels run on a CUDA device, or on the CPU in a process started with TRITON_INTERPRET=1: the variable is
read when a kernel is decorated, so `test_interpreter.py` starts such a process.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from trifast_inductor.kernels.triangle_attention import memory
from trifast_inductor.testing import KEY_TERMS, Inputs, random_inputs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _patch_once_for_a_module() -> None:
    """What a function that a kernel calls needs of triton.language.

    Triton looks all of it up again at every call, which takes more than a third of the time of these tests.
    """
    from triton.runtime import interpreter

    patched = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if INTERPRETED:
    _patch_once_for_a_module()


def skip_off_hopper(device: str = "cuda") -> None:
    """Of a test on a GPU; on the CPU, if the test runs there, the interpreter stands in for it."""
    if device == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("needs a Hopper GPU")


def _in_nan(t: Tensor) -> Tensor:
    """The same values at an odd offset among NaN, strided in every axis: a read too far shows."""
    around = torch.full([2 * n + 3 for n in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    inner = around[tuple(slice(1, 2 * n + 1, 2) for n in t.shape)]
    return inner.copy_(t)


def _stored(t: Tensor, *order: int) -> Tensor:
    """The same values, stored with the axes in this order."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return t.permute(order).contiguous().permute(inverse)


def _each(change: Callable[[Tensor], Tensor]) -> Callable[[Inputs], Inputs]:
    return lambda x: replace(x, q=change(x.q), k=change(x.k), v=change(x.v), grad_out=change(x.grad_out))


def _all_in_nan(x: Inputs) -> Inputs:
    moved = _each(_in_nan)(x)
    bias = None if x.bias is None else _in_nan(x.bias)
    return replace(moved, bias=bias, key_bias=None if x.key_bias is None else _in_nan(x.key_bias))


def _unaligned(t: Tensor) -> Tensor:
    """The same values, dense, one element after a boundary of 16 bytes."""
    dense = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return dense[1:].view(t.shape).copy_(t)


def _of_one_projection(x: Inputs) -> Inputs:
    """q next to what else one Linear gives, and so for k and v: slices with an offset."""

    def sliced(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape[:3], 3, *t.shape[3:]), float("nan"), dtype=t.dtype, device=t.device)
        return wide[:, :, :, 1].copy_(t)

    return _each(sliced)(x)


def _expanded(x: Inputs) -> Inputs:
    """Keys and key term shared by all rows, one gradient for all: strides of 0."""

    def over_rows(t: Tensor | None) -> Any:
        return None if t is None else t[:, :1].expand(t.shape)

    shared = {name: over_rows(getattr(x, name)) for name in ("k", "v", "key_bias", "key_mask")}
    return replace(x, **shared, grad_out=x.grad_out.flatten()[0].expand(x.grad_out.shape))


def _bias_heads_last(x: Inputs) -> Inputs:
    return replace(x, bias=None if x.bias is None else _stored(x.bias, 0, 2, 3, 1))


LAYOUTS: dict[str, Callable[[Inputs], Inputs]] = {
    "contiguous": lambda x: x,
    "heads first": _each(lambda t: _stored(t, 0, 3, 1, 2, 4)),
    "ending node": lambda x: _bias_heads_last(_each(lambda t: _stored(t, 0, 2, 1, 3, 4))(x)),
    "channels first": _each(lambda t: _stored(t, 0, 3, 4, 1, 2)),
    "expanded": _expanded,
    "in NaN": _all_in_nan,
    "unaligned": _each(_unaligned),
    "sliced": _of_one_projection,
}


@dataclass(frozen=True)
class Case:
    dtype: str
    N: int
    D: int
    key_term: str
    layout: str
    key_term_first: bool = False
    longer: int = 0  # J - I
    has_bias: bool = True
    R: int = 3

    def __str__(self) -> str:
        order = "first" if self.key_term_first else "last"
        bias = "" if self.has_bias else "-no bias"
        size = f"N{self.N}" + (f"+{self.longer}" if self.longer else "")
        return f"{self.dtype}-{size}-D{self.D}-{self.key_term} {order}-{self.layout}{bias}"

    def inputs(self, device: str) -> Inputs:
        drawn = random_inputs(
            B=2,
            R=self.R,
            I=self.N,
            J=self.N + self.longer,
            H=2,
            D=self.D,
            dtype=DTYPES[self.dtype],
            device=device,
            key_term=self.key_term,
            key_term_first=self.key_term_first,
            has_bias=self.has_bias,
        )
        return LAYOUTS[self.layout](drawn)


# Few enough for the interpreter, which takes a second or two for each, and with few rows for the same reason.
SMALL = [
    replace(case, R=2)
    for case in (
        *(Case("float32", 17, 8, term, "contiguous", first) for term in KEY_TERMS for first in (False, True)),
        *(Case("float32", 17, 24, "mask", layout, longer=3) for layout in LAYOUTS),
        *(Case(dtype, 20, 32, term, "heads first") for dtype in ("bfloat16", "float16") for term in KEY_TERMS),
        Case("float32", 1, 16, "none", "contiguous"),
        Case("float32", 1, 16, "mask", "contiguous", longer=39),
        Case("bfloat16", 40, 8, "additive", "ending node", longer=-23),
        Case("float32", 17, 16, "mask", "contiguous", has_bias=False),
        Case("bfloat16", 9, 128, "none", "in NaN"),
    )
]


def _full_grid() -> list[Case]:
    """Every dtype, length, head size and key term; layout, order and lengths drawn for each, always alike."""
    draw = random.Random(0)
    grid = [
        Case(dtype, N, D, term, draw.choice(list(LAYOUTS)), draw.random() < 0.5, draw.choice((0, 0, 7)))
        for dtype in DTYPES
        for N in (1, 17, 64, 100, 257)
        for D in (8, 16, 24, 32, 64, 96, 128)
        for term in KEY_TERMS
    ]
    strides = [
        Case("bfloat16", 100, 32, term, layout, first, has_bias=has_bias)
        for term in KEY_TERMS
        for layout in LAYOUTS
        for first in (False, True)
        for has_bias in (False, True)
    ]
    return [*grid, *strides, Case("bfloat16", 100, 32, "mask", "contiguous", R=70)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        full = [pytest.param(case, marks=pytest.mark.gpu, id=str(case)) for case in _full_grid()]
        metafunc.parametrize("case", [pytest.param(case, id=f"small-{case}") for case in SMALL] + full)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels run; skips where they cannot."""
    if INTERPRETED:
        if request.node.get_closest_marker("gpu"):
            pytest.skip("needs a CUDA device")
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; test_interpreter.py runs the small cases without one")
    return "cuda"


@pytest.fixture
def near_inputs(device: str) -> Inputs:
    """Small operands."""
    return random_inputs(B=1, R=2, I=70, J=70, H=2, D=16, dtype=torch.bfloat16, device=device)


@pytest.fixture
def far_inputs(near_inputs: Inputs, device: str) -> Inputs:
    """The same, spread over one buffer along various axes, so that offsets pass 2**31 elements."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free memory")
    x = near_inputs
    storage = torch.zeros(2**32 + 2**29, dtype=torch.bfloat16, device=device)

    def placed(t: Tensor | None, offset: int, axis: int, stride: int) -> Tensor:
        assert t is not None
        strides = [stride if n == axis else s for n, s in enumerate(t.stride())]
        return torch.as_strided(storage, t.shape, strides, offset).copy_(t)

    return replace(
        x,
        q=placed(x.q, 0, 2, 3 * 2**24),
        k=placed(x.k, 2**20, 1, 2**32),
        v=placed(x.v, 2**21, 3, 2**32),
        grad_out=placed(x.grad_out, 2**22, 2, 3 * 2**24),
        bias=placed(x.bias, 2**23, 3, 3 * 2**24),
    )


@pytest.fixture(autouse=True)
def empty_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated is NaN: what a kernel leaves unwritten, or reads before it is written, shows."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def nan_filled(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            # Out of sight of a tape, to which it would be something that the call computes.
            with torch.no_grad(), _disable_current_modes():
                if t.dtype == torch.uint8:  # bytes of anything
                    return t.fill_(255)
                return t.fill_(float("nan")) if t.is_floating_point() else t

        return nan_filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    maker = memory.maker
    monkeypatch.setattr(memory, "maker", lambda *given: filled(maker(*given)))
