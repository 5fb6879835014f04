"""Puts a run's numbers together, and prints and writes them."""

from collections.abc import Sequence
from pathlib import Path

from trl_steer.demo import task
from trl_steer.demo.settings import Settings
from trl_steer.files import read_json, write_json, write_text
from trl_steer.statistics import binomial_standard_error, exact_mcnemar, wilson_interval

MAJORITY = "majority answer"
LEVEL = 0.01


def accuracy(correct: Sequence[bool]) -> dict:
    """Share of correct answers, with its standard error and Wilson's 95% interval."""
    hits, total = sum(correct), len(correct)
    return {
        "accuracy": hits / total,
        "standard_error": binomial_standard_error(hits, total),
        "interval_95": list(wilson_interval(hits, total)),
        "correct": hits,
        "total": total,
    }


def collect(settings: Settings, task_folder: Path, base: Path, steered: Path, adapter: Path) -> dict:
    """All the numbers of a finished run."""
    answers = {"base model": read_json(base)["correct"], settings.method: read_json(steered)["correct"]}
    answers |= task.shortcuts(task_folder)
    training = read_json(adapter / "training.json")
    weights = adapter / "adapter_model.safetensors"
    return {
        "settings": settings.to_dict(),
        "accuracy": {name: accuracy(correct) for name, correct in answers.items()},
        "p_value": {
            f"{settings.method} above {name}": exact_mcnemar(answers[settings.method], answers[name])
            for name in answers
            if name != settings.method
        },
        "training": training,
        "adapter_bytes": weights.stat().st_size,
    }


def accuracy_rows(results: dict) -> list[tuple[str, str, str, str]]:
    method = results["settings"]["method"]
    rows = []
    for name, row in results["accuracy"].items():
        p_value = results["p_value"].get(f"{method} above {name}")
        low, high = row["interval_95"]
        rows.append(
            (
                name,
                f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}",
                f"{low:.3f} to {high:.3f}",
                "" if p_value is None else f"{p_value:.2g}",
            )
        )
    return rows


def cost_rows(results: dict) -> list[tuple[str, str]]:
    training = results["training"]
    return [
        (
            "trainable parameters",
            f"{training['trainable_parameters']:,} ({training['trainable_share']:.3%} of the base)",
        ),
        ("adapter file", f"{results['adapter_bytes'] / 1e6:.2f} MB"),
        ("training", f"{training['seconds']:.0f} s, {training['tokens_per_second']:.0f} tokens/s"),
    ]


def verdict(results: dict) -> str:
    """Says whether steering beats the majority answer, and by what test."""
    method = results["settings"]["method"]
    p_value = results["p_value"][f"{method} above {MAJORITY}"]
    ours, theirs = results["accuracy"][method]["accuracy"], results["accuracy"][MAJORITY]["accuracy"]
    relation = "is significantly above" if p_value < LEVEL else "is not significantly above"
    return (
        f"{method} ({ours:.3f}) {relation} the majority answer ({theirs:.3f}): p = {p_value:.2g}, exact McNemar test, "
        f"{results['accuracy'][method]['total']} held-out examples."
    )


ACCURACY_HEADER = ("", "accuracy ± s.e.", "95% interval", "p (adapter above)")


def write(results: dict, folder: Path) -> None:
    """Writes `results.json` and `results.md`."""
    lines = ["| " + " | ".join(ACCURACY_HEADER) + " |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in accuracy_rows(results)]
    lines += ["", "| cost | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cost_rows(results))]
    lines += ["", verdict(results), "", "Evaluate the saved adapter again:", "", "```bash", results["command"], "```"]
    write_text(folder / "results.md", "\n".join(lines) + "\n")
    write_json(folder / "results.json", results)


def show(results: dict) -> None:
    """Prints the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(*ACCURACY_HEADER, title="Held-out ListOps, scored by lm-eval", title_justify="left")
    for row in accuracy_rows(results):
        table.add_row(*row, style="bold" if row[0] == results["settings"]["method"] else None)
    console.print(table)
    costs = Table(show_header=False)
    for cost in cost_rows(results):
        costs.add_row(*cost)
    console.print(costs)
    console.print(verdict(results), highlight=False)
    console.print("\nEvaluate the saved adapter again:", highlight=False)
    # Not through rich, which would break the line.
    print(results["command"])
