"""Plots drop into the pages from the folder where the bench leaves them; README's figures are those of its source."""

import re
import shutil
from pathlib import Path

import pytest

from trifast_inductor.bench.command import main

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


def test_figures_of_the_readme_are_those_of_their_source() -> None:
    readme = (plots.CHECKOUT / "README.md").read_text(encoding="utf-8")
    source = (plots.BENCHMARKS / "h200.md").read_text(encoding="utf-8")
    table = readme[readme.index("| N | float32") : readme.index("<!-- plots")]
    figures = re.findall(r"\d*\.\d+", table)
    assert len(figures) == 16
    assert [figure for figure in figures if figure not in source] == []
    conditions = readme[readme.index("## Speed and memory") : readme.index("| N | float32")]
    for condition in ("NVIDIA H200", "torch 2.11.0+cu130", "triton 3.6.0", "B=1, H=4, D=32"):
        assert condition in conditions
        assert condition in source
