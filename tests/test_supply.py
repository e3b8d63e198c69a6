"""What comes with the package, and what does not: pinned dependencies, data that is not code, no network."""

import ast
import re
import sys
from pathlib import Path

import pytest

import trifast_inductor

PACKAGE = Path(trifast_inductor.__file__).parent
CHECKOUT = Path(__file__).parents[1]
SOURCES = sorted(
    {path.resolve() for root in (PACKAGE, PACKAGE / "kernels", PACKAGE / "patterns") for path in root.rglob("*.py")}
)

UNPICKLERS = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "requests", "httpx", "aiohttp", "huggingface_hub"}
LOADERS = re.compile(r"\b(torch\.(load|hub|save)|eval\(|exec\(|os\.system)")


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of every module that a source imports, by statement or by `import_module`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("import_module", "__import__"):
            names.update(arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
    return {name.partition(".")[0] for name in names}


def test_the_sources_are_all_there() -> None:
    names = {path.name for path in SOURCES}
    assert {"tile_store.py", "attention.py", "backend.py", "forward.py"} <= names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-2:]))
def test_no_source_unpickles_or_opens_a_connection(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = imported(ast.parse(text))
    assert not found & UNPICKLERS, "files are data: JSON or CSV, never pickles"
    assert not found & NETWORK, "nothing is downloaded or sent"
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    called = [match.group() for match in LOADERS.finditer(code) if not code[: match.start()].endswith(".")]
    assert called == []


def test_the_check_finds_what_it_looks_for() -> None:
    tree = ast.parse("import os, pickle\nfrom urllib.request import urlopen\nimportlib.import_module('http.client')")
    assert imported(tree) == {"os", "pickle", "urllib", "http"}
    assert LOADERS.search("x = torch.load(path)")


def test_run_time_imports_are_the_dependencies() -> None:
    """Each has a lower bound and a reason; peers, plots and demos are optional and imported where they are used."""
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    block = text[text.index("dependencies = [") : text.index("]", text.index("dependencies = [") + 20)]
    lines = [line.strip() for line in block.splitlines()[1:] if line.strip()]
    for line in lines:
        assert re.search(r'"[a-z]+>=[0-9.]+(; [^"]*)?", # \w+', line), f"no lower bound with a reason: {line}"
    declared = {re.match(r'"([a-z]+)', line)[1] for line in lines}
    optional = {
        "matplotlib",
        "transformers",
        "einops",
        "einx",
        "cuequivariance_torch",
        "cuequivariance_ops_torch",
        "trifast",
    }
    of_torch = {"functorch", "numpy"}
    used = set().union(*(imported(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES))
    third_party = used - sys.stdlib_module_names - {"trifast_inductor", "__future__", ""}
    assert third_party - declared - optional - of_torch == set()
    assert declared <= third_party
