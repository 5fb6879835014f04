"""A judge's verdict on a model: judgements by the package, kept here, and a file that says what they are worth."""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_steer.files import read_json, write_json, write_text

from . import metrics, package
from .completions import Completions, Estimate, Settings, as_preferences
from .journal import Journal
from .judges import LEADERBOARD, OPENAI, Judge, JudgeError
from .redaction import Redactor
from .reference import COUNT, Reference
from .rows import Outputs

if TYPE_CHECKING:
    import pandas

RESULT = "result.json"
ANNOTATIONS = "annotations.json"
WEIGHTS = "weights"
ANSWERS = "answers.jsonl"
# The order in which a judge sees the two outputs is drawn with it, from the text of the instruction.
SEED = 0


@dataclass(frozen=True)
class Judged:
    """Judgements by canonical row, and what it took to get them."""

    annotations: pandas.DataFrame
    requests: int
    failures: dict[str, int]


def default_cache() -> Path:
    """Where answers of judges are kept unless the user says otherwise: in the Hugging Face cache."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "trl_steer" / "alpaca_eval"


def ask(
    outputs: Outputs,
    reference: Reference,
    judge: Judge,
    cache: Path,
    settings: Settings,
    confirm: Callable[[Estimate], None],
) -> Judged:
    """Has the package annotate the outputs, with every answer of the judge written down as it comes in.

    Raises:
        JudgeError: if the package cannot make a judge of its settings.
        AskingError: if the first call fails.
    """
    import pandas

    redactor = Redactor(judge.keys)
    with package.quiet(redactor):
        config = judge.write(cache)
        try:
            annotator = package.load().annotators.PairwiseAnnotator(
                annotators_config=config,
                seed=SEED,
                caching_path=None,
                is_avoid_reannotations=False,
                is_store_missing_annotations=False,
            )
        except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise JudgeError(
                f"the package alpaca-eval cannot make a judge of {judge.name}'s settings: {redactor(str(error))}"
            ) from error
        journal = Journal(judge.folder(cache) / ANSWERS)
        stand_ins = []
        for single in annotator.annotators.values():
            single.fn_completion_parser = as_preferences(single.fn_completion_parser)
            single.fn_completions = Completions(single, judge, journal, settings, redactor, confirm)
            stand_ins.append(single.fn_completions)
        rows = list(outputs.by_row)
        theirs = [{name: reference.rows[row][name] for name in ("instruction", "output")} for row in rows]
        annotated = annotator.annotate_head2head(
            pandas.DataFrame(
                {**each, "generator": reference.rows[0]["generator"], "dataset": reference.rows[row]["dataset"]}
                for row, each in zip(rows, theirs, strict=True)
            ),
            pandas.DataFrame(
                {
                    "instruction": each["instruction"],
                    "output": outputs.by_row[row],
                    "generator": outputs.generator,
                    "row": row,
                }
                for row, each in zip(rows, theirs, strict=True)
            ),
            is_ordered=True,
            chunksize=None,
        )
    failures: Counter[str] = sum((stand_in.failures for stand_in in stand_ins), Counter())
    table = pandas.DataFrame(annotated).set_index("row").rename_axis(None)
    return Judged(table, sum(stand_in.requests for stand_in in stand_ins), dict(failures))


def is_about(folder: Path, outputs: Outputs) -> bool:
    """Whether the judgements in `folder` are of these outputs, or of some of them."""
    if not (folder / ANNOTATIONS).is_file():
        return False
    return all(outputs.by_row.get(each["row"]) == each["output_2"] for each in read_json(folder / ANNOTATIONS))


def evaluate(judged: Judged, outputs: Outputs, reference: Reference, judge: Judge, folder: Path) -> dict[str, Any]:
    """Writes annotations, coefficients and the result file into `folder`; returns the result."""
    finished = judged.annotations[judged.annotations["preference"].notna()].copy()
    finished["preference"] = finished["preference"].astype(float)
    # With fewer digits, which is what pandas writes by default, the metrics could not be computed again from the file.
    records = finished.reset_index(names="row").to_json(orient="records", indent=2, double_precision=15)
    write_text(folder / ANNOTATIONS, records)
    numbers: dict[str, Any] = {}
    # The package adds to the tables that it finds, which may be of another name or of another number of rows.
    shutil.rmtree(folder / WEIGHTS, ignore_errors=True)
    if len(finished):
        assert reference.gamed is not None
        with package.quiet(Redactor(judge.keys)):
            numbers = metrics.compute(finished, reference.gamed, folder / WEIGHTS)
    missing = sorted(set(outputs.by_row) - set(finished.index))
    result = {
        "name": outputs.generator,
        **dict.fromkeys((*metrics.NUMBERS, "avg_length"), None),
        "n_total": 0,
        **numbers,
        "n_expected": COUNT,
        "complete": not missing,
        "missing_rows": missing,
        "failures": judged.failures,
        "requests": judged.requests,
        "price_dollars": _price(finished),
        "judge": judge.describe(),
        "baseline": reference.rows[0]["generator"],
        "reference": reference.describe(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }
    reasons = not_comparable(result)
    result = {**result, "comparable": not reasons, "not_comparable_because": reasons}
    write_json(folder / RESULT, result)
    return result


_PACKAGES = ("trl-steer", "alpaca-eval", "scikit-learn", "pandas", "openai")


def not_comparable(result: dict[str, Any]) -> list[str]:
    """Why a result cannot be held against the leaderboard; empty if it can."""
    judge, reasons = result["judge"], []
    if result["n_total"] != COUNT:
        reasons.append(f"{result['n_total']} of {COUNT} instructions have a judgement")
    reasons += [f"{name} is no number" for name in metrics.NUMBERS[:4] if result[name] is None]
    if judge["name"] != LEADERBOARD or not judge["shipped"]:
        models = ", ".join(judge["models"])
        reasons.append(f"the judge is {judge['name']} ({models}), and the leaderboard's is {LEADERBOARD} as shipped")
    if judge["endpoint"] != OPENAI:
        reasons.append(f"the judge was asked at {judge['endpoint'] or 'its provider'}, not at {OPENAI}")
    if result["name"] == result["baseline"]:
        reasons.append(
            f"the model is named {result['name']} like the baseline, whose numbers the package then gives it"
        )
    if not result["reference"]["verified"]:
        reasons.append("the reference files could not be verified against the Hub")
    return reasons


def _price(annotations: pandas.DataFrame) -> float | None:
    """Dollars for the judgements that counted, by the package's price table; None where it knows no price."""
    name = "preference_price_per_example"
    if name not in annotations or annotations[name].isna().all():
        return None
    return float(annotations[name].sum())
