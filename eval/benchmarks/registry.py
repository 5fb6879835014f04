"""All benchmarks by name."""

from __future__ import annotations

from transformers.utils import logging

from . import adapters, alpaca, evaluation, gpu, inference, loading, projection, report, startup, training
from .harness import Result, use_clock

BENCHMARKS = {
    module.NAME: module
    for module in (training, inference, adapters, gpu, loading, projection, evaluation, alpaca, startup)
}


def run(name: str, device: str, repeats: int, quick: bool, clock: str = "wall") -> list[Result]:
    """Runs a benchmark, and prints each result."""
    logging.set_verbosity_error()
    use_clock(clock)
    results = []
    for result in BENCHMARKS[name].run(device, 2 if quick else repeats, quick):
        print(report.line(result), flush=True)
        results.append(result)
    return results
