"""Compares ways to make low-rank steering less sensitive to the learning rate.

    python -m trl_steer.eval.experiments.learning_rates --runs learning-rates

Low-rank steering has a cliff just above its best learning rate. Each variant of [`VARIANTS`] is trained on two tasks,
at rates over two decades, with several seeds, on SmolLM2-135M-Instruct in bfloat16, with adapters in float32. A run is
one epoch with the schedule of `trl-steer sft`, and is scored on held-out examples. Finished runs are not repeated, so
that rates and seeds can be added later, and several processes can share the work. The table and the picture are
written at the end. They also have the finished runs of variants that `--variants` does not name.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from trl_steer.files import FolderInUseError, locked, read_json, write_json
from trl_steer.tuners.steering.layer import SteeringLayer

from ..analysis import figures
from ..analysis.report import Report, table, write
from ..console import Console, output_to
from ..demo import preset
from ..models import EMBEDDED, resolve
from ..reproduce.sweep import Recommendation, recommend
from ..settings import of_preset

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
RESULT = "result.json"


class Task(NamedTuple):
    """
    A task and the size of its runs.

    Attributes:
        name (`str`): The task of `trl_steer.tasks`.
        source (`dict`): Source of its dataset.
        train (`int`), held_out (`int`): Number of examples.
        batch (`int`): Examples in a step.
        is_generated (`bool`): Whether the seed of a run is also that of its examples.
        score (`str`): `"answers"`, the share of examples of which greedy decoding would give the whole completion, or
            `"tokens"`, the share of tokens of completions which it would choose after the right ones.
    """

    name: str
    source: Mapping[str, Any]
    train: int
    held_out: int
    batch: int
    is_generated: bool
    score: str


_LISTS = {"validation": 0, "train": 240, "test": 200, **preset.TOKENS}
TASKS = (
    Task("listops_synthetic", _LISTS, train=240, held_out=200, batch=4, is_generated=True, score="answers"),
    Task("gsm8k", {}, train=64, held_out=32, batch=2, is_generated=False, score="tokens"),
)


@dataclass(frozen=True)
class Variant:
    """
    A way to train low-rank steering. The defaults are those of `PostBlockSteeringConfig` and TRL.

    Args:
        title (`str`): What tables call it.
        init_scale (`float`): Factor on the initial `W_down`.
        up_rate (`float`): Factor on the rate of `W_up`. It is a factor on the update, which is the same for Adam: its
            steps have the size of the rate, whatever that of the gradient.
        divide_by_rms (`bool`): Whether the update of each block is divided by the root mean square of its hidden state
            in the base model, relative to the first block's.
        decay (`float`): Weight of the squared Frobenius norm of `W_up @ W_down`, summed over blocks, in the loss.
        clip_blocks (`bool`): Whether the gradient of each block is clipped by itself, to the norm that it would have
            if all had the same and TRL clipped that of all to 1.
    """

    title: str
    init_scale: float = 1.0
    up_rate: float = 1.0
    divide_by_rms: bool = False
    decay: float = 0.0
    clip_blocks: bool = False


VARIANTS = {
    "default": Variant("today's default"),
    "init_scale": Variant("`init_scale=1e-3`, as the authors'", init_scale=1e-3),
    "up_rate": Variant("rate of `W_up` 16 times that of `W_down`", up_rate=16.0),
    "decay": Variant("decay of the product, 0.01", decay=1e-2),
    "rms": Variant("update divided by the RMS of `h`", divide_by_rms=True),
    "clip": Variant("gradient clipped by block", clip_blocks=True),
}


def run(variant: Variant, task: Task, rate: float, seed: int, model: str, folder: Path) -> dict[str, Any]:
    """Trains and scores one adapter.

    Args:
        variant ([`Variant`]), task ([`Task`]): What is trained.
        rate (`float`): Learning rate.
        seed (`int`): Random seed of the initial weights, the order, and generated examples.
        model (`str`): Checkpoint folder of the model.
        folder (`Path`): An empty folder for the trainer.

    Returns:
        `dict`: `"score"`, 0 if training diverged, and `"losses"`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from trl_steer import DivergenceCallback, PostBlockSteeringConfig
    from trl_steer.tasks import load_task
    from trl_steer.trainers.callbacks import TrainingDivergedError

    torch.manual_seed(seed)
    source = {**task.source, "seed": seed} if task.is_generated else task.source
    rows = load_task(task.name, **source)
    given = {**of_preset("default", "low_rank", task.name)["training"], "learning_rate": rate, "num_train_epochs": 1}
    given["per_device_train_batch_size"] = task.batch
    if variant.clip_blocks:
        given["max_grad_norm"] = 0.0  # by the callback instead
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        args=SFTConfig(
            output_dir=str(folder),
            seed=seed,
            activation_checkpointing=False,
            bf16=False,
            dataloader_pin_memory=torch.accelerator.is_available(),
            per_device_eval_batch_size=20,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **given,
        ),
        train_dataset=rows["train"].shuffle(seed=seed).select(range(task.train)),
        eval_dataset=rows["test"].select(range(task.held_out)),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=PostBlockSteeringConfig(task_type="CAUSAL_LM", init_scale=variant.init_scale),
        callbacks=[DivergenceCallback()],
    )
    adapters = steering_adapters(trainer.model)
    rms = relative_rms(trainer) if variant.divide_by_rms else [1.0] * len(adapters)
    for adapter, size in zip(adapters, rms, strict=True):
        adapter.scaling = variant.up_rate / size
    trainer.add_callback(_Gradients(variant, adapters))
    try:
        trainer.train()
        reached = score(trainer, task.score)
    except TrainingDivergedError:
        reached = 0.0
    return {"score": reached, "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def steering_adapters(model: Any) -> list[Any]:
    """The adapters of a model, in the order of its blocks."""
    return [
        adapter
        for module in model.modules()
        if isinstance(module, SteeringLayer)
        for adapter in module.adapters.values()
    ]


def relative_rms(trainer: Any) -> list[float]:
    """The root mean square of the residual stream behind each block, on a batch of training examples, relative to that
    behind the first. A fresh adapter does not change it."""
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        states = trainer.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states
    real = batch["attention_mask"].bool()
    sizes = [state[real].square().mean().sqrt().item() for state in states[1:]]
    return [size / sizes[0] for size in sizes]


def score(trainer: Any, by: str) -> float:
    """The score of a model on the trainer's held-out examples, see [`Task`]."""
    right: list[torch.Tensor] = []
    trainer.model.eval()
    for batch in trainer.get_eval_dataloader():
        with torch.no_grad():
            logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:]
        chosen = logits[:, :-1].argmax(-1) == labels
        for row, scored in zip(chosen, labels != -100, strict=True):
            right.append(row[scored] if by == "tokens" else row[scored].all().reshape(1))
    return torch.cat(right).float().mean().item()


