"""A few random attention-like modules with every run of the suite; `make fuzz` draws ten thousand."""

import pytest

from . import fuzz


@pytest.mark.parametrize("seed", range(4))
def test_random_modules_are_never_wrong_and_valid_ones_are_rewritten(seed: int) -> None:
    counts, failures = fuzz.run(examples=5, seed=seed)
    assert not failures, "\n".join(failures)
    assert counts["rewritten"] > 0
