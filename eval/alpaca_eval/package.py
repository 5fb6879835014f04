"""The package `alpaca-eval`, imported in the one way that works on today's stack, and kept quiet.

Version 0.6.6 asks `pkg_resources` for version numbers, which setuptools 82 no longer has; it sets the level of the
root logger, logs through the root logger, and draws a progress bar for every call of a judge.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .redaction import Redactor

NAME = "alpaca_eval"
DISTRIBUTION = "alpaca-eval"

logger = logging.getLogger(__name__)


class MissingPackageError(ImportError):
    """`alpaca-eval` is not installed."""


@functools.cache
def load() -> types.ModuleType:
    """The package, with the annotators and the metrics imported.

    Raises:
        MissingPackageError: if it is not installed.
    """
    if importlib.util.find_spec(NAME) is None:
        raise MissingPackageError(
            "judging, reports of a judge's numbers and submissions need the package 'alpaca-eval': "
            "pip install 'trl-steer[alpaca]'"
        )
    root = logging.getLogger()
    level = root.level
    try:
        with _pkg_resources(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
            module = importlib.import_module(NAME)
            for name in ("annotators", "metrics.glm_winrate", "utils", "decoders.openai"):
                importlib.import_module(f"{NAME}.{name}")
    finally:
        root.setLevel(level)
    _draw_no_bars()
    return module


def folder() -> Path:
    """Where the package lies."""
    return Path(str(load().__file__)).parent


def evaluators() -> Path:
    """The folder with the judges that the package ships."""
    return folder() / "evaluators_configs"


def version() -> str:
    return importlib.metadata.version(DISTRIBUTION)


@contextmanager
def quiet(redactor: Redactor) -> Iterator[None]:
    """What the package logs goes to our logger at level DEBUG, without keys, and its warnings about metrics as such.

    The package calls `logging.warning` and the like, and its messages quote what an endpoint answers.
    """
    root = logging.getLogger()
    passed_on = _PassedOn(folder(), redactor)
    root.addFilter(passed_on)
    try:
        with warnings.catch_warnings():
            # scikit-learn announces what its next version will no longer take.
            warnings.filterwarnings("ignore", category=FutureWarning, module="sklearn")
            # pydantic quotes what an endpoint answers where it should not, which may be the key.
            warnings.filterwarnings("ignore", module="pydantic")
            yield
    finally:
        root.removeFilter(passed_on)


class _PassedOn(logging.Filter):
    """Takes the package's records from the root logger. A logger's filter sees no records of other loggers."""

    def __init__(self, package_folder: Path, redactor: Redactor):
        super().__init__()
        self._folder, self._redactor = str(package_folder), redactor

    def filter(self, record: logging.LogRecord) -> bool:
        if not record.pathname.startswith(self._folder):
            return True
        level = record.levelno if Path(record.pathname).parent.name == "metrics" else logging.DEBUG
        if logger.isEnabledFor(level):
            logger.log(level, "alpaca-eval: %s", self._redactor(record.getMessage()))
        return False


@contextmanager
def _pkg_resources() -> Iterator[None]:
    """A stand-in for `pkg_resources` where there is none, for as long as the import takes."""
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources") is not None:
        yield
        return
    from packaging.version import parse

    stand_in = types.ModuleType("pkg_resources")
    stand_in.get_distribution = lambda name: types.SimpleNamespace(  # type: ignore[attr-defined]
        version=importlib.metadata.version(name)
    )
    stand_in.parse_version = parse  # type: ignore[attr-defined]
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]


def _draw_no_bars() -> None:
    """Each call is asked for by itself here, so that a bar of the package's would count to one."""

    def iterate(iterable: Any, *args: Any, **kwargs: Any) -> Any:
        return iterable

    silent = types.SimpleNamespace(tqdm=iterate)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{NAME}.") and isinstance(getattr(module, "tqdm", None), types.ModuleType):
            module.tqdm = silent  # type: ignore[attr-defined]
