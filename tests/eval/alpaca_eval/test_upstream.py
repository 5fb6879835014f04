"""The package imports through us, with and without setuptools, and leaves this process as it was."""

import importlib.metadata
import importlib.util
import json
import logging
import subprocess
import sys

import pytest

CODE = """
import json, logging, sys
logging.getLogger().setLevel(logging.ERROR)
sys.path.insert(0, sys.argv[1])
from trl_steer.eval.alpaca_eval import upstream
version = upstream.load().utils.get_package_version("alpaca_eval")
print(json.dumps([version, "pkg_resources" in sys.modules, logging.getLogger().level]))
"""
WITH = """
import importlib.metadata, types

def get_distribution(name):
    return types.SimpleNamespace(version="real " + importlib.metadata.version(name))
"""


# As after removing setuptools, also where the environment has one that brings `pkg_resources`.
WITHOUT = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name == "pkg_resources" else find_spec(name, *rest)
"""


@pytest.mark.parametrize("setuptools", ["with", "without"])
def test_alpaca_eval_imports_with_and_without_pkg_resources(setuptools, tmp_path):
    code = CODE if setuptools == "with" else WITHOUT + CODE
    if setuptools == "with":
        (tmp_path / "pkg_resources.py").write_text(WITH)
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    installed, prefix = importlib.metadata.version("alpaca-eval"), "real " * (setuptools == "with")
    assert json.loads(ran.stdout) == [prefix + installed, setuptools == "with", logging.ERROR]
