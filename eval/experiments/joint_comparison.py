"""Compares joint adaptation in orthogonal subspaces with naive joint training, LoRA and steering.

    python -m trl_steer.eval.experiments.joint_comparison --seeds 0 1 2

Each method is a run of `trl-steer demo` on SmolLM2-135M-Instruct, with the same generated ListOps examples, steps and
schedule, the best learning rates of LoRA and steering alone, and 200 held-out examples per seed, evaluated with
lm-eval. Finished runs are not repeated, so that seeds can be added later. A seed for which a run fails is left out.
The corresponding experiment in the paper is Table 4 of arXiv 2603.00425.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trl_steer.files import write_json, write_text
from trl_steer.statistics import exact_mcnemar, paired_bootstrap, t_interval, wilson_interval

from .. import runs
from ..console import Console
from ..demo import preset

METHODS: dict[runs.Method, str] = {
    "lora": "LoRA r=8",
    "low_rank": "steering r=8",
    "joint": "joint, naive",
    "joint_orth": "joint, orthogonal",
}
OURS: runs.Method = "joint_orth"
TASK = preset.settings().task
Runs = Mapping[runs.Method, runs.Run]


def train_and_score(seeds: Sequence[int], folder: Path, demo_arguments: Sequence[str] = ()) -> dict[int, Runs]:
    """Makes the run `METHOD-seedN` for every method and seed. Returns the runs of the seeds for which none failed."""
    parser = argparse.ArgumentParser()
    preset.add_arguments(parser)
    console = Console()
    made: dict[int, Runs] = {}
    for seed in seeds:
        of_seed = {}
        for method in METHODS:
            name = f"{method}-seed{seed}"
            arguments = ["--method", method, "--seed", str(seed), "--output", str(folder / name), *demo_arguments]
            settings, output = preset.from_arguments(parser.parse_args(arguments))
            console.note(name)
            try:
                of_seed[method] = runs.make(settings, output, report=console)
            except runs.RunError as error:
                console.note(f"{name} failed: {error}")
        if len(of_seed) == len(METHODS):
            made[seed] = of_seed
    console.close()
    return made


def summarize(made: Mapping[int, Runs]) -> dict:
    """The accuracies, and the differences between the orthogonal joint adapter and the other methods."""
    rows, correct = {}, {}
    for method in METHODS:
        of_method = [of_seed[method] for of_seed in made.values()]
        correct[method] = per_seed = [run.correct(TASK) for run in of_method]
        accuracies = [statistics.fmean(answers) for answers in per_seed]
        rows[method] = {
            "accuracies": accuracies,
            "accuracy": statistics.fmean(accuracies),
            "interval_95": list(wilson_interval(sum(map(sum, per_seed)), sum(map(len, per_seed)))),
            "trainable_parameters": of_method[0].training["trainable_parameters"],
        }
    differences = {method: difference(correct[OURS], correct[method]) for method in METHODS if method != OURS}
    return {"seeds": list(made), "methods": rows, "differences": differences}


def difference(ours: Sequence[Sequence[bool]], theirs: Sequence[Sequence[bool]]) -> dict:
    """The difference of two accuracies on the same examples, with a list of answers for each seed.

    There are separate intervals for the choice of examples (bootstrap over all pairs, with the exact McNemar test) and
    for the seed (t interval over seeds).
    """
    by_seed = [statistics.fmean(a - b for a, b in zip(*pair, strict=True)) for pair in zip(ours, theirs, strict=True)]
    all_ours, all_theirs = ([answer for answers in side for answer in answers] for side in (ours, theirs))
    _, over_examples = paired_bootstrap(all_ours, all_theirs)
    return {
        "difference": statistics.fmean(by_seed),
        "by_seed": by_seed,
        "interval_95_examples": list(over_examples),
        "interval_95_seeds": list(t_interval(by_seed)),
        "p_value": exact_mcnemar(all_ours, all_theirs, alternative="two-sided"),
    }


def verdict(summary: dict) -> str:
    """A sentence for each comparison. A difference is significant if neither interval contains zero."""
    sentences = []
    for method, row in summary["differences"].items():
        intervals = (row["interval_95_examples"], row["interval_95_seeds"])
        if all(low > 0 for low, _ in intervals):
            relation = "beats"
        elif all(high < 0 for _, high in intervals):
            relation = "is worse than"
        else:
            relation = "does not differ beyond noise from"
        sentences.append(f"{METHODS[OURS].capitalize()} {relation} {METHODS[method]} ({row['difference']:+.3f}).")
    return " ".join(sentences)


def to_markdown(summary: dict) -> str:
    seeds = " ".join(map(str, summary["seeds"]))
    lines = [
        "# Joint adaptation on SmolLM2-135M-Instruct and generated ListOps",
        "",
        f"`python -m trl_steer.eval.experiments.joint_comparison --seeds {seeds}`. 480 training examples, one epoch, "
        "200 held-out examples a seed, greedy answers scored by lm-eval; data, initial weights and order follow the "
        "seed.",
        "",
        "| method | trainable | accuracy | 95% interval | by seed |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for method, row in summary["methods"].items():
        low, high = row["interval_95"]
        by_seed = ", ".join(f"{accuracy:.3f}" for accuracy in row["accuracies"])
        lines.append(
            f"| {METHODS[method]} | {row['trainable_parameters']:,} | {row['accuracy']:.3f} | {low:.3f} to {high:.3f} "
            f"| {by_seed} |"
        )
    lines += [
        "",
        f"{METHODS[OURS].capitalize()} minus each other method, on the same examples:",
        "",
        "| | difference | 95%, examples | 95%, seeds | p (McNemar) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for method, row in summary["differences"].items():
        examples, over_seeds = (
            f"{low:+.3f} to {high:+.3f}" for low, high in (row["interval_95_examples"], row["interval_95_seeds"])
        )
        lines.append(
            f"| {METHODS[method]} | {row['difference']:+.3f} | {examples} | {over_seeds} | {row['p_value']:.2g} |"
        )
    return "\n".join([*lines, "", verdict(summary)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds")
    parser.add_argument("--runs", type=Path, default=Path("demo-run"), help="folder of the runs, finished or not")
    parser.add_argument("--output", type=Path, default=Path("eval/results"), help="folder for the JSON and the table")
    parser.epilog = "Other arguments, such as --model and --fast, are passed to `trl-steer demo`."
    options, demo_arguments = parser.parse_known_args(arguments)
    made = train_and_score(options.seeds, options.runs, demo_arguments)
    if not made:
        return 1
    summary = summarize(made)
    table = to_markdown(summary)
    write_json(options.output / "joint_comparison.json", summary)
    write_text(options.output / "joint_comparison.md", table)
    print(table)
    return 0 if len(made) == len(options.seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