class _Gradients(TrainerCallback):
    """What a variant does to the gradients, before an optimizer step."""

    def __init__(self, variant: Variant, adapters: Sequence[Any]):
        self.variant, self.adapters = variant, adapters

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.variant.clip_blocks:
            for adapter in self.adapters:
                torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1 / math.sqrt(len(self.adapters)))
        if self.variant.decay:
            for adapter in self.adapters:
                up, down = adapter.up, adapter.down
                # Of decay * ||up @ down||^2.
                up.grad += 2 * self.variant.decay * up.detach() @ (down @ down.T).detach()
                down.grad += 2 * self.variant.decay * (up.T @ up).detach() @ down.detach()


def make(
    folder: Path,
    variants: Sequence[str],
    rates: Sequence[float],
    seeds: Sequence[int],
    tasks: Sequence[Task],
    model: str,
) -> int:
    """Makes all runs that are not finished, nor being made by another process. Returns how many are not finished."""
    grid = [(name, task, rate, seed) for seed in seeds for task in tasks for rate in rates for name in variants]
    console = Console()
    console.start(1)
    console.step("runs")
    missing = 0
    for number, (name, task, rate, seed) in enumerate(grid):
        path = _path(folder, name, task, rate, seed)
        console.progress(number, len(grid), path.name)
        try:
            with locked(path), output_to(path / "log"):
                if not (path / RESULT).exists():
                    write_json(path / RESULT, run(VARIANTS[name], task, rate, seed, model, path / "trainer"))
        except FolderInUseError:
            missing += 1
    console.close()
    return missing


def _path(folder: Path, name: str, task: Task, rate: float, seed: int) -> Path:
    return folder / f"{task.name}-{name}-{rate:g}-seed{seed}"


