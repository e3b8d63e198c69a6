"""The error budget over a grid that no list of cases could hold: any three axes in every combination on the CPU,
any two through the kernels, under the interpreter in small sizes and on a GPU in full."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trifast_inductor.kernels.triangle_attention import op
from trifast_inductor.testing import KEY_TERMS, Inputs, assert_attention_within_budget, random_inputs, results

from .conftest import DTYPES, INTERPRETED, LAYOUTS
from .covering import covering_array

AXES: dict[str, tuple[Any, ...]] = {
    "dtype": tuple(DTYPES),
    "N": (1, 2, 17, 31, 64, 100, 257, 384),
    "D": (8, 16, 24, 32, 64, 96, 128),
    "H": (1, 2, 4),
    "R": (1, 2, 3),
    "keys": ("as many", "more", "fewer"),
    "bias": ("none", "own", "over the batch", "float32", "large", "-inf"),
    "key_term": KEY_TERMS,
    "key_term_first": (False, True),
    "layout": tuple(LAYOUTS),
    "logits": ("normal", "sharp", "large"),
}
# The interpreter takes about a second for a case, and cuts bfloat16 off where a GPU rounds it.
SMALL_AXES = AXES | {
    "dtype": ("float32", "float16"),
    "N": (1, 2, 17),
    "D": (8, 24, 128),
    "H": (1, 2),
    "R": (1, 2),
    "bias": ("none", "own", "over the batch", "-inf"),
}
# Lengths beyond the grid, with what else a trunk has.
LONG = [
    {"N": N, "D": D, "dtype": dtype, "key_term": term, "layout": layout, "R": R}
    for N, D, dtype, term, layout, R in (
        (512, 32, "bfloat16", "additive", "contiguous", 3),
        (1000, 32, "float16", "mask", "ending node", 2),
        (1024, 64, "bfloat16", "mask", "heads first", 2),
        (1537, 32, "float32", "none", "sliced", 1),
        (2048, 32, "bfloat16", "additive", "ending node", 1),
        (2048, 128, "float16", "-inf mask", "unaligned", 1),
    )
]


@dataclass(frozen=True)
class Point:
    """One point of the grid."""

    dtype: str = "float32"
    N: int = 64
    D: int = 32
    H: int = 2
    R: int = 2
    keys: str = "as many"
    bias: str = "own"
    key_term: str = "none"
    key_term_first: bool = False
    layout: str = "contiguous"
    logits: str = "normal"

    def __str__(self) -> str:
        return "-".join(str(value) for value in vars(self).values())

    def inputs(self, device: str) -> Inputs:
        x = random_inputs(
            B=1 if self.N > 200 else 2,
            R=self.R,
            I=self.N,
            J={"as many": self.N, "more": self.N + 9, "fewer": (self.N + 1) // 2}[self.keys],
            H=self.H,
            D=self.D,
            dtype=DTYPES[self.dtype],
            device=device,
            key_term=self.key_term,
            key_term_first=self.key_term_first,
            has_bias=self.bias != "none",
            sharpness={"normal": 1.0, "sharp": 30.0, "large": 1000.0}[self.logits],
        )
        return LAYOUTS[self.layout](self._with_bias(x))

    def _with_bias(self, x: Inputs) -> Inputs:
        bias = x.bias
        if bias is None or self.bias == "own":
            return x
        if self.bias == "over the batch":
            bias = bias[:1].expand(bias.shape)
        elif self.bias == "float32":
            bias = bias.float() * 1.001  # not what the other dtypes hold
        elif self.bias == "large":
            bias = bias * 300
        else:
            cut = bias < -0.5
            cut[..., 0] = False  # the key that no mask takes, so that every query keeps one
            bias = bias.masked_fill(cut, float("-inf"))
        return replace(x, bias=bias)


def points(axes: dict[str, tuple[Any, ...]], strength: int) -> list[Any]:
    return [pytest.param(Point(**case), id=str(Point(**case))) for case in covering_array(axes, strength)]


def attend(*arguments: Any) -> Tensor:
    return op.triangle_attention(*arguments)[0]


def check(point: Point, device: str, *, rereads_output: bool) -> None:
    # Over one or two queries, eager is off by nothing or by much; twice that is no measure.
    times = 2.0 if point.N > 2 else 4.0
    assert_attention_within_budget(attend, point.inputs(device), times=times, rereads_output=rereads_output)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On sizes this small, several threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(INTERPRETED, reason="the process of the interpreter runs kernels only")
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_on_the_cpu(dtype: str, one_thread: None) -> None:
    """Any three axes; in one test, since there are hundreds of cases of some milliseconds."""
    checked = 0
    for param in points(AXES, 3):
        (point,) = param.values
        if point.dtype == dtype:
            try:
                check(point, "cpu", rereads_output=False)
            except AssertionError as error:
                raise AssertionError(f"{point}: {error}") from error
            checked += 1
    assert checked > 100


@pytest.mark.skipif(not INTERPRETED, reason="test_interpreter.py starts the process for these")
@pytest.mark.parametrize("point", points(SMALL_AXES, 2))
def test_under_the_interpreter(point: Point) -> None:
    check(point, "cpu", rereads_output=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "point", [*points(AXES, 2), *(pytest.param(Point(**case), id=f"long-{case}") for case in LONG)]
)
def test_on_a_gpu(point: Point, device: str) -> None:
    check(point, device, rereads_output=True)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_one_key_that_takes_all_has_no_gradient_to_the_products(dtype: str) -> None:
    """A weight of 1 among weights of 0: dp - δ cancels, and what is left is the rounding of two float32 sums."""
    device = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
    x = random_inputs(I=33, J=33, R=2, D=32, dtype=DTYPES[dtype], device=device, sharpness=1.0)
    x.k[:, :, 7] = 0.0
    bias = torch.zeros_like(x.bias)
    bias[..., 7] = 1000.0
    found = results(attend, replace(x, bias=bias))
    taken = x.v[:, :, 7:8].expand_as(found["out"])
    torch.testing.assert_close(found["out"], taken, rtol=torch.finfo(DTYPES[dtype]).eps, atol=0)
    # The sums of dp have 32 terms of order 1, in bfloat16 where the CPU multiplies in it.
    for name in ("dq", "dk", "dbias"):
        assert found[name].abs().max() <= 1e-4, name
    assert found["dv"][:, :, 7].abs().max() > 1
    assert (found["dv"][:, :, 8:] == 0).all()
