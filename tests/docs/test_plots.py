"""Plots drop into the pages from the folder where the bench leaves them; README's figures are those of its source."""

import re
import shutil
from pathlib import Path

import pytest

from trifast_inductor import tables
from trifast_inductor.bench.command import main
from trifast_inductor.bench.measure import Row

from . import plots


@pytest.mark.parametrize("page", plots.PAGES, ids=lambda page: str(page.relative_to(plots.CHECKOUT)))
def test_pages_are_up_to_date(page: Path) -> None:
    assert page.read_text(encoding="utf-8") == plots.update(page), "run make pages"


def test_what_the_bench_draws_drops_in(tmp_path: Path) -> None:
    """A run of the bench, put where a GPU's would lie."""
    out = tmp_path / "nvidia-h200"
    bench = [
        "--quick",
        "--n",
        "8",
        "--h",
        "1",
        "--d",
        "8",
        "--dtype",
        "float32",
        "--peers",
        "ours,eager",
        "--mask",
        "padding,none",
    ]
    assert main([*bench, "--device", "cpu", "--plot", "--out", str(out)]) == 0
    shutil.copytree(out, tmp_path / "cpu")
    readme = plots.rendered(tmp_path, "docs/benchmarks/", first_only=True)
    assert re.findall(r"\]\((.*?)\)", readme) == [
        "docs/benchmarks/nvidia-h200/B1-H1-D8-float32-padding-friendly.png",
        "docs/benchmarks/nvidia-h200/attention.md",
    ]
    assert "`python -m trifast_inductor bench --quick" in readme
    page = plots.rendered(tmp_path, "", first_only=False)
    assert page.count(".png)") == 4  # with a mask and without, for each of two devices
    assert plots.rendered(tmp_path / "nowhere", "", first_only=False) == plots.NOTHING


def _cells(page: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]


PEERS = ("eager", "inductor", "flex", "trifast", "cuequivariance", "ours")  # as the columns of the README's table


def test_figures_of_the_readme_are_those_of_their_source() -> None:
    readme = (plots.CHECKOUT / "README.md").read_text(encoding="utf-8")
    header, rows = tables.read_csv(plots.BENCHMARKS / "nvidia-h200" / "attention.csv", Row)
    measured = {(row.N, row.peer): (row.forward_device_ms, row.backward_device_ms) for row in rows}
    table = readme[readme.index("| bfloat16, N |") : readme.index("float32, without a mask")].strip().splitlines()[2:]
    assert len(table) == 4
    for line in table:
        N, *cells = (cell.strip(" *") for cell in line.strip("|").split("|"))
        for peer, cell in zip(PEERS, cells, strict=True):
            times = measured.get((int(N), peer), ())
            expected = " / ".join(f"{ms:.3f}" if ms < 1 else f"{ms:.2f}" for ms in times if ms is not None)
            assert cell.replace("*", "") == expected, (N, peer)
    source = (plots.BENCHMARKS / "h200.md").read_text(encoding="utf-8")
    (line,) = (line for line in readme.splitlines() if line.startswith("float32, without a mask"))
    figures = re.findall(r"\d\.\d+", line)
    assert len(figures) == 8
    assert [figure for figure in figures if figure not in source] == []
    modules = (plots.BENCHMARKS / "nvidia-h200" / "modules.md").read_text(encoding="utf-8")
    whole = readme[readme.index("Whole modules in bfloat16") : readme.index("One module alone")]
    commits = re.findall(r"\b[0-9a-f]{7}\b", whole)
    assert commits
    assert [commit for commit in commits if commit not in modules] == []
    timed = {tuple(row[:3]): f"{row[3]} / {row[5]}" for row in _cells(modules)}
    variants = ("inductor", "inductor, cuequivariance called", "trifast")
    _titles, *lines = _cells(whole)
    assert len(lines) == 4
    for model, N, *cells in lines:
        assert [cell.strip("*") for cell in cells] == [timed.get((model, N, variant), "") for variant in variants]
    conditions = readme[readme.index("## Speed and memory") : readme.index("| bfloat16, N |")]
    for condition in ("NVIDIA H200", "torch 2.11.0+cu130", "triton 3.6.0", "B=1, H=4, D=32"):
        assert condition in conditions
        assert condition in source
    assert "NVIDIA H200" in header["device"]
    assert all(version in header["versions"] for version in ("torch 2.11.0", "triton 3.6.0", "CUDA 13.0"))
    assert {row.group for row in rows} == {"B1-H4-D32-bfloat16-padding-friendly"}


def test_shares_of_the_grid_are_those_of_its_files() -> None:
    page = (plots.BENCHMARKS / "README.md").read_text(encoding="utf-8")
    grid = page[page.index("## Grid") : page.index("## What the columns mean")]
    shapes = {
        "H=4": {},
        "H=8": {"H": 8},
        "B=4": {"B": 4},
        "B=4, H=8": {"B": 4, "H": 8},
        "D=16": {"D": 16},
        "D=64": {"D": 64},
        "float16": {"dtype": "float16"},
        "float32": {"dtype": "float32"},
        "model's layout": {"layout": "model"},
    }
    usual = {"B": 1, "H": 4, "D": 32, "dtype": "bfloat16", "mask": "padding", "layout": "friendly"}
    found = 0
    titles, *lines = _cells(grid)
    for column, title in enumerate(titles[1:], 1):
        name, link = re.fullmatch(r"\[(.*)\]\((.*)\.md\)", title).groups()
        _, rows = tables.read_csv(plots.BENCHMARKS / f"{link}.csv", Row)
        shape = usual | shapes[name]
        timed = {(row.N, row.peer): row for row in rows if all(getattr(row, key) == x for key, x in shape.items())}
        for line in lines:
            if (ours := timed.get((int(line[0]), "ours"))) is None:
                assert line[column] == ""
                continue
            flex = timed[int(line[0]), "flex"]
            forward = ours.forward_device_ms / flex.forward_device_ms
            backward = ours.backward_device_ms / flex.backward_device_ms
            assert line[column] == f"{forward:.2f} / {backward:.2f}", (name, line[0])
            found += 1
    assert found == 31
