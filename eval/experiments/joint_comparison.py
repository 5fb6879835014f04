"""Does joint adaptation in orthogonal subspaces beat naive joint training, LoRA and steering?

    python -m trl_steer.eval.experiments.joint_comparison --seeds 0 1 2

Each method is a run of `trl-steer demo` on SmolLM2-135M-Instruct: the same generated ListOps examples, steps and
schedule, learning rates that suit LoRA and steering alone, and 200 held-out examples of each seed scored by lm-eval.
Runs that are finished are taken as they are, so more seeds can be added later. The paper's counterpart is Table 4 of
arXiv 2603.00425.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from trl_steer.demo import settings as demo
from trl_steer.demo.run import run as run_demo
from trl_steer.files import read_json, write_json, write_text
from trl_steer.statistics import exact_mcnemar, paired_bootstrap, t_interval, wilson_interval

METHODS: dict[demo.Method, str] = {
    "lora": "LoRA r=8",
    "low_rank": "steering r=8",
    "joint": "joint, naive",
    "joint_orth": "joint, orthogonal",
}
OURS: demo.Method = "joint_orth"


def train_and_score(seeds: Sequence[int], runs: Path, demo_arguments: Sequence[str] = ()) -> None:
    """Makes the folder `runs/METHOD-seedN` of every method and seed. The base model is scored once a seed."""
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    for seed in seeds:
        for method in METHODS:
            folder = runs / f"{method}-seed{seed}"
            arguments = ["--method", method, "--seed", str(seed), "--output", str(folder), *demo_arguments]
            settings, _ = demo.from_arguments(parser.parse_args(arguments))
            _share_base(settings, folder, runs)
            run_demo(settings, folder)


def _share_base(settings: demo.Settings, folder: Path, runs: Path) -> None:
    """Copies the base model's score from a run that differs in the method alone."""
    wanted = settings.to_dict()
    for score in runs.glob(f"*-seed{settings.seed}/base.json"):
        theirs = read_json(score.with_name("settings.json"))
        if not folder.exists() and all(theirs[key] == wanted[key] for key in wanted.keys() - {"method", "recipe"}):
            write_json(folder / "settings.json", wanted)
            write_json(folder / "base.json", read_json(score))


def summarize(runs: Path, seeds: Sequence[int]) -> dict:
    """The accuracies, and how the orthogonal joint adapter differs from each other method on the same examples."""
    correct = {
        method: [read_json(runs / f"{method}-seed{seed}" / "steered.json")["correct"] for seed in seeds]
        for method in METHODS
    }
    rows = {}
    for method, per_seed in correct.items():
        accuracies = [statistics.fmean(answers) for answers in per_seed]
        training = read_json(runs / f"{method}-seed{seeds[0]}" / "results.json")["training"]
        rows[method] = {
            "accuracies": accuracies,
            "accuracy": statistics.fmean(accuracies),
            "interval_95": list(wilson_interval(sum(map(sum, per_seed)), sum(map(len, per_seed)))),
            "trainable_parameters": training["trainable_parameters"],
        }
    differences = {method: difference(correct[OURS], correct[method]) for method in METHODS if method != OURS}
    return {"seeds": list(seeds), "methods": rows, "differences": differences}


def difference(ours: Sequence[Sequence[bool]], theirs: Sequence[Sequence[bool]]) -> dict:
    """How much better `ours` is on the same examples: one list for each seed.

    Two sources of noise are looked at apart: which examples were drawn (bootstrap over all pairs, and the exact
    McNemar test), and which seed trained (a t interval over seeds, wide with few of them).
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
    """One plain sentence for each comparison: beyond noise only where both intervals leave zero out."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("demo-run"), help="folder of the runs, finished or not")
    parser.add_argument("--output", type=Path, default=Path("eval/results"), help="folder for the JSON and the table")
    parser.epilog = "Other arguments, --model and --fast for example, go to `trl-steer demo`."
    options, demo_arguments = parser.parse_known_args(arguments)
    train_and_score(options.seeds, options.runs.resolve(), demo_arguments)
    summary = summarize(options.runs, options.seeds)
    table = to_markdown(summary)
    write_json(options.output / "joint_comparison.json", summary)
    write_text(options.output / "joint_comparison.md", table)
    print(table)


if __name__ == "__main__":
    main()
