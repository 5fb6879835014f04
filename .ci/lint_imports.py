"""Checks which module imports which, by the contracts in pyproject.toml.

import-linter reads folders, and `eval/` and `integrations/` lie beside the package that they are installed in. So it
gets the package as a wheel would hold it.
"""

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from importlinter.cli import lint_imports

CHECKOUT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Returns the exit status: 0 if every contract is kept."""
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", folder]
        subprocess.run(build, cwd=CHECKOUT, check=True)
        with contextlib.chdir(folder):  # where the linter looks first, whatever is installed
            return lint_imports(str(CHECKOUT / "pyproject.toml"), no_cache=True, no_logo=True)


if __name__ == "__main__":
    sys.exit(main())
