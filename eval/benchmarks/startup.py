"""What `trl_steer_autoload.pth` adds to the start of a bare interpreter.

Two virtual environments as `python -m venv` makes them, one of them with the `.pth` file and its module as a wheel
installs them. Each start of one is followed by a start of the other. Where the system tells the processor time of a
start it is that which counts: it is steadier than what a clock on the wall says. Python runs the `.pth` files of a
virtual environment twice, so elsewhere the cost is a little less; where there is no other `.pth` file, setuptools' for
one, nobody else has warmed the import system up, and the share is about 1% more. An editable install starts
more slowly, through setuptools' own finder, which is not measured.
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
# A start takes about ten milliseconds, and what is looked for is a hundredth of that.
STARTS_PER_REPEAT, WARM_UP = 100, 5


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the ratio of a start with the file to one without. Nothing here depends on `device`."""
    starts = repeats if quick else repeats * STARTS_PER_REPEAT
    times: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    with tempfile.TemporaryDirectory() as folder:
        interpreters = {side: _environment(Path(folder, str(index))) for index, side in enumerate(times)}
        _install_autoload(interpreters[WITH])
        for index in range(starts + WARM_UP):
            # whichever is second finds warmer caches, so they take turns
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
        raise RuntimeError(f"{MODULE}.pth in {site_packages} should put one finder on sys.meta_path, found {found}.")


def _start(interpreter: Path) -> float:
    """Seconds of one start."""
    command = [str(interpreter), "-c", "pass"]
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(os.posix_spawn(command[0], command, os.environ), 0)
        if status != 0:
            raise RuntimeError(f"{command} ended with status {status}")
        return usage.ru_utime + usage.ru_stime
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start
