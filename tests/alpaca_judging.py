"""Calls `trl-steer alpaca-eval judge` as a user would, and reads what it leaves behind."""

import json
from pathlib import Path

from trl_steer.eval.alpaca_eval import cli

JUDGE = "weighted_alpaca_eval_gpt4_turbo"


def arguments(outputs: Path, reference: Path, url: str, *more: str, folder: Path | None = None) -> list[str]:
    folder = folder or outputs.parent
    return [
        "judge",
        str(outputs),
        *("--reference", str(reference)),
        *("--endpoint", url),
        *("--cache", str(folder / "cache")),
        *("--output", str(folder / "judged")),
        *("--retries", "2"),
        "--yes",
        *more,
    ]


def judge(outputs: Path, reference: Path, url: str, *more: str, folder: Path | None = None) -> int:
    return cli.main(arguments(outputs, reference, url, *more, folder=folder))


def result(folder: Path) -> dict:
    return json.loads((folder / "judged" / "result.json").read_text())


def annotations(folder: Path) -> list[dict]:
    return json.loads((folder / "judged" / "annotations.json").read_text())


def numbers(found: dict) -> dict:
    """What two runs over the same answers must agree on."""
    names = ("win_rate", "standard_error", "length_controlled_winrate", "lc_standard_error", "avg_length", "n_total")
    return {name: found[name] for name in names}
