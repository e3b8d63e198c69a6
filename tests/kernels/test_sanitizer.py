"""What compute-sanitizer is run on and how its reports are read.

The numbers are such that eager gives a finite result, so that one that is not is ours.
"""

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


def test_parts_make_the_whole(monkeypatch):
    ran = []
    monkeypatch.setattr(sanitizer, "_launch", lambda *case: ran.append(case))
    monkeypatch.setattr(sanitizer, "_let_any_size_through", lambda: None)
    monkeypatch.setattr(sanitizer.choice, "gluon_refusal", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    counts = [sanitizer.launches(part, 5) for part in range(5)]
    in_parts = sorted(map(str, ran))
    ran.clear()
    assert sum(counts) == sanitizer.launches() == len(ran)
    assert in_parts == sorted(map(str, ran))
    assert {case[4] for case in ran} == set(KEY_TERMS)


CASES = "24 cases, forward and backward, on NVIDIA H200\n"
CLEAN = CASES + "========= ERROR SUMMARY: 0 errors\n"
RACE = """========= Error: Race reported between Write access at {0}+0x10 in dq.py:{1}
=========     and Read access at {0}+0x20 in dq.py:{2} [8 hazards]
"""


@pytest.mark.parametrize(
    ("reports", "expected", "said"),
    [
        ([CLEAN, CLEAN], 0, "48 cases, forward and backward, on NVIDIA H200\n========= ERROR SUMMARY: 0 errors"),
        ([CLEAN, CASES + "Invalid read\n========= ERROR SUMMARY: 3 errors\n"], 1, "ERROR SUMMARY: 3 errors"),
        ([CLEAN, "Segmentation fault\n"], 1, "Segmentation fault"),
        ([CLEAN, "========= ERROR SUMMARY: 0 errors\n"], 1, "24 cases"),
    ],
)
def test_an_error_or_a_process_that_did_not_end_fails(reports, expected, said, capsys):
    assert sanitizer.judged("memcheck", reports) == expected
    assert said in capsys.readouterr().out


def test_races_are_ours_unless_triton_makes_them(capsys):
    summary = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
    assert sanitizer.judged("racecheck", [CASES + summary]) == 0
    assert sanitizer.judged("racecheck", [CASES + RACE.format("some_kernel", 70, 71) + summary]) == 1
    assert "1 other races" in capsys.readouterr().out
    line = min(sanitizer._lines_of_dispatch("_triangle_attention_fwd_hopper"))
    handed_over = RACE.format("_triangle_attention_fwd_hopper", line, line)
    assert sanitizer.judged("racecheck", [CASES + handed_over + summary]) == 0
    assert "1 reports set apart" in capsys.readouterr().out
