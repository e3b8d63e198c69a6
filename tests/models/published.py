"""Published model packages, imported with no more than their attention code needs.

`requirements.txt` beside this file installs them without their dependencies. What an import asks for beyond
that list (file readers, data pipelines, training loops) is stood in for: none of it takes part in attention.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

INSTALL = "pip install --no-deps --ignore-requires-python -r tests/models/requirements.txt"
StandIns = Mapping[str, Mapping[str, Any]]  # attributes by name of module


def esmfold() -> ModuleType:
    return _load("transformers.models.esm.modeling_esmfold")


def boltz() -> ModuleType:
    return _load("boltz.model.layers.triangular_attention.attention")


def openfold3() -> ModuleType:
    return _load("openfold3.core.model.layers.triangular_attention", {"gemmi": {}, "biotite": {}})


def protenix() -> ModuleType:
    # Its default layer norm is a CUDA extension, built when imported.
    return _load("protenix.model.triangular.triangular", environ={"LAYERNORM_TYPE": "torch"})


def alphafold3_pytorch() -> ModuleType:
    package = "alphafold3_pytorch"
    _without_init(package)
    nothing_of = (
        *(f"{package}.{part}" for part in ("inputs", "common", "nlm", "plm")),
        *("Bio", "huggingface_hub", "torch_einops_utils"),
        *("frame_averaging_pytorch", "taylor_series_linear_attention", "colt5_attention"),
    )
    some_of: StandIns = {
        "loguru": {"logger": logging.getLogger(package)},
        "environs": {"Env": _NoSettings},
        "sh": {"which": _no_command, "ErrorReturnCode_1": _NoCommandError},
    }
    return _load(f"{package}.alphafold3", {**{name: {} for name in nothing_of}, **some_of})


def alphafold2_pytorch() -> ModuleType:
    package = "alphafold2_pytorch"
    _without_init(package)
    nothing_of = (f"{package}.utils", f"{package}.mlm", "invariant_point_attention", "pytorch3d")
    return _load(f"{package}.alphafold2", {name: {} for name in nothing_of})


def _without_init(package: str) -> None:
    """The package with its files but without what its __init__ imports: a trainer, a data pipeline."""
    _require(package)
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        spec.loader = None
        sys.modules[package] = importlib.util.module_from_spec(spec)


class _NoSettings:
    """`environs.Env` where none of the package's variables is set."""

    def read_env(self) -> None:
        pass

    def bool(self, name: str, default: bool) -> bool:
        return default


class _NoCommandError(Exception):
    pass


def _no_command(name: str) -> None:
    raise _NoCommandError(name)


def _require(package: str) -> None:
    """Fails when the package is missing; skips on a machine with a GPU, which need not have them all."""
    if importlib.util.find_spec(package) is not None:
        return
    missing = f"{package} is not installed: {INSTALL}"
    if torch.cuda.is_available() or os.environ.get("TRIFAST_SKIP_MISSING_MODELS") == "1":
        pytest.skip(missing)
    pytest.fail(missing)


def _load(name: str, stand_ins: StandIns | None = None, environ: Mapping[str, str] | None = None) -> ModuleType:
    _require(name.partition(".")[0])
    if name in sys.modules:
        return sys.modules[name]
    with (
        _standing_in(stand_ins or {}),
        mock.patch.dict(os.environ, environ or {}),
        warnings.catch_warnings(),  # openfold3 sets a filter for the whole process
    ):
        return importlib.import_module(name)


@contextlib.contextmanager
def _standing_in(stand_ins: StandIns) -> Iterator[None]:
    finder = _StandInFinder(stand_ins)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if getattr(module, "__loader__", None) is finder:
                del sys.modules[name]


class _StandInFinder(MetaPathFinder, Loader):
    """Finds the named modules, and all below them, with the given attributes and any other name."""

    def __init__(self, stand_ins: StandIns) -> None:
        self.stand_ins = stand_ins

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if any(f"{fullname}.".startswith(f"{name}.") for name in self.stand_ins):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _AnyName(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.stand_ins.get(module.__name__, {}))


class _AnyName(ModuleType):
    """Every name is a class of its own, good as a base class, an annotation or an exception."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {})
