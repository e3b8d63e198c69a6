"""What compute-sanitizer is run on: numbers that eager gives a finite result for, so that one that is not is ours."""

import pytest
import torch

from trifast_inductor.kernels.triangle_attention import op
from trifast_inductor.testing import KEY_TERMS, results

from . import sanitizer


@pytest.mark.parametrize("key_term", KEY_TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eager_gives_finite_numbers(dtype, key_term):
    x = sanitizer.inputs(dtype, 33, 40, 16, key_term)
    found = results(lambda *arguments: op.triangle_attention(*arguments)[0], x)
    assert all(t.isfinite().all() for t in found.values())
    if x.key_bias is not None:
        assert (x.key_bias[:, 1] == -1e9).all()
