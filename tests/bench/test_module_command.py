"""Whole modules: the rows and the table; `eager` stands in for the compilers, which take a minute each here."""

from pathlib import Path

import pytest

from trifast_inductor import tables
from trifast_inductor.__main__ import main
from trifast_inductor.bench import module_command
from trifast_inductor.bench.module_command import ModuleRow, Variant, module_tables


def test_results_land_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins = [Variant("inductor", "eager"), Variant("trifast", "eager")]
    monkeypatch.setattr(module_command, "variants", lambda wanted, device: stand_ins)
    options = ["--n", "6", "--dtype", "float32", "--seconds", "0.001", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["bench", "--module", *options]) == 0
    _, rows = tables.read_csv(tmp_path / "modules.csv", ModuleRow)
    assert [(row.model, row.variant) for row in rows] == [
        ("triangle attention", "inductor"),
        ("triangle attention", "trifast"),
        ("pairformer block", "inductor"),
        ("pairformer block", "trifast"),
    ]
    assert all(row.note == "" and row.step_call_ms is not None for row in rows)
    assert [row.difference for row in rows] == [None, 0.0, None, 0.0]
    assert "### modules, B=1 H=4 D=32 float32" in (tmp_path / "modules.md").read_text()


def test_some_models_and_variants_will_do(tmp_path: Path) -> None:
    options = ["--n", "4,6", "--models", "pairformer block", "--variants", "trifast"]
    cpu = ["--dtype", "float32", "--device", "cpu", "--budget", "0", "--out", str(tmp_path)]
    assert main(["bench", "--module", *options, *cpu]) == 0
    _, rows = tables.read_csv(tmp_path / "modules.csv", ModuleRow)
    assert [(row.model, row.variant, row.N) for row in rows] == [("pairformer block", "trifast", N) for N in (4, 6)]
    assert "not run: the time budget is spent" in (tmp_path / "modules.md").read_text()


def test_gains_are_over_plain_inductor_at_the_same_size() -> None:
    same = {"model": "m", "B": 1, "H": 4, "D": 32, "N": 8, "dtype": "bfloat16"}
    rows = [
        ModuleRow(variant="inductor", forward_device_ms=4.0, **same),
        ModuleRow(variant="trifast", forward_device_ms=1.0, note="error: late", **same),
    ]
    cells = [cell.strip() for cell in module_tables(rows).splitlines()[-1].split("|")]
    assert cells[4:6] == ["1", "4.00"]
    assert cells[-2] == "error: late"
