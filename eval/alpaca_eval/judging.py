"""Judges outputs and computes metrics with the package `alpaca-eval`, and writes the result."""

import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl_steer.files import read_json, write_json, write_text

from . import upstream
from .client import Client
from .journal import Journal
from .judges import CONFIG, LEADERBOARD, OPENAI, Judge
from .reference import COUNT, Outputs, Reference

RESULT, ANNOTATIONS, WEIGHTS, ANSWERS = "result.json", "annotations.json", "weights", "answers.jsonl"
NUMBERS = ("length_controlled_winrate", "lc_standard_error", "win_rate", "standard_error")


def ask(
    outputs: Outputs,
    reference: Reference,
    judge: Judge,
    client: Client,
    cache: Path,
    confirm: Callable[[str], None],
    pattern: re.Pattern[str] | None = None,
) -> tuple[Any, dict[str, int]]:
    """Runs the package's annotator on the outputs, and stores every answer of the judge.

    Returns a data frame of judgements, indexed by reference row, and counts of failures by reason. See [`Completions`]
    for the arguments; `cache` has a folder for each judge.

    Raises:
        ValueError: The package does not accept the judge's settings.
        EndpointError: The first request fails.
    """
    import pandas

    from .completions import Completions

    with upstream.quiet():
        annotator = _annotator(judge)
        (single,) = annotator.annotators.values()
        journal = Journal(judge.folder(cache) / ANSWERS)
        single.fn_completions = completions = Completions(single, judge, client, journal, pattern, confirm)
        single.fn_completion_parser, single.completions_kwargs = completions.preferences, {}
        rows, texts = list(outputs.by_row), list(outputs.by_row.values())
        theirs = pandas.DataFrame([reference.rows[row] for row in rows])
        ours = theirs.assign(output=texts, generator=outputs.generator, row=rows)
        annotated = annotator.annotate_head2head(theirs, ours, is_ordered=True, chunksize=None)
    return pandas.DataFrame(annotated).set_index("row").rename_axis(None), dict(completions.failures)


def _annotator(judge: Judge) -> Any:
    import yaml

    with tempfile.TemporaryDirectory() as scratch:
        # The package expects the path of a prompt to be relative to the parent of the configuration's folder.
        folder = Path(scratch) / judge.label
        config = {**judge.config, "prompt_template": f"{folder.name}/prompt.txt"}
        write_text(folder / "prompt.txt", judge.config["prompt_template"])
        write_text(folder / CONFIG, yaml.safe_dump({judge.name: config}, sort_keys=False))
        try:
            return upstream.load().annotators.PairwiseAnnotator(
                annotators_config=folder / CONFIG,
                caching_path=None,
                is_avoid_reannotations=False,
                is_store_missing_annotations=False,
            )
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"The package alpaca-eval rejects the settings of {judge.name}: {error}") from error


def is_about(folder: Path, outputs: Outputs) -> bool:
    """Whether all judgements in `folder` are of these outputs."""
    if not (folder / ANNOTATIONS).is_file():
        return False
    return all(outputs.by_row.get(each["row"]) == each["output_2"] for each in read_json(folder / ANNOTATIONS))


def evaluate(
    annotations: Any, failures: dict[str, int], outputs: Outputs, reference: Reference, judge: Judge, folder: Path
) -> dict[str, Any]:
    """Writes the judgements of [`ask`], the coefficients and the result to `folder`. Returns the result."""
    finished = annotations[annotations["preference"].notna()].astype({"preference": float})
    # With the fewer digits of pandas' default, the metrics could not be reproduced from the file.
    records = finished.reset_index(names="row").to_json(orient="records", indent=2, double_precision=15)
    write_text(folder / ANNOTATIONS, records)
    # The package appends to existing tables, which may be for another name or number of rows.
    shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
    missing = sorted(set(outputs.by_row) - set(finished.index))
    result = {
        "name": outputs.generator,
        **dict.fromkeys((*NUMBERS, "avg_length")),
        "n_total": 0,
        **(metrics(finished, reference, folder / WEIGHTS) if len(finished) else {}),
        "complete": not missing,
        "missing_rows": missing,
        "failures": failures,
        "judge": judge.describe(),
        "baseline": reference.rows[0]["generator"],
        "reference": reference.describe(),
        "versions": {name: version(name) for name in ("trl-steer", "alpaca-eval", "scikit-learn", "pandas")},
    }
    reasons = not_comparable(result)
    result = {**result, "comparable": not reasons, "not_comparable_because": reasons}
    write_json(folder / RESULT, result)
    return result


def metrics(annotations: Any, reference: Reference, weights: Path) -> dict[str, Any]:
    """The package's metrics by reference row, in percent, `None` for NaN. Writes coefficients to `weights`."""
    package = upstream.load().metrics
    ordered = annotations.sort_index()  # the folds of the cross-validation depend on the order
    with upstream.quiet(), local_table(reference.gamed):
        try:
            found = package.get_length_controlled_winrate(
                ordered, save_weights_dir=weights, is_add_glm_preference_inplace=False
            )
        except (ValueError, ArithmeticError, LookupError):  # too few rows, or all with the same preference
            found = {**dict.fromkeys(NUMBERS, math.nan), **package.get_winrate(ordered)}
    numbers = {name: None if math.isnan(value) else float(value) for name, value in found.items()}
    counts = {name: int(value) for name, value in found.items() if name.startswith("n_")}
    # As in the package: the mean over the model's outputs, in characters, rounded down.
    return {**numbers, **counts, "avg_length": int(ordered["output_2"].str.len().mean())}


@contextmanager
def local_table(gamed: Path | None) -> Iterator[None]:
    """Context manager in which the package reads our table. Otherwise it would download it, at no fixed revision."""
    glm = upstream.load().metrics.glm_winrate
    theirs = glm.hf_hub_download
    glm.hf_hub_download = lambda **_: str(gamed)
    try:
        yield
    finally:
        glm.hf_hub_download = theirs


def not_comparable(result: dict[str, Any]) -> list[str]:
    """Reasons why a result is not comparable with the leaderboard. Empty if it is."""
    judge = result["judge"]
    reasons = {
        f"{result['n_total']} of {COUNT} instructions have a judgement": result["n_total"] != COUNT,
        **{f"{name} is NaN": result[name] is None for name in NUMBERS},
        f"the judge is {judge['name']} ({judge['model']}), not {LEADERBOARD} as shipped": judge["name"] != LEADERBOARD
        or not judge["shipped"],
        f"the endpoint of the judge is {judge['endpoint']}, not {OPENAI}": judge["endpoint"] != OPENAI,
        "the model has the name of the baseline, whose numbers it then gets": result["name"] == result["baseline"],
        "the reference files are copies, not downloaded": result["reference"]["revision"] is None,
    }
    return [reason for reason, holds in reasons.items() if holds]
