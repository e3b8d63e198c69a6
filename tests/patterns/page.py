"""docs/patterns.md from what the tests run: `python -m tests.patterns.page` writes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from trifast_inductor.patterns.site import Reason
from trifast_inductor.tables import markdown

from .mutations import MUTATIONS
from .near_misses import NEAR_MISSES
from .relatives import RELATIVES
from .spellings import SPELLINGS
from .variations import BIASES, CONTRACTIONS, LAYOUTS, MASKS, NODES, ORDERS, SCALE_PLACES, SCALES, SOFTMAXES

PAGE = Path(__file__).parents[2] / "docs" / "patterns.md"

INTRODUCTION = """\
# What is recognised

Generated from the tests by `python -m tests.patterns.page`; do not edit. Every line is a case that the suite runs:
outputs and all gradients against eager in float64, static and with dynamic sizes where it says so.

The pass reads meaning, not spelling: any combination of the choices below is the same attention to it, and
`make fuzz` draws ten thousand of them. `trifast_inductor.explain(model, *args)` says for each softmax of a model
whether it was rewritten, and if not, which of the reasons at the end of this page it was.
"""

PACKAGES = (
    ("transformers 5.23.0, ESMFold", "tests/models/test_esmfold.py"),
    ("boltz 2.2.1, whole and in chunks", "tests/models/test_boltz.py"),
    ("openfold3 0.5.0", "tests/models/test_openfold3.py"),
    ("protenix 2.0.0", "tests/models/test_protenix.py"),
    ("alphafold3-pytorch 0.8.3", "tests/models/test_alphafold3_pytorch.py"),
    ("alphafold2-pytorch 0.4.32", "tests/models/test_alphafold2_pytorch.py"),
)


def render() -> str:
    parts = [INTRODUCTION]
    parts += ["## Published packages, unmodified\n", table(("package", "test", "rewritten"), _yes(PACKAGES))]
    parts += ["## Whole spellings\n"]
    spelled = [(spelling.__name__, first_line(spelling)) for spelling in SPELLINGS]
    parts += [table(("spelling", "what it does", "rewritten"), _yes(spelled))]
    parts += ["## Relatives\n"]
    relatives = [(relative.__name__, first_line(relative), relative.seen_in) for relative in RELATIVES]
    parts += [table(("relative", "what it does", "seen in", "rewritten"), _yes(relatives))]
    parts += ["## Choices\n"]
    choices = [
        (axis, f"`{choice.name}`", choice.seen_in)
        for axis, tabled in (
            ("contraction", CONTRACTIONS),
            ("scale", SCALES),
            ("bias", BIASES),
            ("mask", MASKS),
            ("softmax", SOFTMAXES),
        )
        for choice in tabled.values()
    ]
    choices += [("scale is on", place, "") for place in SCALE_PLACES]
    choices += [("order", order, "") for order in ORDERS]
    choices += [("node", node, "") for node in NODES]
    choices += [("layout of the logits", f"`{' '.join(layout)}`", "folded axes together") for layout in LAYOUTS]
    parts += [table(("axis", "choice", "seen in", "rewritten"), _yes(choices))]
    parts += ["## Near misses: left alone\n"]
    misses = [(miss.__name__, first_line(miss), f"`{reason.slug}`") for miss, reason in NEAR_MISSES]
    parts += [table(("case", "what it does", "reason"), misses)]
    parts += ["## Mutations: left alone, or rewritten and right\n"]
    parts += [table(("mutation", "what it does"), [(m.__name__, first_line(m)) for m in MUTATIONS])]
    parts += ["## Reasons, and what to do\n"]
    reasons = [
        (f"`{reason.slug}`", reason.sentence, reason.way_out, "yes" if reason.looks_like_attention else "no")
        for reason in Reason
    ]
    parts += [table(("reason", "what it says", "what to do", "counted as declined"), reasons)]
    parts += [
        'Reasons that are not counted say "this is no triangle attention": nothing is lost, and `strict` passes.\n'
    ]
    return "\n".join(parts)


def first_line(of: type) -> str:
    own = of.__dict__.get("__doc__")
    return own.strip().splitlines()[0] if own else ""


def _yes(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    return [(*row, "yes") for row in rows]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return markdown(header, ([cell.replace("|", "\\|") for cell in row] for row in rows)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
