"""The report of the demo."""

from collections import Counter
from typing import Any

from trl_steer.files import write_text
from trl_steer.statistics import binomial_standard_error, exact_mcnemar, wilson_interval
from trl_steer.tasks import get_task, listops

from ..runs import Run

BASE, MAJORITY, ROOT = "base model", "majority answer", "root operator over all digits"
ROOT_MEANS = (
    f"{ROOT}: a baseline without a model, which treats a nested list as a flat one. This is correct for most lists "
    "that are as short as these, so a high accuracy does not show that a model evaluates nested lists."
)
HEADER = ("", "accuracy ± s.e.", "95% interval", "p (adapter above)")
LEVEL = 0.01


def answers(run: Run) -> dict[str, list[bool]]:
    """Whether each held-out example was answered correctly, by the models and by the baselines without a model."""
    settings: dict[str, Any] = run.settings or {}
    task = settings["task"]
    return {
        BASE: run.correct(task, base=True),
        settings["method"]: run.correct(task),
        **baselines(settings["benchmark"], settings["source"]),
    }


def baselines(benchmark: str, source: dict[str, Any]) -> dict[str, list[bool]]:
    """Whether each test row of a ListOps benchmark is answered correctly by each baseline."""
    rows = get_task(benchmark).rows(**source)
    majority = Counter(rows["train"]["Target"]).most_common(1)[0][0]
    expressions, targets = rows["test"]["Source"], rows["test"]["Target"]
    guesses = {
        MAJORITY: [majority for _ in expressions],
        "largest digit": [listops.largest_digit(text) for text in expressions],
        ROOT: [listops.root_operator_over_all_digits(text) for text in expressions],
    }
    return {name: [a == b for a, b in zip(guess, targets, strict=True)] for name, guess in guesses.items()}


def accuracy_rows(method: str, answers: dict[str, list[bool]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, correct in answers.items():
        hits, total = sum(correct), len(correct)
        low, high = wilson_interval(hits, total)
        p_value = "" if name == method else f"{exact_mcnemar(answers[method], correct):.2g}"
        accuracy = f"{hits / total:.3f} ± {binomial_standard_error(hits, total):.3f}"
        rows.append((name, accuracy, f"{low:.3f} to {high:.3f}", p_value))
    return rows


def cost_rows(run: Run) -> list[tuple[str, str]]:
    training = run.training
    size = (run.adapter / "adapter_model.safetensors").stat().st_size
    return [
        (
            "trainable parameters",
            f"{training['trainable_parameters']:,} ({training['trainable_share']:.3%} of the base)",
        ),
        ("adapter file", f"{size / 1e6:.2f} MB"),
        ("training", f"{training['seconds']:.0f} s, {training['tokens_per_second']:.0f} tokens/s"),
    ]


def verdict(method: str, answers: dict[str, list[bool]]) -> str:
    """A sentence on whether the adapter is significantly better than the majority answer."""
    ours, theirs = answers[method], answers[MAJORITY]
    p_value, total = exact_mcnemar(ours, theirs), len(ours)
    relation = "is significantly above" if p_value < LEVEL else "is not significantly above"
    return (
        f"{method} ({sum(ours) / total:.3f}) {relation} the majority answer ({sum(theirs) / total:.3f}): "
        f"p = {p_value:.2g}, exact McNemar test, {total} held-out examples."
    )


def show(run: Run) -> None:
    """Prints the tables, and writes them to `results.md` in the folder of the run."""
    from rich.console import Console
    from rich.table import Table

    method = (run.settings or {})["method"]
    found, costs, command = answers(run), cost_rows(run), run.command()
    rows, said = accuracy_rows(method, found), verdict(method, found)
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", ROOT_MEANS, "", "| cost | |", "|---|---|", *(f"| {name} | {value} |" for name, value in costs)]
    lines += ["", said, "", "Evaluate the saved adapter again:", "", "```bash", command, "```"]
    if not run.results.is_file():  # the folder of a finished run may be read-only
        write_text(run.results, "\n".join(lines) + "\n")

    console = Console(highlight=False)
    table = Table(*HEADER, title="Held-out ListOps, evaluated with lm-eval", title_justify="left", caption=ROOT_MEANS)
    table.caption_justify = "left"
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == method else None)
    console.print(table)
    cost_table = Table(show_header=False)
    for cost in costs:
        cost_table.add_row(*cost)
    console.print(cost_table)
    console.print(said)
    console.print("\nEvaluate the saved adapter again:")
    # Not with rich, which would wrap the lines.
    print(command)
