"""Masks that cover a row, a batch, all or exactly a tile, at lengths around a tile's: as the definition has them."""

from dataclasses import replace

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import op, reference
from trifast_inductor.testing import random_inputs

from .conftest import DTYPES
from .covering import covering_array

TILES = (16, 32, 64, 128)
AXES = {
    "N": (15, 16, 17, 33, 63, 64, 65, 127, 129),
    "covers": ("one row", "all rows", "a batch", "the first tile", "all but the last tile", "the last tile"),
    "term": ("additive", "additive -inf", "fill", "fill -inf"),
    "key_term_first": (False, True),
    "dtype": ("float32", "bfloat16", "float16"),
    "bias": (True, False),
}
# bfloat16 is cut off by the interpreter, not rounded.
SMALL = covering_array(AXES | {"N": (15, 16, 17, 33), "dtype": ("float32", "float16")}, 2)
FULL = covering_array(AXES, 2)


def cut(covers: str, B: int, R: int, N: int) -> torch.Tensor:
    """[B, R, N], True where a key is left out; a tile is the longest that fits."""
    tile = max((size for size in TILES if size <= N), default=N)
    lost = torch.zeros(B, R, N, dtype=torch.bool)
    places = {
        "one row": (0, 1),
        "all rows": (slice(None),),
        "a batch": (1,),
        "the first tile": (slice(None), slice(1, None), slice(0, tile)),
        "all but the last tile": (slice(None), slice(1, None), slice(0, (N - 1) // tile * tile)),
        "the last tile": (slice(None), slice(1, None), slice((N - 1) // tile * tile, None)),
    }
    lost[places[covers]] = True
    return lost


def _named(cases: list[dict], *marks: pytest.MarkDecorator) -> list:
    return [pytest.param(case, marks=marks, id="-".join(map(str, case.values()))) for case in cases]


@pytest.mark.parametrize("point", _named(SMALL) + _named(FULL, pytest.mark.gpu))
def test_as_the_definition(point, device):
    dtype, N = DTYPES[point["dtype"]], point["N"]
    x = random_inputs(B=2, R=2, I=5, J=N, H=2, D=16, dtype=dtype, device=device, has_bias=point["bias"])
    lost = cut(point["covers"], 2, 2, N).to(device)
    if point["term"].startswith("additive"):
        amount = float("-inf") if point["term"].endswith("inf") else max(-1e9, torch.finfo(dtype).min)
        x = replace(x, key_bias=torch.where(lost, amount, 0.0).to(dtype))
    else:
        fill = float("-inf") if point["term"].endswith("inf") else torch.finfo(torch.float32).min
        x = replace(x, key_mask=lost, fill=fill)
    x = replace(x, key_term_first=point["key_term_first"])

    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.bias) if t is not None]
    out = op.triangle_attention(*leaves, *((None,) if x.bias is None else ()), *x.op[4:])[0]
    ours = (out, *torch.autograd.grad(out, leaves, x.grad_out))
    # In float32: at -1e9 float64 would keep a bias that float32 rounds away.
    in_float32 = x.to(torch.float32)
    defined = (reference.forward(*in_float32.op)[0], *reference.backward(in_float32.grad_out, *in_float32.op))
    rtol = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}[point["dtype"]]
    for name, got, want in zip(("out", "dq", "dk", "dv", "dbias"), ours, defined, strict=False):
        torch.testing.assert_close(
            got.float(), want, rtol=rtol, atol=rtol, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    if point["covers"] in ("one row", "all rows", "a batch") and point["term"].startswith("fill"):
        masked = lost.all(-1)
        assert masked.any()
        assert (ours[1][masked] == 0).all(), "a select lets no gradient through to the queries"
