"""Alternating measurements of time, and ratios with quartiles."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = "wall"


@dataclass(frozen=True)
class Result:
    """
    A ratio, `numerator / denominator`.

    Attributes:
        benchmark (`str`): Name of the benchmark, as in `--only`.
        case (`str`): Model, dtype and mode.
        numerator (`str`), denominator (`str`): Names of the two sides.
        ratio (`float`), low (`float`), high (`float`): Median and quartiles of the ratio.
        values (`tuple[float, float]`): The median of each side, in `unit`.
        bound (`str`, *optional*): Bound on the ratio, for example `"<= 1.02"`.
    """

    benchmark: str
    case: str
    numerator: str
    denominator: str
    ratio: float
    low: float
    high: float
    values: tuple[float, float]
    unit: str
    bound: str | None = None

    @property
    def holds(self) -> bool | None:
        """Whether the ratio is within its bound, `None` without a bound."""
        if self.bound is None:
            return None
        relation, limit = self.bound.split()
        return self.ratio <= float(limit) if relation == "<=" else self.ratio >= float(limit)

    def as_dict(self) -> dict:
        return {**asdict(self), "holds": self.holds}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def use_clock(name: str) -> None:
    """Selects the wall clock, `"wall"`, or CPU time, `"cpu"`, which is less affected by other processes.

    CPU time is measured with a single thread, since waiting threads also use CPU time.
    """
    global _clock
    if name == "cpu":
        torch.set_num_threads(1)
    _clock = name


def current_clock() -> str:
    return _clock


def seconds(function: Callable[[], object], device: str = "cpu") -> float:
    """Seconds for a call of `function`, on a GPU between two events in its stream."""
    if device != "cuda":
        now = CLOCKS[_clock]
        start = now()
        function()
        return now() - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    synchronize(device)
    start_event.record()
    function()
    end_event.record()
    synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


def alternate(
    sides: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu", warmup: int = 1
) -> dict[str, list[float]]:
    """
    Runs each side once per round, so that other load on the machine affects all sides.

    Every other round has the reverse order. Python's garbage collection only runs between rounds.

    Args:
        sides (`dict[str, Callable]`): Functions to measure, by name.
        repeats (`int`): Number of rounds.
        device (`str`, defaults to `"cpu"`): `"cpu"` or `"cuda"`.
        warmup (`int`, defaults to `1`): Number of rounds before these that are not measured.

    Returns:
        `dict[str, list[float]]`: The seconds of each round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # makes the collections between rounds faster
    gc.disable()
    try:
        for round_ in range(-warmup, repeats):
            gc.collect()
            for name in list(sides) if round_ % 2 == 0 else reversed(list(sides)):
                elapsed = seconds(sides[name], device)
                if round_ >= 0:
                    times[name].append(elapsed)
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return times


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    values = list(values)
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def compare(
    benchmark: str,
    case: str,
    measured: dict[str, list[float]],
    numerator: str,
    denominator: str,
    unit: str = "s",
    bound: str | None = None,
) -> Result:
    """The ratio of two sides: the median over rounds of the ratio in each round."""
    low, median, high = quartiles(
        above / below for above, below in zip(measured[numerator], measured[denominator], strict=True)
    )
    values = (statistics.median(measured[numerator]), statistics.median(measured[denominator]))
    return Result(benchmark, case, numerator, denominator, median, low, high, values, unit, bound)
