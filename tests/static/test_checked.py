"""The kernels' static figures against the table in the repository.

A kernel that was changed on purpose: `python -m trifast_inductor inspect --update docs/benchmarks/static.csv`, then
read the diff.
"""

import dataclasses
from pathlib import Path

import pytest

from trifast_inductor import tables
from trifast_inductor.static.checked import SPILLING, checked_variants, faults
from trifast_inductor.static.figures import Figures, Variant, figures, triton_version

TABLE = Path(__file__).parents[2] / "docs" / "benchmarks" / "static.csv"
ROW = Figures("3.9", "sm_90", "k", "bfloat16", 32, 512, "add", True, "64x32 w4 s3", 100, 0, 0, 36.0, 16.0)


def known() -> dict[tuple[object, ...], Figures]:
    """Rows for the Triton that is installed."""
    return {row.key: row for row in tables.read_csv(TABLE, Figures)[1] if row.triton == triton_version()}


@pytest.mark.static
@pytest.mark.parametrize(("variant", "arch"), checked_variants(), ids=lambda x: str(x) if isinstance(x, str) else None)
def test_no_kernel_spills_or_grows(variant: Variant, arch: str) -> None:
    pytest.importorskip("triton")
    before = known()
    if not before:
        pytest.skip(f"no figures for Triton {triton_version()}: add them with inspect --update")
    rows = figures(variant, arch)
    assert rows
    missing = [row.kernel for row in rows if row.key not in before]
    assert not missing, f"not in {TABLE.name}: {missing}; inspect --update adds them"
    found = [f"{row.kernel} {row.tile}: {fault}" for row in rows for fault in faults(row, before[row.key])]
    assert not found, "\n".join(found)


@pytest.mark.static
def test_no_row_of_the_table_is_left_over() -> None:
    """Each belongs to a variant that is compiled; which kernels those have, the test above says."""
    wanted = {(arch, v.dtype, v.D, v.N, v.key_term, v.bias) for v, arch in checked_variants()}
    for row in known().values():
        assert (row.arch, row.dtype, row.D, row.N, row.key_term, row.bias) in wanted
        assert row.spills == 0 or row.kernel in SPILLING
        assert row.fits


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 2}, "spills 2 times, 0 before"),
        ({"registers": 109}, "109 registers, 100 before"),
        ({"shared_kib": 40.0}, "40 KiB of shared memory, 36 before"),
        ({"instructions_per_score": 17.0}, "17.0 instructions a score, 16.0 before"),
        ({"instructions_per_score": None}, "its hot loop was not found"),
        ({"arch": "sm_89", "shared_kib": 120.0}, "takes 120 KiB of shared memory, more than sm_89 has"),
    ],
)
def test_what_counts_as_worse(change: dict[str, object], fault: str) -> None:
    assert fault in faults(dataclasses.replace(ROW, **change), ROW)


@pytest.mark.parametrize(
    "change", [{}, {"registers": 108}, {"instructions_per_score": 16.4}, {"instructions_per_score": 9.0}]
)
def test_what_does_not(change: dict[str, object]) -> None:
    assert faults(dataclasses.replace(ROW, **change), ROW) == []
