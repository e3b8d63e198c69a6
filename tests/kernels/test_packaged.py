"""The op that packages are made of; that they run is tested in tests/graphs/test_export.py, on a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from trifast_inductor.kernels.triangle_attention import op
from trifast_inductor.testing import KEY_TERMS, random_inputs

pytest.importorskip("triton")

N = 20  # not a multiple of 16


def symbolic(fake_mode: FakeTensorMode, value):
    """The argument with every axis of length N of unknown length."""
    if not isinstance(value, torch.Tensor):
        return value
    sizes = [DimDynamic.DYNAMIC if size == N else DimDynamic.STATIC for size in value.shape]
    return fake_mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


@pytest.mark.parametrize("key_term", KEY_TERMS)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_nothing_is_assumed_of_a_dynamic_size(key_term, has_bias, monkeypatch):
    """An assumption made here would never be checked by the package, which then would be wrong at other sizes."""
    from trifast_inductor.kernels.triangle_attention import arguments as kernel_arguments
    from trifast_inductor.kernels.triangle_attention import packaged

    monkeypatch.setattr(kernel_arguments, "_has_tf32", lambda: True)  # which asks the driver of a GPU
    fake_mode = FakeTensorMode(shape_env=ShapeEnv())
    x = random_inputs(R=N, I=N, J=N, H=4, key_term=key_term, has_bias=has_bias)
    arguments = [symbolic(fake_mode, value) for value in x.op]
    with fake_mode:
        expected = op.triangle_attention(*arguments)
        asked = len(fake_mode.shape_env.guards)  # what the shapes of the arguments have to agree on
        results = packaged.triangle_attention(*arguments)
    for result, wanted in zip(results, expected, strict=True):
        assert (result.shape, result.stride(), result.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
    assert [str(guard.expr) for guard in fake_mode.shape_env.guards[asked:]] == []
