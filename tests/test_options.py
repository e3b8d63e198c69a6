"""Lists on command lines."""

import argparse

import pytest

from trifast_inductor.options import integers, names


def test_lists() -> None:
    assert integers("64, 128") == [64, 128]
    assert names(["a", "b", "c"])("a,c") == ["a", "c"]
    assert names(["a", "b"])("all") == ["a", "b"]


@pytest.mark.parametrize("text", ["", "64,", "x", "0", "-1", "1.5"])
def test_what_is_no_positive_integer_is_told(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected positive integers with commas between"):
        integers(text)


def test_unknown_names_are_told_with_the_known_ones() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="c, d: known are a, b, and all"):
        names(["a", "b"])("a,c,d")
