"""The package `alpaca-eval`, imported in the one way that works on today's stack, and kept quiet.

Version 0.6.6 asks `pkg_resources` for version numbers, which setuptools 82 no longer has; it sets the level of the
root logger and logs through it.
"""

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
    """Where the package lies, without importing it. Raises `ImportError` if it is not installed."""
    require("alpaca", "alpaca_eval")
    spec: Any = importlib.util.find_spec("alpaca_eval")
    return Path(spec.origin).parent


@functools.cache
def load() -> types.ModuleType:
    """The package, with the annotators and the metrics imported."""
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
    """Nothing is logged or drawn. The package logs whole answers, and a traceback for each that is missing."""
    before, utils = logging.root.manager.disable, load().utils
    theirs, utils.tqdm = utils.tqdm, types.SimpleNamespace(tqdm=lambda iterable, **_: iterable)
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            # scikit-learn announces what its next version will no longer take.
            warnings.filterwarnings("ignore", category=FutureWarning, module="sklearn")
            yield
    finally:
        logging.disable(before)
        utils.tqdm = theirs


@contextmanager
def _pkg_resources() -> Iterator[None]:
    """A stand-in for `pkg_resources` where there is none, for as long as the import takes."""
    if "pkg_resources" in sys.modules or importlib.util.find_spec("pkg_resources") is not None:
        yield
        return
    from packaging.version import parse

    stand_in: Any = types.ModuleType("pkg_resources")
    stand_in.get_distribution = lambda name: types.SimpleNamespace(version=importlib.metadata.version(name))
    stand_in.parse_version = parse
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        del sys.modules["pkg_resources"]
