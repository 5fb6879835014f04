"""What a study will do and has done: its size, trainable parameters, and the time that is left."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from trl_steer import presets

from .. import models
from ..settings import Settings
from .results import Result, results_of
from .shapes import SHAPES
from .study import Cell, Study


class Trainable(NamedTuple):
    """
    The trainable parameters of a row on a model.

    Attributes:
        parameters (`int`): Their number.
        share (`float`): Their share of the number of parameters of the base model.
    """

    parameters: int
    share: float


def seconds_left(found: Sequence[Result], size: int) -> float | None:
    """The time for all cells that are not finished, one after the other, in seconds.

    A cell takes as long as finished ones of the same model, task and row, or of the same model and task, or as all.

    Args:
        found (`list[Result]`): The cells that are known.
        size (`int`): The number of all cells.

    Returns:
        `float`: `None` if no cell is finished.
    """
    known: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for result in found:
        if result.run is not None:
            for key in _kinds(result.cell):
                known[key].append(result.seconds)
    if () not in known:
        return None
    left = 0.0
    for result in found:
        if result.run is None and result.failure is None:
            left += fmean(next(known[key] for key in _kinds(result.cell) if key in known))
    return left + (size - len(found)) * fmean(known[()])


def configuration(model: str) -> Any:
    """The configuration of a model: that of [`SHAPES`], or else that of its folder or the Hub.

    Raises:
        OSError: It cannot be read.
        ValueError: transformers does not know its type.
    """
    from transformers import AutoConfig

    shape = SHAPES.get(models.HUB_ID if model == models.EMBEDDED else model)
    return AutoConfig.from_pretrained(model) if shape is None else AutoConfig.for_model(**shape)


def trainable(settings: Settings, config: Any) -> Trainable:
    """The trainable parameters of a run on a model of this configuration, counted on the meta device."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from ..training import peft_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base, adapter = model.num_parameters(), peft_config(settings)
    if adapter is None:
        return Trainable(base, 1.0)
    steered = get_peft_model(model, adapter, low_cpu_mem_usage=True)
    parameters = steered.get_nb_trainable_parameters()[0]
    return Trainable(parameters, parameters / base)


def describe(study: Study, folder: Path, workers: int) -> list[str]:
    """The lines of `--dry-run`."""
    found, size = list(results_of(study, folder)), study.size()
    rates = sum(1 for _ in study.rate_cells())
    lines = [
        f"{study.name}: {study.title}",
        f"models: {', '.join(model.label for model in study.models)}",
        *(f"task: {task.name}, seeds {' '.join(map(str, study.seeds_of(task)))}" for task in study.tasks),
        f"cells: {size}, {rates} to choose rates on validation and {size - rates} on test",
        *status(found, size, workers),
    ]
    unknown = False
    for model in study.models:
        lines += ["", f"{model.label} ({model.name}, {model.dtype})"]
        try:
            config = configuration(model.name)
        except (OSError, ValueError):
            config, unknown = None, True
        for row in study.rows:
            task = study.tasks[0]
            chosen = study.rates_of(row, task)
            settings = study.settings("test", model, task, row, chosen[0], 0)
            counted, why = f"{'unknown':>13} {'':9}", ""
            if config is not None:
                try:
                    counted = "{:>13,} {:9.4%}".format(*trainable(settings, config))
                except (TypeError, ValueError) as error:
                    counted, why = f"{'refused':>13} {'':9}", f": {' '.join(str(error).split())}"
            rates_of_row = ", ".join(f"{rate:g}" for rate in chosen)
            lines.append(f"  {counted}  {row.name}: {row.method}, {rates_of_row}{why}")
    if unknown:
        lines += ["", "Trainable parameters are unknown where the configuration of the model cannot be read."]
    guessed = [*study.guessed, *_guesses_of_presets(study)]
    if guessed:
        lines += ["", "Guessed:", *(f"- {guess}" for guess in guessed)]
    return lines


def status(found: Sequence[Result], size: int, workers: int = 1) -> list[str]:
    """The progress of a study in lines."""
    counts = Counter(
        "left" if result.run is None and result.failure is None else "finished" if result.run else _kind(result)
        for result in found
    )
    counts["left"] += size - len(found)
    line = ", ".join(f"{counts[name]} {name}" for name in ("finished", "diverged", "failed", "left") if counts[name])
    left = seconds_left(found, size)
    if not counts["left"]:
        return [line]
    time = "unknown until a cell is finished" if left is None else f"about {_duration(left / workers)}"
    return [line, f"time left with {workers} worker{'s' if workers > 1 else ''}: {time}"]


def _guesses_of_presets(study: Study) -> list[str]:
    """The values of presets that their source does not give and the rows do not replace, with the rows."""
    rows: dict[str, list[str]] = defaultdict(list)
    for row in study.rows:
        given = {*row.training, *row.lora, *(f"lora_{name}" for name in row.lora)}
        given |= {f"steering_{name}" for name in row.steering} | {*row.steering} | {"learning_rate"}
        preset = presets.settings(row.preset or study.preset, row.method, study.tasks[0].name)
        for name, why in preset.guessed.items():
            if name not in given:
                rows[f"{name} {preset.values[name]}: {why}"].append(row.name)
    return [f"{guess} ({', '.join(names)})" for guess, names in rows.items()]


def _kinds(cell: Cell) -> tuple[tuple[str, ...], ...]:
    """What other cells take as long, the most similar ones first."""
    return (cell.model, cell.task, cell.row), (cell.model, cell.task), ()


def _kind(result: Result) -> str:
    return "diverged" if result.failure is not None and result.failure.diverged else "failed"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
