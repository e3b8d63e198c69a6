"""Every code block of README.md and docs/ runs, and prints what the page says it prints."""

import ast
import builtins
import contextlib
import importlib.util
import io
import re
from collections.abc import Iterator

import pytest
import torch

import trifast_inductor
from tests.models import published

from . import commands
from .blocks import CHECKOUT, LANGUAGES, Block, blocks_of, pages

BLOCKS = [block for page in pages() for block in blocks_of(page)]
PYTHON = list(dict.fromkeys(block.page for block in BLOCKS if block.language == "python"))


HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, without_cuda: None) -> Iterator[None]:
    """What the pages show is a CPU's."""
    monkeypatch.chdir(CHECKOUT)
    torch._dynamo.reset()
    yield
    trifast_inductor.unregister()


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python(page) -> None:
    """One after the other in one namespace, as a reader would type them."""
    if HAS_GPU and importlib.util.find_spec("transformers") is None:
        pytest.skip(f"transformers is not installed: {published.INSTALL}")
    published.esmfold()
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if block.parsed_only:
            missing = {name for name in _names_read(block.text) if name not in names and not hasattr(builtins, name)}
            assert missing == set(), block
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        assert shortened(printed.getvalue()) == (block.output or ""), block


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=str)
def test_shell(block: Block) -> None:
    lines = commands.lines_of(block.text)
    assert lines
    if block.parsed_only:
        for line in lines:
            commands.parse(line)
    else:
        printed = "".join(commands.run(line) for line in lines)
        assert shortened(printed) == (block.output or ""), block


def test_every_fence_has_a_language_and_what_is_not_run_a_reason() -> None:
    unknown = [str(block) for block in BLOCKS if block.language not in LANGUAGES]
    assert unknown == [], f"name one of {', '.join(sorted(LANGUAGES))}"
    indented = [str(b) for b in BLOCKS if b.parsed_only == "hours or a GPU" and b.page.parent.name != "benchmarks"]
    assert indented == [], "use a fence"


def _names_read(text: str) -> set[str]:
    """Names that a block takes from the blocks before it."""
    tree = ast.parse(text)
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imported = {alias.asname or alias.name for node in ast.walk(tree) for alias in getattr(node, "names", [])}
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return read - bound - imported


def shortened(printed: str) -> str:
    """Without what differs from machine to machine: paths of packages and of this checkout, and a package's lines."""
    printed = re.sub(r"(?<=\s)/\S*?/(?=(?:transformers|docs/recipes)/)", ".../", printed)
    return re.sub(r"(?<=/modeling_esmfold\.py:)\d+", "283", printed)
