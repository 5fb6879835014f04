"""What `trl_steer_autoload.pth` adds to the start of a bare interpreter.

    python -m trl_steer.eval.benchmarks.startup

Two virtual environments without any package, one of them with the `.pth` file and its module as a wheel installs
them. Each start of one is followed by a start of the other, and medians are compared, of processor time where the
system tells it: it is steadier than what a clock on the wall says. Python runs the `.pth` files of a virtual
environment twice, so elsewhere the cost is a little less.
"""

import argparse
import importlib.resources
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

MODULE = "trl_steer_autoload"
WARM_UP = 5


def run(repeats: int = 300) -> dict:
    """Starts a bare interpreter `repeats` times on either side.

    Args:
        repeats (`int`, defaults to `300`): Starts of each. Under 100 the noise exceeds what is measured.

    Returns:
        `dict`: `without_ms`, `with_ms` (medians), `ratio` (with / without), `repeats`, and `clock` ("cpu" or "wall").
    """
    with tempfile.TemporaryDirectory() as folder:
        without, with_ = (_environment(Path(folder, name)) for name in ("without", "with"))
        _install_autoload(with_)
        times: dict[Path, list[float]] = {without: [], with_: []}
        for index in range(repeats + WARM_UP):
            # whichever is second finds warmer caches, so they take turns
            for interpreter in (without, with_) if index % 2 else (with_, without):
                times[interpreter].append(_start(interpreter))
    medians = {interpreter: statistics.median(values[WARM_UP:]) * 1e3 for interpreter, values in times.items()}
    return {
        "without_ms": medians[without],
        "with_ms": medians[with_],
        "ratio": medians[with_] / medians[without],
        "repeats": repeats,
        "clock": "cpu" if hasattr(os, "wait4") else "wall",
    }


def _environment(folder: Path) -> Path:
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=300)
    result = run(parser.parse_args().repeats)
    print(
        f"python {sys.version.split()[0]}, bare start ({result['clock']}): {result['without_ms']:.2f} ms without, "
        f"{result['with_ms']:.2f} ms with {MODULE}.pth, ratio {result['ratio']:.4f}"
    )


if __name__ == "__main__":
    main()
