"""Copies of the checkout, so that nothing is written to it."""

import shutil
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]


def copy_checkout(target: Path) -> Path:
    """Copies what a build reads, and what lints it, into the folder `target`."""
    target.mkdir(exist_ok=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, target)
    for name in (".ci", "trl_steer", "eval", "integrations"):
        shutil.copytree(CHECKOUT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target
