"""The paper's tables beside the results of a study."""

from __future__ import annotations

from . import paper
from .records import Record
from .results import NONE, percent, points
from .summary import Summary
from .tables import Table

WRONG = "*"
_WITH_RANKS = {
    "low_rank": {8: paper.OURS, 1: paper.RANK_1, 64: paper.ADAPTER},
    "lora": {8: paper.LORA, 16: paper.LORA_16},
    "loreft": {8: paper.REFT},
}
_OTHERS = {
    "full": paper.SFT,
    "vector": paper.VECTOR,
    "lofit": paper.LOFIT,
    "jola": paper.JOLA,
    "joint": paper.JOINT,
    "joint_orth": paper.JOINT_ORTH,
}


def tables(summary: Summary) -> list[Table]:
    """The study beside the paper, if they have a method and a task in common, and the paper's Tables 1 to 4."""
    beside = _beside(summary)
    return [*([beside] if beside.rows else []), _accuracies(1), _accuracies(2), _win_rates(), _joint()]


def method_of(record: Record, row: str) -> str | None:
    """What the paper's Tables 1, 2 and 4 call the method of a row, or `None` if it is not there."""
    method, r = record.setting(row, "method"), record.setting(row, "r")
    linear = record.setting(row, "steering", "activation") is None
    if method in _WITH_RANKS:
        return _WITH_RANKS[method].get(r) if linear else None
    return _OTHERS.get(method)


def _beside(summary: Summary) -> Table:
    record, rows = summary.record, []
    for task in (task for task in record.tasks if task in paper.TASKS):
        first = True
        for row in record.rows:
            method = method_of(record, row)
            if method is None:
                continue
            ours = []
            for model in record.models:
                delta = summary.delta(model, row, task)
                of_sft = "" if delta is None else f" ({points(delta)})"
                ours.append(percent(summary.score(model, row, task).mean) + of_sft)
            theirs = [_published(model, method, task) for model in paper.MODELS]
            rows.append([paper.title(task) if first else "", row, *ours, *theirs])
            first = False
    header = ["Task", "Method", *record.models, *(f"{model} (paper)" for model in paper.MODELS)]
    caption = "Accuracies in percent, and differences to SFT in points, beside the paper's Tables 1, 2 and 4."
    return Table("beside-the-paper", caption, header, rows)


def _published(model: str, method: str, task: str) -> str:
    score = paper.published(model, method, task)
    if score is None:
        return NONE
    return f"{score.accuracy:.1f} ({_delta(score.recomputed)}{WRONG if score.wrong else ''})"


def _accuracies(number: int) -> Table:
    """Table 1 or 2. Where the printed difference or average is wrong, it follows the recomputed one."""
    rows = []
    for model, of_model in (paper.TABLE_1, paper.TABLE_2)[number - 1].items():
        for method, row in of_model.items():
            cells = [model if method == next(iter(of_model)) else "", method, f"{row.share:g}%"]
            for score in row.scores.values():
                cells += [f"{score.accuracy:.1f}", _checked(score.recomputed, score.delta, score.wrong)]
            rows.append([*cells, _checked(row.recomputed(), row.average, row.wrong)])
    header = [
        "Model",
        "Method",
        "Trainable",
        *(name for task in paper.TASKS.values() for name in (task, "Δ")),
        "Avg. Δ",
    ]
    caption = f"The paper's Table {number}: accuracy in percent, and its difference to SFT in points, recomputed."
    return Table(f"paper-{number}", caption, header, rows)


def _win_rates() -> Table:
    rows = [[name, f"{share:g}%", f"{rate:.2f}", f"{error:.2f}"] for name, share, rate, error in paper.TABLE_3]
    header = ["Method", "Trainable", "LC win rate", "SE"]
    return Table("paper-3", "The paper's Table 3: Llama-3.1-8B on Alpaca-Cleaned, in percent.", header, rows, left=1)


def _joint() -> Table:
    rows, before = [], None
    for (model, task), accuracies in paper.TABLE_4.items():
        cells = [
            f"{accuracy:.1f}{WRONG if paper.contradicted(model, method, task) else ''}"
            for method, accuracy in zip(paper.TABLE_4_METHODS, accuracies, strict=True)
        ]
        rows.append([model if model != before else "", paper.TASKS[task], *cells])
        before = model
    caption = "The paper's Table 4: accuracy in percent."
    return Table("paper-4", caption, ["Model", "Task", *paper.TABLE_4_METHODS], rows)


def _checked(recomputed: float, printed: float, wrong: bool) -> str:
    return f"{_delta(recomputed)}{WRONG} ({_delta(printed)})" if wrong else _delta(recomputed)


def _delta(value: float) -> str:
    return points(value / 100)
