"""The site's first page is README.md, with its links as they lie below docs/."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

README = Path(__file__).parents[2] / "README.md"


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "index.md", content=README.read_text(encoding="utf-8").replace("(docs/", "(")))
    return files
