"""Compares methods on the demo's task: joint adaptation with its halves, or post-block steering with the baselines.

    python -m trl_steer.eval.experiments.comparison joint_comparison --seeds 0 1 2
    python -m trl_steer.eval.experiments.comparison baselines --seeds 0 1 2

Each method is a run of `trl-steer demo` on SmolLM2-135M-Instruct, with the same generated ListOps examples, steps and
schedule, the method's own default learning rate, and 200 held-out examples per seed, evaluated with lm-eval. Finished
runs are not repeated, so that seeds can be added later. A seed for which a run fails is left out. The corresponding
experiments in the paper are Tables 4, 1 and 2 of arXiv 2603.00425.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trl_steer.files import write_json, write_text
from trl_steer.statistics import exact_mcnemar, paired_bootstrap, t_interval, wilson_interval

from .. import runs
from ..console import Console
from ..demo import preset
from ..settings import Method


class Comparison(NamedTuple):
    """
    A comparison of one method with others.

    Attributes:
        title (`str`): Title of the table.
        methods (`dict[str, str]`): The methods, and what tables call them.
        ours (`str`): The one that is compared with each of the others.
    """

    title: str
    methods: dict[Method, str]
    ours: Method


COMPARISONS = {
    "joint_comparison": Comparison(
        "Joint adaptation on SmolLM2-135M-Instruct and generated ListOps",
        {"lora": "LoRA r=8", "low_rank": "steering r=8", "joint": "joint, naive", "joint_orth": "joint, orthogonal"},
        "joint_orth",
    ),
    "baselines": Comparison(
        "Baselines on SmolLM2-135M-Instruct and generated ListOps",
        {"low_rank": "steering r=8", "loreft": "LoReFT r=8", "lofit": "LoFiT", "jola": "JoLA"},
        "low_rank",
    ),
}
Runs = Mapping[Method, runs.Run]


def train_and_score(
    methods: Sequence[Method], seeds: Sequence[int], folder: Path, demo_arguments: Sequence[str] = ()
) -> dict[int, Runs]:
    """Makes the run `METHOD-seedN` for every method and seed. Returns the runs of the seeds for which none failed."""
    parser = argparse.ArgumentParser()
    preset.add_arguments(parser)
    console = Console()
    made: dict[int, Runs] = {}
    for seed in seeds:
        of_seed = {}
        for method in methods:
            name = f"{method}-seed{seed}"
            arguments = ["--method", method, "--seed", str(seed), "--output", str(folder / name), *demo_arguments]
            settings, output = preset.from_arguments(parser.parse_args(arguments))
            console.note(name)
            try:
                of_seed[method] = runs.make(settings, output, report=console)
            except runs.RunError as error:
                console.note(f"{name} failed: {error}")
        if len(of_seed) == len(methods):
            made[seed] = of_seed
    console.close()
    return made


def summarize(made: Mapping[int, Runs], comparison: Comparison) -> dict:
    """The accuracies, and the differences between one method and the others."""
    rows, correct = {}, {}
    for method in comparison.methods:
        of_method = [of_seed[method] for of_seed in made.values()]
        correct[method] = per_seed = [run.correct(preset.TASK) for run in of_method]
        accuracies = [statistics.fmean(answers) for answers in per_seed]
        rows[method] = {
            "accuracies": accuracies,
            "accuracy": statistics.fmean(accuracies),
            "interval_95": list(wilson_interval(sum(map(sum, per_seed)), sum(map(len, per_seed)))),
            "trainable_parameters": of_method[0].training["trainable_parameters"],
        }
    ours = comparison.ours
    differences = {method: difference(correct[ours], correct[method]) for method in correct if method != ours}
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


def verdict(summary: dict, comparison: Comparison) -> str:
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
        ours, theirs = (comparison.methods[name] for name in (comparison.ours, method))
        sentences.append(f"{ours[0].upper()}{ours[1:]} {relation} {theirs} ({row['difference']:+.3f}).")
    return " ".join(sentences)


def to_markdown(summary: dict, name: str) -> str:
    comparison = COMPARISONS[name]
    names, ours = comparison.methods, comparison.methods[comparison.ours]
    seeds = " ".join(map(str, summary["seeds"]))
    lines = [
        f"# {comparison.title}",
        "",
        f"`python -m trl_steer.eval.experiments.comparison {name} --seeds {seeds}`. 480 training examples, one epoch, "
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
            f"| {names[method]} | {row['trainable_parameters']:,} | {row['accuracy']:.3f} | {low:.3f} to {high:.3f} "
            f"| {by_seed} |"
        )
    lines += [
        "",
        f"{ours[0].upper()}{ours[1:]} minus each other method, on the same examples:",
        "",
        "| | difference | 95%, examples | 95%, seeds | p (McNemar) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for method, row in summary["differences"].items():
        examples, over_seeds = (
            f"{low:+.3f} to {high:+.3f}" for low, high in (row["interval_95_examples"], row["interval_95_seeds"])
        )
        lines.append(
            f"| {names[method]} | {row['difference']:+.3f} | {examples} | {over_seeds} | {row['p_value']:.2g} |"
        )
    return "\n".join([*lines, "", verdict(summary, comparison)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("name", choices=list(COMPARISONS), help="the comparison")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds")
    parser.add_argument("--runs", type=Path, default=Path("demo-run"), help="folder of the runs, finished or not")
    parser.add_argument("--output", type=Path, default=Path("eval/results"), help="folder for the JSON and the table")
    parser.epilog = "Other arguments, such as --model and --fast, are passed to `trl-steer demo`."
    options, demo_arguments = parser.parse_known_args(arguments)
    comparison = COMPARISONS[options.name]
    made = train_and_score(list(comparison.methods), options.seeds, options.runs, demo_arguments)
    if not made:
        return 1
    summary = summarize(made, comparison)
    table = to_markdown(summary, options.name)
    write_json(options.output / f"{options.name}.json", summary)
    write_text(options.output / f"{options.name}.md", table)
    print(table)
    return 0 if len(made) == len(options.seeds) else 1


if __name__ == "__main__":
    sys.exit(main())
