"""The site builds, with every link inside it and every anchor there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("material") is None:
        assert os.environ.get("CI") != "true", "mkdocs-material is not installed: pip install -e '.[docs]'"
        pytest.skip("mkdocs-material is not installed: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/site/mkdocs.yml", "-d", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=CHECKOUT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_first_page_is_the_readme_with_links_that_lead_somewhere(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    article = page[page.index("<article") : page.index("</article>")]
    links = [link for link in re.findall(r'(?:href|src)="([^"#]+)', article) if not link.startswith("http")]
    assert len(links) > 8
    assert [link for link in links if not (site / link).exists()] == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]*", page.read_text())
        assert loaded == [], page


def test_pages_are_all_there_and_the_picture_is_drawn(site: Path) -> None:
    pages = {path.relative_to(CHECKOUT / "docs").with_suffix("") for path in (CHECKOUT / "docs").rglob("*.md")}
    built = {path.relative_to(site).with_suffix("") for path in site.rglob("*.html")}
    assert {page for page in pages if page.name != "README"} <= built
    assert 'src="design.svg"' in (site / "design.html").read_text()
    assert "<rect" in (site / "design.svg").read_text()
