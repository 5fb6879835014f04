"""`python -m trl_steer.eval.benchmarks`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch
from transformers.utils import logging

from . import alpaca, evaluation, inference, loading, projection, report, startup, training
from .harness import CLOCKS, use_clock

BENCHMARKS = {
    module.NAME: module for module in (training, inference, loading, projection, evaluation, alpaca, startup)
}
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
    logging.set_verbosity_error()
    use_clock(options.clock)
    command = shlex.join(["python", "-m", MODULE, *arguments])
    for device in [options.device] if options.device else ["cpu", *["cuda"] * torch.cuda.is_available()]:
        results = []
        for name in options.only or BENCHMARKS:
            for result in BENCHMARKS[name].run(device, 2 if options.quick else options.repeats, options.quick):
                print(report.line(result), flush=True)
                results.append(result)
        print(f"\n{report.table(results)}\n")
        if options.output:
            print("Written:", *report.write(results, options.output, device, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
