"""The cost of `trl_steer_autoload.pth` for the start of the Python interpreter.

Starts the interpreters of two virtual environments alternately, of which one has the `.pth` file and its module, as a
wheel installs them. Measures CPU time if the system provides it, because it varies less than wall time. Python runs
the `.pth` files of a virtual environment twice, so the cost is smaller elsewhere. It is about 1% larger without other
`.pth` files, such as that of setuptools, which import the same modules. An editable install starts more slowly,
because of setuptools' own finder, which is not measured.
"""

from __future__ import annotations

import importlib.resources
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

from .harness import Result, compare

NAME = "startup"
MODULE = "trl_steer_autoload"
WITH, WITHOUT = f"with {MODULE}.pth", "without"
# A start takes about ten milliseconds, of which the difference is about 1%.
STARTS_PER_REPEAT, WARM_UP = 100, 5


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the ratio of starts with and without the file. Does not depend on `device`."""
    starts = repeats if quick else repeats * STARTS_PER_REPEAT
    times: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    with tempfile.TemporaryDirectory() as folder:
        interpreters = {side: _environment(Path(folder, str(index))) for index, side in enumerate(times)}
        _install_autoload(interpreters[WITH])
        for index in range(starts + WARM_UP):
            # alternating, because caches are warmer for the second one
            for side in (WITH, WITHOUT) if index % 2 else (WITHOUT, WITH):
                times[side].append(_start(interpreters[side]))
    times = {side: values[WARM_UP:] for side, values in times.items()}
    case = f"bare start of Python {sys.version.split()[0]}, {'processor' if hasattr(os, 'wait4') else 'wall'} time"
    yield compare(NAME, case, times, WITH, WITHOUT, bound=None if quick else "<= 1.03")


def _environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _install_autoload(interpreter: Path) -> None:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    command = [str(interpreter), "-c", code]
    site_packages = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    for file in (importlib.resources.files("trl_steer") / "site_packages").iterdir():
        if file.name.startswith(f"{MODULE}."):
            (site_packages / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([str(interpreter), "-m", "compileall", "-q", str(site_packages)], check=True)  # as pip does
    code = f"import sys; print([getattr(finder, '__name__', '') for finder in sys.meta_path].count({MODULE!r}))"
    found = subprocess.run([str(interpreter), "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    if found != "1":
        raise RuntimeError(f"Expected one finder of {MODULE}.pth in {site_packages} on sys.meta_path, got {found}.")


def _start(interpreter: Path) -> float:
    """Seconds of one start."""
    command = [str(interpreter), "-c", "pass"]
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(os.posix_spawn(command[0], command, os.environ), 0)
        if status != 0:
            raise RuntimeError(f"{command} failed with status {status}.")
        return usage.ru_utime + usage.ru_stime
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start
