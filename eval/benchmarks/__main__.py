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
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="run this benchmark; may be repeated")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of the slowest benchmarks, at least 7")
    parser.add_argument("--output", type=Path, help="folder to write benchmarks_<device>.json and .md to")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the CPU, and a GPU if there is one, unless given")
    parser.add_argument("--quick", action="store_true", help="tiny models and two rounds: shows that it runs")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="'cpu' (one thread) on a machine in use")
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.repeats < 7:
        parser().error(f"--repeats must be at least 7, got {options.repeats}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda was given, but torch sees no GPU")
    command = shlex.join(["python", "-m", MODULE, *arguments])
    for device in [options.device] if options.device else ["cpu", *["cuda"] * torch.cuda.is_available()]:
        results = []
        for name in options.only or BENCHMARKS:
            # In a process of its own: what one leaves behind in memory would change what the next allocates for free.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                results += pool.submit(run, name, device, options.repeats, options.quick, options.clock).result()
        print(f"\n{report.table(results)}\n")
        if options.output:
            print("Written:", *report.write(results, options.output, device, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
