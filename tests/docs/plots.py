"""Plots of README.md and docs/benchmarks/README.md, from what `bench --plot` left: `python -m tests.docs.plots`.

Every folder docs/benchmarks/<device>/ with a PNG and an attention.csv gets its plots between two comments of each page,
with the conditions that the CSV file's header gives. README.md shows one plot of each GPU, the other page all.
"""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
BENCHMARKS = CHECKOUT / "docs" / "benchmarks"
PAGES = {CHECKOUT / "README.md": "docs/benchmarks/", BENCHMARKS / "README.md": ""}
_BEGIN, _END = "<!-- plots: written by `make pages` from docs/benchmarks/<device>/ -->\n", "<!-- /plots -->"
NOTHING = (
    "No plot yet: `python -m trifast_inductor bench --prepare --plot` on a GPU draws runtime and memory against N\n"
    "beside the peers, and `make pages` puts the pictures here.\n"
)


def update(page: Path, benchmarks: Path = BENCHMARKS) -> str:
    """The page's text as it should be."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    assert begin, f"{page} has no place for plots"
    assert end, f"{page} has no place for plots"
    return before + begin + rendered(benchmarks, PAGES[page], first_only=page.parent == CHECKOUT) + end + after


def rendered(benchmarks: Path, prefix: str, *, first_only: bool) -> str:
    parts = []
    for csv in sorted(benchmarks.glob("*/attention.csv")):
        device = csv.parent.name
        # Keys left out first: what a model has.
        plots = sorted(csv.parent.glob("*.png"), key=lambda plot: ("-none-" in plot.name, plot.name))
        if not plots or (first_only and device == "cpu"):
            continue
        header = dict(line[2:].split(": ", 1) for line in csv.read_text().splitlines() if line.startswith("# "))
        parts += [
            f"![Runtime and memory against N beside the peers, {plot.stem}]({prefix}{device}/{plot.name})\n"
            for plot in (plots[:1] if first_only else plots)
        ]
        conditions = f"{header['device']}; {header['versions']}; commit {header['commit']}, {header['date']}"
        parts.append(f"{conditions}; `{header['command']}`; [tables]({prefix}{device}/attention.md).\n")
    return "\n".join(parts) or NOTHING


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(update(page), encoding="utf-8")
