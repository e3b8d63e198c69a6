"""Published model packages, imported with no more than their attention code needs.

`requirements.txt` beside this file installs the packages without their dependencies. What an import asks for beyond
that list (file readers, data pipelines, training loops) is stood in for here: none of it takes part in attention.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

INSTALL = "pip install --no-deps -r tests/models/requirements.txt"


class _AnyName(ModuleType):
    """A module in which every name is a class of its own: a base, an annotation, an exception or a callable."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Exception,), {"__init__": lambda self, *args, **kwargs: None})


class _StandIns(MetaPathFinder, Loader):
    """Finds the named modules, and all below them, as stand-ins that hold the given attributes."""

    def __init__(self, names: Mapping[str, Mapping[str, Any]]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if any(f"{fullname}.".startswith(f"{name}.") for name in self.names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _AnyName(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.names.get(module.__name__, {}))


@contextlib.contextmanager
def _standing_in(names: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    finder = _StandIns(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name, module in list(sys.modules.items()):
            if getattr(module, "__loader__", None) is finder:
                del sys.modules[name]


def _require(package: str) -> None:
    """Fails when the package is missing; skips on a machine with a GPU, where the test needs no full set of models."""
    if importlib.util.find_spec(package) is not None:
        return
    missing = f"{package} is not installed: {INSTALL}"
    if torch.cuda.is_available() or os.environ.get("TRIFAST_SKIP_MISSING_MODELS") == "1":
        pytest.skip(missing)
    pytest.fail(missing)


def _load(
    module: str,
    stand_ins: Mapping[str, Mapping[str, Any]] | None = None,
    environ: Mapping[str, str] | None = None,
) -> ModuleType:
    _require(module.partition(".")[0])
    if module in sys.modules:
        return sys.modules[module]
    with _standing_in(stand_ins or {}), mock.patch.dict(os.environ, environ or {}):
        return importlib.import_module(module)


def esmfold() -> ModuleType:
    return _load("transformers.models.esm.modeling_esmfold")


def boltz() -> ModuleType:
    return _load("boltz.model.layers.triangular_attention.attention")


def openfold3() -> ModuleType:
    return _load("openfold3.core.model.layers.triangular_attention", {"gemmi": {}, "biotite": {}})


def protenix() -> ModuleType:
    # The package's default layer norm is a CUDA extension compiled at import.
    return _load("protenix.model.triangular.triangular", environ={"LAYERNORM_TYPE": "torch"})


class _NoSettings:
    """`environs.Env` of a process that sets none of the package's variables."""

    def read_env(self) -> None:
        pass

    def bool(self, name: str, default: bool) -> bool:
        return default


class _NoCommand(Exception):
    pass


def _no_command(name: str) -> None:
    raise _NoCommand(name)


def alphafold3_pytorch() -> ModuleType:
    package = "alphafold3_pytorch"
    _require(package)
    if package not in sys.modules:
        # The package's __init__ imports the trainer and the data pipeline; the model's own files do without it.
        spec = importlib.util.find_spec(package)
        assert spec is not None
        spec.loader = None
        sys.modules[package] = importlib.util.module_from_spec(spec)
    return _load(
        f"{package}.alphafold3",
        {
            **{f"{package}.{part}": {} for part in ("inputs", "common", "nlm", "plm")},
            **dict.fromkeys(("Bio", "huggingface_hub", "torch_einops_utils"), {}),
            **dict.fromkeys(
                ("frame_averaging_pytorch", "taylor_series_linear_attention", "colt5_attention"), {}
            ),
            "loguru": {"logger": logging.getLogger(package)},
            "environs": {"Env": _NoSettings},
            "sh": {"which": _no_command, "ErrorReturnCode_1": _NoCommand},
        },
    )
