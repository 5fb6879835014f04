"""Judging 805 rows with `trl-steer alpaca-eval` and with the package `alpaca-eval` alone, with the same mock judge.

Both reuse their connections. By default, the package creates a client for each request, which takes about 0.1 s and
would dominate the measurement.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .harness import Result, alternate, compare

NAME = "alpaca"
OURS, THEIRS = "trl-steer alpaca-eval judge", "alpaca-eval alone"
ROWS, IN_FLIGHT = 805, 5
SERVER = "trl_steer.eval.benchmarks.alpaca_server"


def run(device: str, repeats: int, quick: bool) -> Iterator[Result]:
    """Yields the ratio of the times for requests, files and metrics. Skipped on a GPU or without the package."""
    if device != "cpu" or importlib.util.find_spec("alpaca_eval") is None:
        return
    from ..alpaca_eval import judges, judging, reference, upstream
    from ..alpaca_eval.client import Client

    count = 24 if quick else ROWS
    with tempfile.TemporaryDirectory() as scratch, _server() as url:
        folder = Path(scratch)
        _write(folder, count)
        known = reference.load(folder)
        outputs = reference.read_outputs(folder / reference.OUTPUTS, known)
        judge = judges.resolve(judges.LEADERBOARD, endpoint=url)
        numbers: dict[str, float] = {}
        fresh = (folder / str(number) for number in itertools.count())

        def ours() -> None:
            place = next(fresh)
            client = Client(url, in_flight=IN_FLIGHT)
            judged = judging.ask(outputs, known, judge, client, place / "cache", lambda cost: None)
            result = judging.evaluate(*judged, outputs, known, judge, place)
            numbers[OURS] = result["length_controlled_winrate"]

        theirs = _package_alone(upstream.load(), folder, url, fresh, numbers)
        with upstream.quiet():
            times = alternate({OURS: ours, THEIRS: theirs}, repeats, device)
    if abs(numbers[OURS] - numbers[THEIRS]) > 1e-6:
        raise RuntimeError(f"The length-controlled win rates are different: {numbers}.")
    case = f"{count} rows, mock judge, {IN_FLIGHT} requests in flight"
    yield compare(NAME, case, times, OURS, THEIRS, bound=None if quick else "<= 1.1")


def _package_alone(
    module: Any, folder: Path, url: str, fresh: Iterator[Path], numbers: dict[str, float]
) -> Callable[[], None]:
    """Judging with the package and its cache."""
    import openai
    import pandas

    baseline = json.loads((folder / "alpaca_eval_gpt4_baseline.json").read_text())
    outputs = json.loads((folder / "model_outputs.json").read_text())
    client = {"http_client": openai.DefaultHttpxClient()}

    def judge() -> None:
        from ..alpaca_eval.judging import local_table

        place = next(fresh)
        place.mkdir()
        annotator = module.annotators.PairwiseAnnotator(caching_path=place / "cache.json")
        annotated = annotator.annotate_head2head(
            baseline,
            outputs,
            openai_api_keys="none",
            openai_api_base=url,
            client_kwargs=client,
            client_config_path="",
            num_procs=IN_FLIGHT,
        )
        table = pandas.DataFrame(annotated)
        table.to_json(place / "annotations.json", orient="records", indent=2)
        with local_table(folder / "df_gamed.csv"):
            metrics = module.metrics.get_length_controlled_winrate(table, save_weights_dir=place / "weights")
        numbers[THEIRS] = metrics["length_controlled_winrate"]

    return judge


def _write(folder: Path, count: int) -> None:
    """Writes reference files and outputs of random words, with realistic lengths."""
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join("".join(draw.choices("etaoinshr", k=5)) for _ in range(draw.randint(least, most)))

    baseline = [
        {
            "instruction": f"{number} {words(5, 50)}",
            "output": words(50, 500),
            "generator": "baseline",
            "dataset": "mock",
        }
        for number in range(count)
    ]
    outputs = [{**row, "output": words(50, 400), "generator": "model"} for row in baseline]
    (folder / "alpaca_eval_gpt4_baseline.json").write_text(json.dumps(baseline))
    (folder / "model_outputs.json").write_text(json.dumps(outputs))
    difficulties = [draw.gauss(0, 1) for _ in range(count)]
    columns = ("index", "instruction_difficulty", "std_delta_len", "preference", "not_gamed_baseline", "model")
    with (folder / "df_gamed.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for name, index in itertools.product(("concise", "verbose"), range(count)):
            writer.writerow([index, difficulties[index], draw.gauss(0, 1), draw.random(), False, name])


@contextmanager
def _server() -> Iterator[str]:
    """The mock judge, in another process, so that it is not measured."""
    process = subprocess.Popen([sys.executable, "-m", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.terminate()
        process.wait()
