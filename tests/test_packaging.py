"""The wheel and the sdist hold every module, and install into one top-level package."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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
