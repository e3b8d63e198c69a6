"""What a line of a `sh` block does, run for real or as far as its arguments are read."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

from trifast_inductor import __main__, tune

from .blocks import CHECKOUT


class Parsed(Exception):
    """No error: the command's own parser took its arguments."""


def lines_of(text: str) -> list[str]:
    """Commands, without comments, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def run(line: str) -> str:
    """What it prints; it must end well. In this process and folder, so that torch is not imported again."""
    words = shlex.split(line)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), mock.patch.object(sys, "path", list(sys.path)):
        if words[:3] == ["python", "-m", "trifast_inductor"]:
            assert __main__.main(words[3:]) == 0
        else:
            assert words[0] == "python", f"a command that is not known here: {line}"
            with mock.patch.object(sys, "argv", words[1:]):
                runpy.run_path(str(CHECKOUT / words[1]), run_name="__main__")
    return printed.getvalue()


def parse(line: str) -> None:
    """Raise unless each command of the line exists and takes these arguments; nothing else happens."""
    for part in line.split("&&"):
        _parse(_words(part))


def _parse(words: list[str]) -> None:
    if words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=CHECKOUT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[0] == "trifast-tune":
        _until_parsed(lambda: tune.main(words[1:]))
    elif words[:3] == ["python", "-m", "trifast_inductor"]:
        _until_parsed(lambda: __main__.main(words[3:]))
    elif words[:2] == ["python", "-m"]:
        assert (CHECKOUT / (words[2].replace(".", "/") + ".py")).exists(), words
    elif words[0] == "python":
        _parse_script(CHECKOUT / words[1], words[1:])
    elif words[0] == "pytest":
        files = [word.partition("::")[0] for word in words[1:] if word.startswith("tests/")]
        assert files, words
        assert all((CHECKOUT / file).exists() for file in files), words
    elif words[0] == "pip":
        assert words[1] == "install", words
    else:
        raise AssertionError(f"a command that is not known here: {shlex.join(words)}")


def _parse_script(script: Path, argv: list[str]) -> None:
    assert script.exists(), script
    if "argparse" in script.read_text():
        # As python does for a script, which may import its neighbours.
        beside = [str(script.parent), *sys.path]
        with mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "path", beside):
            _until_parsed(lambda: runpy.run_path(str(script), run_name="__main__"))


def _until_parsed(main: object) -> None:
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *args: object, **kwargs: object) -> argparse.Namespace:
        parsed = parse_args(self, *args, **kwargs)
        if self.prog == "python -m trifast_inductor":  # hands the rest to a command
            return parsed
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
        try:
            main()
        except Parsed:
            return
    raise AssertionError("the command did not read its arguments")


def _words(line: str) -> list[str]:
    """Without the variables that are set in front."""
    return [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
