"""Distills a full fine-tune on the demo's task into a steering adapter, and can train on from there.

    python -m trl_steer.eval.experiments.distillation --seed 0

SmolLM2-135M-Instruct is fine-tuned on the demo's generated ListOps expressions (all parameters, the default preset).
`trl_steer.analysis.distill` explains the result by a low-rank steering adapter of rank 8, in closed form, on the same
examples. Reported is the share of the accuracy gap between the base model and the fine-tuned one that this adapter
closes, next to the accuracy of the same adapter trained from zero, and with `--steps` of a short training that starts
from the distilled one. All accuracies are of greedy answers to the demo's 200 held-out examples, scored by lm-eval.
What is finished in the folder of the runs is not repeated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl_steer.files import new_folder, read_json, write_json
from trl_steer.statistics import exact_mcnemar, wilson_interval

from .. import models, runs
from ..analysis import figures
from ..analysis.report import Report, table, write
from ..console import Console
from ..demo import preset
from ..settings import Method

METHOD: Method = "low_rank"
RANK = 8
BASE, FINE_TUNED, DISTILLED = "base model", "full fine-tune", "distilled, without training"
FROM_ZERO, CONTINUED = "trained from zero", "trained from the distilled adapter"


def fine_tuned(seed: int, folder: Path, model: str) -> Path:
    """The folder of the fine-tuned model, which is trained if it does not exist."""
    if not folder.is_dir():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        from trl_steer import DivergenceCallback
        from trl_steer.tasks import load_task

        settings = preset.settings("full", seed)  # type: ignore[arg-type]
        torch.manual_seed(seed)
        with new_folder(folder) as partial:
            trainer = SFTTrainer(
                model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
                args=SFTConfig(
                    output_dir=str(partial),
                    seed=seed,
                    activation_checkpointing=False,
                    bf16=False,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    logging_steps=1000,
                    **settings.training,
                ),
                train_dataset=load_task(settings.benchmark, **settings.source)["train"],
                processing_class=AutoTokenizer.from_pretrained(model),
                callbacks=[DivergenceCallback()],
            )
            trainer.train()
            trainer.save_model()
    return folder


def distilled(seed: int, folder: Path, model: str, tuned: Path, console: Console) -> Path:
    """The folder of the distilled adapter, with `distillation.json`. It is made if it does not exist."""
    if folder.is_dir():
        return folder
    from trl_steer import PostBlockSteeringConfig
    from trl_steer.analysis import Split, distill, split_rows, text_batches
    from trl_steer.tasks import load_task

    settings = preset.settings(METHOD, seed)
    rows = load_task(settings.benchmark, **settings.source)["train"]
    base, tokenizer = models.load(model)
    goal, _ = models.load(str(tuned))
    texts = [row["prompt"] + row["completion"] for row in rows]
    split = Split(*(text_batches(tokenizer, part) for part in split_rows(texts)))
    console.start(1)
    console.step("Distilling")
    start = time.perf_counter(), time.process_time()
    config = PostBlockSteeringConfig(task_type="CAUSAL_LM", r=RANK)
    made = distill(base, goal, split, config, progress=console.progress)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    console.end(f"{seconds[0]:.0f} s")
    tokens = {name: sum(int(b["attention_mask"].sum()) for b in getattr(split, name)) for name in split._fields}
    with new_folder(folder) as partial:
        made.model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        record = {"tokens": tokens, "seconds": seconds[0], "cpu_seconds": seconds[1], "blocks": made.report}
        write_json(partial / "distillation.json", record)
    return folder


def correct(name: str, seed: int, folder: Path, model: str, adapter: Path | None, console: Console) -> list[bool]:
    """Whether each held-out example is answered correctly, kept in `folder`."""
    file = folder / f"{name}-seed{seed}.json"
    if not file.is_file():
        from ..scoring import score

        console.start(1)
        console.step(f"Scoring {name}")
        scores = score(preset.settings(METHOD, seed), preset.TASK, model, adapter, runs.TASKS, console)
        write_json(file, scores)
        console.end(f"accuracy {scores['accuracy']:.3f}")
    return [example["correct"] for example in read_json(file)["examples"]]


def measure(seed: int, folder: Path, steps: int | None, rate: float, console: Console) -> dict[str, Any]:
    """Makes what is missing in the folder of the runs, and returns the results."""
    settings = preset.settings(METHOD, seed)
    model = models.resolve(settings.model, console.note)
    tuned = fine_tuned(seed, folder / f"full-seed{seed}", model)
    adapter = distilled(seed, folder / f"distilled-seed{seed}", model, tuned, console)
    answers = {
        BASE: correct("base", seed, folder, model, None, console),
        FINE_TUNED: correct("full", seed, folder, str(tuned), None, console),
        DISTILLED: correct("distilled", seed, folder, model, adapter, console),
    }
    trained = {FROM_ZERO: runs.make(settings, folder / f"{METHOD}-seed{seed}", report=console)}
    if steps is not None:
        short = replace(
            settings,
            training={**settings.training, "max_steps": steps, "learning_rate": rate},
            steering={"init_from": str(adapter.resolve())},
        )
        trained[CONTINUED] = runs.make(short, folder / f"continued-{steps}-{rate:g}-seed{seed}", report=console)
    answers |= {name: run.correct(preset.TASK) for name, run in trained.items()}
    record = read_json(adapter / "distillation.json")
    accuracy = {name: sum(right) / len(right) for name, right in answers.items()}
    made = {name: run.training["steps"] for name, run in trained.items()}
    return {
        "seed": seed,
        "train_examples": settings.source["train"],
        "rank": RANK,
        "learning_rate": rate,
        "distillation": record,
        "steps": {BASE: 0, FINE_TUNED: made[FROM_ZERO], DISTILLED: 0, **made},
        "accuracy": accuracy,
        "interval_95": {name: list(wilson_interval(sum(right), len(right))) for name, right in answers.items()},
        "p_value": exact_mcnemar(answers[DISTILLED], answers[FROM_ZERO], alternative="two-sided"),
        "gap_closed": (accuracy[DISTILLED] - accuracy[BASE]) / (accuracy[FINE_TUNED] - accuracy[BASE]),
    }


def report(results: dict[str, Any]) -> Report:
    """The results in words, as a table and as a picture."""
    accuracy, made, steps = results["accuracy"], results["distillation"], results["steps"]
    rows = [
        (name, steps[name], value, "{:.3f} to {:.3f}".format(*results["interval_95"][name]))
        for name, value in accuracy.items()
    ]
    summary = (
        f"SmolLM2-135M-Instruct and the demo's nested lists, seed {results['seed']}: {results['train_examples']} "
        "training examples, 200 held-out ones, greedy answers scored by lm-eval. The adapter has rank "
        f"{results['rank']} and was distilled on {made['tokens']['fit']} tokens of the training examples, in "
        f"{made['cpu_seconds']:.0f} s of processor time, from a full fine-tune on the same examples.\n\n"
        + table(("", "steps", "accuracy", "95% interval"), rows)
        + f"\n\nWithout any training, the distilled adapter closes {results['gap_closed']:.0%} of the accuracy gap "
        f"between the base model and the fine-tuned one. The same adapter trained from zero for {steps[FROM_ZERO]} "
        f"steps reaches {accuracy[FROM_ZERO]:.3f}, the distilled one {accuracy[DISTILLED]:.3f} "
        f"(p = {results['p_value']:.2g}, two-sided exact McNemar test)."
    )
    if CONTINUED in accuracy:
        summary += (
            f" Trained on from the distilled adapter for {steps[CONTINUED]} steps, at a rate of "
            f"{results['learning_rate']:g}, it reaches {accuracy[CONTINUED]:.3f}."
        )
    return Report("A full fine-tune, distilled into a steering adapter", results, summary, _figure(results))


def _figure(results: dict[str, Any]) -> Any:
    figure, axes = figures.new_figure(height=2.6)
    names = list(results["accuracy"])[::-1]
    labels = [f"{name}\n({results['steps'][name]} steps)" for name in names]
    accuracy = [results["accuracy"][name] for name in names]
    intervals = [results["interval_95"][name] for name in names]
    below = [value - low for value, (low, _) in zip(accuracy, intervals, strict=True)]
    above = [high - value for value, (_, high) in zip(accuracy, intervals, strict=True)]
    axes.errorbar(accuracy, labels, xerr=[below, above], fmt="o", color=figures.COLOURS[0], capsize=3)
    axes.set_xlabel("accuracy on 200 held-out examples, with 95% interval")
    axes.set_xlim(-0.02, 1)
    axes.margins(y=0.15)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the data and the order")
    parser.add_argument("--steps", type=int, help="steps of a training that starts from the distilled adapter")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="learning rate of this training")
    parser.add_argument("--runs", type=Path, default=Path("demo-run"), help="folder of the runs, finished or not")
    parser.add_argument(
        "--output", type=Path, default=Path("eval/results/analysis"), help="folder for the JSON, the table and picture"
    )
    options = parser.parse_args(arguments)
    console = Console()
    try:
        results = measure(options.seed, options.runs, options.steps, options.learning_rate, console)
    except runs.RunError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    finally:
        console.close()
    command = ["python", "-m", "trl_steer.eval.experiments.distillation", "--seed", str(options.seed)]
    if options.steps is not None:
        command += ["--steps", str(options.steps), "--learning_rate", f"{options.learning_rate:g}"]
    made = report(results)
    write(made, options.output, "distillation", command)
    print(made.summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
