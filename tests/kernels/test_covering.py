"""The generator of cases: complete, small, always alike."""

import itertools

import pytest

from .covering import covering_array

AXES = {"a": (0, 1, 2, 3), "b": "xyz", "c": (None, True), "d": (1.0, 2.0, 3.0)}


@pytest.mark.parametrize("strength", [1, 2, 3, 4])
def test_every_combination_is_in_some_case(strength: int) -> None:
    cases = covering_array(AXES, strength)
    for names in itertools.combinations(AXES, strength):
        met = {tuple(case[name] for name in names) for case in cases}
        assert met == set(itertools.product(*(AXES[name] for name in names)))


def test_there_are_few_cases_and_always_the_same() -> None:
    cases = covering_array(AXES, 2)
    assert 12 <= len(cases) <= 15  # 4 times 3 at least, of 72
    assert cases == covering_array(dict(AXES), 2)
    assert cases != covering_array(AXES, 2, seed=1)
    assert len(covering_array(AXES, 4)) == 72
