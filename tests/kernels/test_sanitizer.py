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


def test_on_hopper_its_kernels_are_launched_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    portable = sanitizer.cases()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    both = sanitizer.cases()
    assert {case.func for case in portable} == {sanitizer._launch}
    of_hopper = {sanitizer._launch_in_one_pass, sanitizer._launch_on_hopper}
    assert {case.func for case in both[len(portable) :]} == of_hopper
    assert all({case.args[4] for case in some} == set(KEY_TERMS) for some in (portable, both[len(portable) :]))


ENDED = "48 cases, forward and backward, on NVIDIA H200\n"
CLEAN = ENDED + "========= ERROR SUMMARY: 0 errors\n"
RACES = ENDED + "{0}========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
RACE = """========= Error: Race reported between Write access at {0}+0x10 in dq.py:{1}
=========     and Read access at {0}+0x20 in dq.py:{2} [8 hazards]
"""


@pytest.mark.parametrize(
    ("report", "expected", "said"),
    [
        ("case 1 ended\n" + CLEAN, 0, CLEAN),
        ("Invalid read\n" + CLEAN.replace("0 errors", "10 errors"), 1, "Invalid read"),
        ("Segmentation fault\n========= ERROR SUMMARY: 0 errors\n", 1, "Segmentation fault"),
        (ENDED, 1, ENDED),
    ],
)
def test_an_error_or_a_case_that_did_not_end_fails(report, expected, said, capsys):
    assert sanitizer.judged("memcheck", report) == expected
    assert said in capsys.readouterr().out


def test_races_are_ours_unless_triton_makes_them(capsys):
    assert sanitizer.judged("racecheck", RACES.format("")) == 0
    assert sanitizer.judged("racecheck", RACES.format(RACE.format("some_kernel", 70, 71))) == 1
    assert "1 other races" in capsys.readouterr().out
    line = min(sanitizer._lines_of_dispatch("_triangle_attention_fwd_hopper"))
    handed_over = RACE.format("_triangle_attention_fwd_hopper", line, line)
    assert sanitizer.judged("racecheck", RACES.format(handed_over)) == 0
    assert "1 reports set apart" in capsys.readouterr().out


def test_races_are_ours_unless_lines_say_that_a_partition_hands_over(capsys):
    kernel, file = "_triangle_attention_bwd_whole_by_key_hopper", "whole_by_key.py"
    store, *others = sorted(n for name, n in sanitizer._places_handed_over() if name == file)
    race = RACE.replace("dq.py", file)
    assert sanitizer.judged("racecheck", RACES.format(race.format(kernel, store, others[0]))) == 0
    assert "1 reports set apart: a partition hands over" in capsys.readouterr().out
    assert sanitizer.judged("racecheck", RACES.format(race.format(kernel, store, store + 20))) == 1
    # The same lines of another file.
    assert sanitizer.judged("racecheck", RACES.format(RACE.format(kernel, store, others[0]))) == 1