def summarize(folder: Path, rates: Sequence[float], seeds: Sequence[int], tasks: Sequence[Task]) -> dict[str, Any]:
    """Scores by task, variant and rate, and the plateau of each: the rates around the best whose mean score is within
    one standard error of the difference of two such means. Of each variant, with the seeds that all its rates have."""
    summary: dict[str, Any] = {"seeds": [*seeds], "tasks": {}}
    for task in tasks:
        scores: dict[str, dict[float, list[float]]] = {}
        for name in VARIANTS:
            files = {rate: [_path(folder, name, task, rate, seed) / RESULT for seed in seeds] for rate in rates}
            finished = [
                column for column in zip(*files.values(), strict=True) if all(file.is_file() for file in column)
            ]
            if finished:
                found = [[read_json(file)["score"] for file in column] for column in finished]
                scores[name] = dict(zip(rates, map(list, zip(*found, strict=True)), strict=True))
        several = [found for of in scores.values() for found in of.values() if len(found) > 1]
        deviation = math.sqrt(statistics.fmean(map(statistics.variance, several))) if several else 0.0
        noise = {name: deviation * math.sqrt(2 / len(of[rates[0]])) for name, of in scores.items()}
        summary["tasks"][task.name] = {
            "deviation": deviation,
            "scores": {name: {f"{rate:g}": found for rate, found in of.items()} for name, of in scores.items()},
            "plateaus": {name: _plateau(of, noise[name]) for name, of in scores.items()},
        }
    return summary


def _plateau(scores: Mapping[float, Sequence[float]], noise: float) -> dict[str, float]:
    means = {rate: statistics.fmean(of_seeds) for rate, of_seeds in scores.items()}
    if len({*means.values()}) == 1:
        found = Recommendation(min(means), means[min(means)], min(means), max(means))
    else:
        found = recommend(means, noise)
    return {**found._asdict(), "decades": math.log10(found.high / found.low)}


def report(summary: dict[str, Any]) -> Report:
    """The results in words, as tables and as a picture."""
    parts = [
        "Low-rank post-block steering of rank 8 on SmolLM2-135M-Instruct in bfloat16, with adapters in float32. "
        "Scores are means over seeds. The plateau is the range of tried rates around the best whose mean score is "
        "within one standard error of a difference of two means."
    ]
    for task in TASKS:
        found = summary["tasks"].get(task.name)
        if found is None:
            continue
        rates = list(next(iter(found["scores"].values())))
        rows = []
        for name, of in found["scores"].items():
            plateau = found["plateaus"][name]
            means = [f"{statistics.fmean(of[rate]):.3f}" for rate in rates]
            span = f"{plateau['low']:g} to {plateau['high']:g}"
            best = (f"{plateau['score']:.3f}", span, f"{plateau['decades']:.1f}")
            rows.append((VARIANTS[name].title, len(of[rates[0]]), *means, *best))
        what = "exactly right answers" if task.score == "answers" else "right tokens of completions"
        parts += [
            f"## {task.name}\n\n{task.train} training examples; the share of {what}, of {task.held_out} held-out "
            f"examples. Standard deviation over seeds: {found['deviation']:.3f}.",
            table(("", "seeds", *rates, "best", "plateau", "decades"), rows),
        ]
    return Report("Learning rates of low-rank steering", summary, "\n\n".join(parts), _figure(summary))


def _figure(summary: dict[str, Any]) -> Any:
    tasks = summary["tasks"]
    figure, panels = figures.new_row(len(tasks), 3.6 * len(tasks), 3.2)
    for axes, (task, found) in zip(panels, tasks.items(), strict=True):
        for series, (name, of) in enumerate(found["scores"].items()):
            rates, means = [*map(float, of)], [*map(statistics.fmean, of.values())]
            figures.draw(axes, rates, means, series, VARIANTS[name].title.replace("`", ""))
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("mean score")
        axes.set_title(task, fontsize=9)
    figures.legend_beside(figure, panels)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = [task.name for task in TASKS]
    parser.add_argument("--tasks", nargs="+", choices=names, default=names, help="the tasks")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="the variants to train"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="learning rates")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="random seeds")
    parser.add_argument("--model", default=EMBEDDED, help="Hub id or checkpoint folder")
    parser.add_argument(
        "--runs", type=Path, default=Path("learning-rates"), help="folder of the runs, finished or not"
    )
    parser.add_argument("--output", type=Path, default=Path("eval/results"), help="folder for JSON, table and picture")
    options = parser.parse_args(arguments)
    tasks = [task for task in TASKS if task.name in options.tasks]
    model = resolve(options.model)
    missing = make(options.runs, options.variants, options.rates, options.seeds, tasks, model)
    if missing:
        print(f"{missing} runs are still being made by other processes. The same command shows the results then.")
        return 0
    made = report(summarize(options.runs, options.rates, options.seeds, tasks))
    command = ["python", "-m", "trl_steer.eval.experiments.learning_rates", "--tasks", *options.tasks]
    if options.variants != list(VARIANTS):
        command += ["--variants", *options.variants]
    command += ["--rates", *(f"{rate:g}" for rate in options.rates), "--seeds", *map(str, options.seeds)]
    write(made, options.output, "learning_rates", command)
    print(made.summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
