"""`python -m trl_steer.eval.benchmarks`."""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from . import report
from .harness import CLOCKS
from .registry import BENCHMARKS, run

MODULE = "trl_steer.eval.benchmarks"


def parser() -> argparse.ArgumentParser:
    description = "Measures the cost of steering, as ratios of measurements in one process."
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=description)
    only = "run this benchmark only; may be repeated (default: all)"
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help=only)
    repeats = "rounds of the slowest benchmarks, at least 7 (default: 7)"
    parser.add_argument("--repeats", type=int, default=7, help=repeats)
    output = "folder to write benchmarks_<device>.json and .md to (default: none)"
    parser.add_argument("--output", type=Path, help=output)
    device = "device (default: the CPU, then the GPU if there is one)"
    parser.add_argument("--device", choices=("cpu", "cuda"), help=device)
    quick = "use tiny models and two rounds, to show that everything works (default: off)"
    parser.add_argument("--quick", action="store_true", help=quick)
    clock = "wall time, or CPU time with one thread, if other processes use the machine (default: wall)"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=clock)
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.repeats < 7:
        parser().error(f"--repeats must be at least 7, got {options.repeats}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda needs a GPU, but there is none")
    command = shlex.join(["python", "-m", MODULE, *arguments])
    for device in [options.device] if options.device else ["cpu", *["cuda"] * torch.cuda.is_available()]:
        results = []
        for name in options.only or BENCHMARKS:
            # In a new process, because the state of the allocator affects the next benchmark.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                results += pool.submit(run, name, device, options.repeats, options.quick, options.clock).result()
        print(f"\n{report.table(results)}\n")
        if options.output:
            print("Wrote", *report.write(results, options.output, device, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
