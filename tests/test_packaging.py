"""The wheel and the sdist hold every module, and install into one top-level package."""

import email
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import trifast_inductor

CHECKOUT = Path(__file__).parents[1]
DIRECTORIES = {
    "trifast_inductor": "trifast_inductor",
    "kernels": "trifast_inductor/kernels",
    "patterns": "trifast_inductor/patterns",
}


def installed_names() -> set[str]:
    """Every source module under the name it is installed by."""
    names = set()
    for directory, package in DIRECTORIES.items():
        root = CHECKOUT / directory
        for path in root.rglob("*.py"):
            relative = path.relative_to(root)
            is_link = directory == "trifast_inductor" and relative.parts[0] in ("kernels", "patterns")
            if not is_link:
                names.add(f"{package}/{relative.as_posix()}")
    return names


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    copy = out / "source"
    # A build leaves files beside its sources, so it gets a copy of what git would hand over.
    files = [CHECKOUT / name for name in ("pyproject.toml", "README.md", "LICENSE")]
    copy.mkdir()
    subprocess.run(["cp", "-P", *map(str, files), str(copy)], check=True)
    for directory in DIRECTORIES:
        subprocess.run(["cp", "-RP", str(CHECKOUT / directory), str(copy)], check=True)
    build = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    if sys.version_info < (3, 11):
        build.remove("-P")
    done = subprocess.run(build, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_wheel_holds_every_module_and_one_top_level_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"trifast_inductor"}
    assert names == installed_names() | {"trifast_inductor/py.typed"}


def test_sdist_holds_every_module(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    for installed in installed_names():
        inside = installed.removeprefix("trifast_inductor/")
        top = inside if inside.startswith(("kernels/", "patterns/")) else installed
        assert top in names or installed in names, installed


def test_wheel_installs_and_builds_from_the_sdist_alike(built: Path, tmp_path: Path) -> None:
    """What pip does with the sdist: build a wheel of it, with the same modules."""
    (sdist,) = built.glob("*.tar.gz")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(sdist),
    ]
    done = subprocess.run(pip, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == installed_names() | {"trifast_inductor/py.typed"}


def test_metadata_says_what_is_there(built: Path) -> None:
    """One version, from the source; a license, a description that can be shown, every supported Python."""
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    cited = re.search(r"^version: (.+)$", (CHECKOUT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert metadata["Version"] == trifast_inductor.__version__ == cited[1]
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == "<3.14,>=3.10"
    classifiers = metadata.get_all("Classifier")
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)} <= set(classifiers)
    assert metadata.get_payload(decode=True).decode() == (CHECKOUT / "README.md").read_text(encoding="utf-8")


def test_twine_accepts_wheel_and_sdist(built: Path) -> None:
    if importlib.util.find_spec("twine") is None:
        assert os.environ.get("CI") != "true", "twine is not installed: pip install -e '.[test]'"
        pytest.skip("twine is not installed: pip install -e '.[test]'")
    files = [str(path) for pattern in ("*.whl", "*.tar.gz") for path in built.glob(pattern)]
    assert len(files) == 2
    check = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(check, capture_output=True, text=True, cwd=built)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", trifast_inductor.__all__)
def test_the_public_api_is_typed(name: str) -> None:
    """Every parameter and result; py.typed, which lets a type checker read them, is in the wheel above."""
    signature = inspect.signature(getattr(trifast_inductor, name))
    untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert untyped == []
    assert signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", ["kernels", "patterns"])
def test_a_probe_for_another_package_of_that_name_finds_nothing(name: str) -> None:
    """Libraries ask for a package `kernels` by importing it; from a checkout they must get nothing, and no error."""
    program = (
        f"import {name}\n"
        f"assert getattr({name}, '__version__', 'N/A') == 'N/A'\n"
        f"try:\n    import {name}.attention\n"
        "except ModuleNotFoundError:\n    print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.stdout.strip() == "refused", done.stderr


def test_ci_runs_what_the_readme_says_and_make_check_does() -> None:
    script, makefile = (CHECKOUT / ".ci" / "run").read_text(), (CHECKOUT / "Makefile").read_text()
    command = script.splitlines()[-1].removeprefix("exec ")
    assert f"\n{command} " in (CHECKOUT / "README.md").read_text()
    assert re.search(rf"^{command.removeprefix('make ')} check: ", makefile, re.MULTILINE)


def test_pre_commit_calls_what_is_there_and_downloads_nothing() -> None:
    """Hooks of this checkout, each a tool of the test extra and files that exist."""
    yaml = pytest.importorskip("yaml")
    (repo,) = yaml.safe_load((CHECKOUT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    extra = (CHECKOUT / "pyproject.toml").read_text()
    for hook in repo["hooks"]:
        assert hook["language"] == "system"
        tool, *arguments = hook["entry"].split()
        assert tool.removeprefix(".venv/bin/") in ("python", *re.findall(r'"(\w+)[">]', extra))
        assert all((CHECKOUT / word).exists() for word in arguments if "/" in word)
