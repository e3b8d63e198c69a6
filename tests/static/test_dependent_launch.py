"""Kernels that may be launched before the one before has ended wait for it, before they touch memory."""

import re

import pytest
import torch

from trifast_inductor.testing import random_inputs

pytest.importorskip("triton")
from trifast_inductor.kernels.triangle_attention import backward, forward
from trifast_inductor.static.recording import launches_for

TOUCHED = re.compile(r"ld\.global|st\.global|cp\.async")
NAMES = {
    "triangle_attention_bias_rows",
    "triangle_attention_fwd",
    "triangle_attention_bwd_dq",
    "triangle_attention_bwd_dkdv",
    "triangle_attention_bwd_dbias",
    "triangle_attention_bwd_together",
    "triangle_attention_bwd_sum",
}


def launches(target: str):
    with launches_for(target) as recorded:
        for dtype, N in ((torch.bfloat16, 60), (torch.bfloat16, 100), (torch.float32, 100)):
            x = random_inputs(R=N, I=N, J=N, H=4, D=16, dtype=dtype)
            saved = forward.portable(*x.op)
            for run in (backward.portable, backward.launch):
                run(x.grad_out, *x.op[:6], *saved, *x.op[6:], True)
    of_hopper = {"triangle_attention_bwd_whole"} if target == "sm_90" else set()
    assert {launch.name for launch in recorded} == NAMES | of_hopper
    return recorded


def test_on_hopper_and_later() -> None:
    for launch in launches("sm_90"):
        ptx = launch.compiled.asm["ptx"]
        assert launch.compiled.metadata.launch_pdl, launch.name
        assert ptx.count("griddepcontrol.wait") == 1, launch.name
        assert ptx.index("griddepcontrol.wait") < TOUCHED.search(ptx).start(), launch.name


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_not_elsewhere(target: str) -> None:
    for launch in launches(target):
        assert not getattr(launch.compiled.metadata, "launch_pdl", False), launch.name
        assert not any("griddepcontrol" in text for text in launch.compiled.asm.values() if isinstance(text, str))
