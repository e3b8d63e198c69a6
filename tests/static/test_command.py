"""The command, its table and its file; one small compilation shows that the launchers are really recorded."""

from pathlib import Path

import pytest

from trifast_inductor import tables
from trifast_inductor.__main__ import main
from trifast_inductor.static import command
from trifast_inductor.static.checked import SPILLING
from trifast_inductor.static.figures import Figures, Variant, triton_version

ROW = Figures("3.9", "sm_90", "kernel", "bfloat16", 32, 512, "add", True, "64x32 w4 s3", 100, 0, 0, 36.0, 16.0)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Figures]:
    """What compiling gives, here without compiling."""
    rows = [ROW]
    monkeypatch.setattr(command, "figures", lambda variant, arch: rows)
    return rows


def test_one_kernel_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    """The narrowest tile: seconds, not minutes."""
    pytest.importorskip("triton")
    assert main(["inspect", "--n", "16", "--d", "16", "--key-term", "none", "--bias", "no"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == [
        "triangle_attention_fwd",
        "triangle_attention_bwd_whole",
    ]
    assert lines[2].split("|")[8].strip().startswith("16x16")
    assert int(lines[2].split("|")[9]) > 16


def test_a_spill_or_a_kernel_that_does_not_fit_fails(rows: list[Figures], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect"]) == 0
    rows[0] = Figures(**{**vars(ROW), "spills": 4, "kernel": next(iter(SPILLING))})
    assert main(["inspect"]) == 0
    rows[0] = Figures(**{**vars(ROW), "spills": 4, "shared_kib": 300.0})
    assert main(["inspect"]) == 1
    assert "spills does not fit" in capsys.readouterr().out


def test_interpreted_kernels_cannot_be_inspected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["inspect"]) == 2
    assert "unset it" in capsys.readouterr().err


def test_an_update_keeps_the_rows_of_other_versions(rows: list[Figures], tmp_path: Path) -> None:
    path = tmp_path / "static.csv"
    rows[0] = Figures(**{**vars(ROW), "triton": "2.0"})
    main(["inspect", "--update", str(path)])
    rows[0] = Figures(**{**vars(ROW), "triton": triton_version()})
    main(["inspect", "--update", str(path)])
    main(["inspect", "--update", str(path)])
    _, kept = tables.read_csv(path, Figures)
    assert {row.triton for row in kept} == {"2.0", triton_version()}
    assert sum(row.triton == "2.0" for row in kept) == len(command.checked_variants())


def test_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Variant, str]] = []
    monkeypatch.setattr(command, "figures", lambda variant, arch: asked.append((variant, arch)) or [])
    main(["inspect", "--arch", "sm_80,gfx942", "--dtype", "all", "--key-term", "all", "--bias", "both", "--d", "16,32"])
    assert len(set(asked)) == len(asked) == 2 * 4 * 3 * 2 * 2


@pytest.mark.parametrize("wrong", [["--arch", "sm_75"], ["--dtype", "int8"], ["--d", "x"], ["--key-term", "maybe"]])
def test_bad_options_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *wrong])
    assert stop.value.code == 2
