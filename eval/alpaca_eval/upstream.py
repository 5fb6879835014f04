"""Imports the package `alpaca-eval` 0.6.6, which needs `pkg_resources` and changes the level of the root logger."""

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

from trl_steer.extras import require


def folder() -> Path:
    """The package's folder, without importing it."""
    require("alpaca", "alpaca_eval")
    spec: Any = importlib.util.find_spec("alpaca_eval")
    return Path(spec.origin).parent


@functools.cache
def load() -> types.ModuleType:
    """The package, including the modules that are used here."""
    level = logging.getLogger().level
    try:
        with _pkg_resources(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
            for name in ("annotators", "metrics.glm_winrate", "utils", "decoders.openai"):
                importlib.import_module(f"alpaca_eval.{name}")
    finally:
        logging.getLogger().setLevel(level)
    return sys.modules["alpaca_eval"]


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager without logging and progress bars. The package logs answers, and tracebacks for missing ones."""
    before, utils = logging.root.manager.disable, load().utils
    theirs, utils.tqdm = utils.tqdm, types.SimpleNamespace(tqdm=lambda iterable, **_: iterable)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # Warnings about the package's use of scikit-learn.
            warnings.filterwarnings("ignore", category=FutureWarning, module="sklearn")
            yield
    finally:
        logging.disable(before)
        utils.tqdm = theirs


@contextmanager
def _pkg_resources() -> Iterator[None]:
    """Context manager with a replacement of `pkg_resources`, if it is not installed."""
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources") is not None:
        yield
        return
    from packaging.version import parse

    replacement: Any = types.ModuleType("pkg_resources")
    replacement.get_distribution = lambda name: types.SimpleNamespace(version=importlib.metadata.version(name))
    replacement.parse_version = parse
    sys.modules["pkg_resources"] = replacement
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]
