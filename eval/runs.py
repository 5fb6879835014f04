"""Runs: training and evaluation of an adapter, with all settings and results in one folder.

    settings.json        all settings that determine the result
    environment.json     versions, device, threads, command
    adapter/             the PEFT adapter, with its tokenizer; model/ after full fine-tuning
    training.json        losses, seconds, tokens, trainable parameters, peak memory
    scores/<task>.json   accuracy, and all examples: prompt id, text, answer, correct or not
    log                  output of the libraries

Each of them is written atomically. So a run that was killed can be continued, and a finished one is not repeated.
"""

import importlib.metadata
import json
import platform
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trl_steer.checkpoints import is_finished, newest_complete_checkpoint, step_of
from trl_steer.extras import require
from trl_steer.files import LOCK, FolderInUseError, locked, new_folder, read_json, remove, write_json

from . import models
from .console import Report, output_to
from .settings import FORMAT, Settings

SETTINGS, ENVIRONMENT, ADAPTER, MODEL, TRAINING, SCORES, LOG = (
    *("settings.json", "environment.json", "adapter", "model"),
    *("training.json", "scores", "log"),
)
CHECKPOINTS, RESULTS = "checkpoints", "results.md"
OURS = (ENVIRONMENT, ADAPTER, MODEL, TRAINING, SCORES, LOG, CHECKPOINTS, RESULTS)
# The contents of `training.json` at a checkpoint. It is written last, so that a checkpoint without it is incomplete.
MARK = "progress.json"
# Files of a checkpoint that do not belong to the adapter.
_STATE = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"),
    *("trainer_state.json", "training_args.bin", MARK),
)
_PACKAGES = ("trl-steer", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "lm-eval")
TASKS = Path(__file__).resolve().parent / "tasks"


class RunError(RuntimeError):
    """A run failed, or a folder is not that of a run. The message is a single line."""


class Run:
    """The folder of a run, finished or not.

    Args:
        folder (`Path`): The folder. It may not exist.
    """

    def __init__(self, folder: Path):
        self.folder = folder.expanduser().resolve()
        self.adapter = self.folder / ADAPTER
        self.model = self.folder / MODEL
        self.checkpoints = self.folder / CHECKPOINTS
        self.log = self.folder / LOG
        self.results = self.folder / RESULTS

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings, or `None` if the folder is not that of a run."""
        try:
            found = read_json(self.folder / SETTINGS)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("format") == FORMAT else None

    @property
    def environment(self) -> dict[str, Any]:
        return read_json(self.folder / ENVIRONMENT)

    @property
    def training(self) -> dict[str, Any]:
        return read_json(self.folder / TRAINING)

    def scores_file(self, task: str, base: bool = False) -> Path:
        return self.folder / SCORES / f"{task}{'.base' if base else ''}.json"

    def scores(self, task: str, base: bool = False) -> dict[str, Any]:
        """`accuracy` and `examples` of the adapter, or of the base model, on an lm-eval task."""
        return read_json(self.scores_file(task, base))

    def correct(self, task: str, base: bool = False) -> list[bool]:
        """Whether each example was answered correctly."""
        return [example["correct"] for example in self.scores(task, base)["examples"]]

    def tasks(self) -> list[str]:
        """The tasks on which the adapter was evaluated."""
        return sorted(file.stem for file in (self.folder / SCORES).glob("*.json") if not file.stem.endswith(".base"))

    def is_trained(self) -> bool:
        return (self.adapter.is_dir() or self.model.is_dir()) and (self.folder / TRAINING).is_file()

    def is_finished(self, task: str | None, with_base: bool = False, keep_weights: bool = True) -> bool:
        scored = task is None or all(self.scores_file(task, base).is_file() for base in {False, with_base})
        return scored and (self.is_trained() or (not keep_weights and (self.folder / TRAINING).is_file()))

    def newest_checkpoint(self, skip: Callable[[Path], object] = lambda checkpoint: None) -> Path | None:
        """The last complete checkpoint, or `None`. Calls `skip` with incomplete ones."""
        return newest_complete_checkpoint(self.checkpoints, MARK, skip)

    def command(self) -> str:
        """The lm-eval command that evaluates the adapter in the same way, for the shell."""
        settings, environment = self.settings or {}, self.environment
        trained = {"pretrained": environment["model"], "peft": str(self.adapter)}
        if settings["method"] == "full":
            trained = {"pretrained": str(self.model)}
        arguments = {**trained, "dtype": settings.get("dtype", "float32")}
        joined = ",".join(f"{key}={value}" for key, value in arguments.items())
        metadata = {settings["benchmark"]: settings["source"]} if settings["source"] else {}
        scoring = settings["scoring"]
        options = {
            "--model": "hf",
            "--model_args": joined if joined.count(",") < len(arguments) else json.dumps(arguments),  # "," in a path
            "--include_path": str(TASKS),
            "--tasks": settings["task"],
            "--metadata": json.dumps(metadata) if metadata else None,
            "--limit": str(scoring["limit"]) if "limit" in scoring else None,
            "--gen_kwargs": ",".join(f"{key}={value}" for key, value in scoring.get("gen_kwargs", {}).items()),
            "--batch_size": str(scoring["batch_size"]),
            "--device": environment["device"],
        }
        words = [f"{name} {shlex.quote(value)}" for name, value in options.items() if value]
        return " \\\n    ".join(["lm_eval run", *words])

    def kept(self) -> str:
        """Describes which parts of a run are finished."""
        parts = []
        if any((self.folder / SCORES).glob("*.base.json")):
            parts.append("the base model's score")
        checkpoint = self.newest_checkpoint()
        if self.is_trained():
            parts.append("the trained model" if self.model.is_dir() else "the trained adapter")
        elif checkpoint is not None:
            parts.append(f"training up to step {step_of(checkpoint)}")
        return " and ".join(parts) or "only the settings"


def open_run(folder: Path) -> Run:
    """An existing run.

    Raises:
        RunError: The folder is not that of a run.
    """
    run = Run(folder)
    if run.settings is None:
        raise RunError(f"{folder} is not the folder of a run: it has no {SETTINGS} of a run.")
    return run


def make(
    settings: Settings,
    folder: Path,
    *,
    score_base: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> Run:
    """Trains and evaluates an adapter, or all parameters, or completes an unfinished run.

    Args:
        settings (`Settings`): Settings of the run.
        folder (`Path`): Folder of the run.
        score_base (`bool`, *optional*, defaults to `False`): Whether to evaluate the base model too.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to remove an existing run first.
        report (`Report`, *optional*): Receives the progress.

    Raises:
        RunError: The folder has other files or a run with other settings, or is in use by another process; or training
            or evaluation failed. Finished parts are kept.
    """
    run, report = Run(folder), report or Report()
    finished = run.is_finished(settings.task, score_base, settings.keep_weights)
    if run.settings == settings.to_dict() and finished and not overwrite:
        report.note("This run is already finished. Its results are:")
        return run
    try:
        require("eval", "lm_eval")
        _check_ours(run)
        with locked(run.folder):
            _prepare(run, settings, overwrite)
            with output_to(run.log):
                try:
                    _make(run, settings, score_base, report)
                except Exception as error:
                    with suppress(OSError), run.log.open("a", encoding="utf-8") as log:  # the disk may be full
                        traceback.print_exc(file=log)
                    raise RunError(_reason(error, run)) from error
    except (ImportError, OSError, FolderInUseError) as error:
        raise RunError(_reason(error, run)) from error
    return run


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that are different, with dotted names for nested ones."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{key}.{line}" for line in changes(old, new)]
        elif old != new:
            found.append(f"{key} {old}, asked for {new}")
    return found


def _make(run: Run, settings: Settings, score_base: bool, report: Report) -> None:
    task = settings.task
    report.start(2 if task is None else 4 if score_base else 3)
    report.step("Model")
    model = models.resolve(settings.model, report.note)
    write_json(run.folder / ENVIRONMENT, _environment(model))
    report.end(models.HUB_ID if settings.model == models.EMBEDDED else settings.model)
    if task is not None and score_base:
        report.step("Scoring the base model")
        _score(run, settings, task, model, True, report)
    report.step("Training")
    _train(run, settings, model, report)
    if task is not None:
        report.step("Scoring the model" if settings.method == "full" else "Scoring the adapter")
        _score(run, settings, task, model, False, report)
    if not settings.keep_weights:
        remove(run.adapter)
        remove(run.model)


def _score(run: Run, settings: Settings, task: str, model: str, base: bool, report: Report) -> None:
    file = run.scores_file(task, base)
    if not file.is_file():
        from .scoring import score

        trained = settings.method == "full" and not base
        adapter = None if base or trained else run.adapter
        write_json(file, score(settings, task, str(run.model) if trained else model, adapter, TASKS, report))
    report.end(f"accuracy {read_json(file)['accuracy']:.3f}")


def _train(run: Run, settings: Settings, model: str, report: Report) -> None:
    def skip(checkpoint: Path) -> None:
        report.note(f"Skipping {checkpoint.name}, which is incomplete.")
        remove(checkpoint)

    if not run.is_trained():
        newest = run.newest_checkpoint(skip)
        if newest is None or not is_finished(newest):
            from .training import train

            train(settings, model, run.checkpoints, newest, report)
            newest = run.newest_checkpoint()
        if newest is None:
            raise RunError("Training ended without a checkpoint, because it had no steps. Use more training examples.")
        write_json(run.folder / TRAINING, read_json(newest / MARK))
        with new_folder(run.model if settings.method == "full" else run.adapter) as partial:
            for file in newest.iterdir():
                if file.name not in _STATE:
                    shutil.copy(file, partial)
    remove(run.checkpoints)
    report.end("{steps} steps in {seconds:.0f} s".format(**run.training))


def _check_ours(run: Run) -> None:
    if run.folder.exists() and not run.folder.is_dir():
        raise RunError(f"{run.folder} is a file. Choose a folder.")
    names = [path.name for path in run.folder.iterdir()] if run.folder.is_dir() else []
    if run.settings is None and any(name != LOCK and not name.endswith(".partial") for name in names):
        raise RunError(f"{run.folder} is not empty, and not the folder of a run. Choose a new or empty folder.")


def _prepare(run: Run, settings: Settings, overwrite: bool) -> None:
    """Prepares the folder for `settings`. The folder must be locked."""
    wanted, before = settings.to_dict(), run.settings
    for folder in (run.folder, run.folder / SCORES):
        for name in (SETTINGS, *OURS) if folder == run.folder else ("*.json",):
            for partial in folder.glob(f".{name}.*.partial"):  # from a killed process
                remove(partial)
    if overwrite:
        # Not the settings, so that the folder is still that of a run if the process is killed.
        for name in OURS:
            remove(run.folder / name)
    elif before is not None and before != wanted and any((run.folder / name).exists() for name in OURS):
        raise RunError(
            f"{run.folder} has a run with other settings ({'; '.join(changes(before, wanted))}). Choose another "
            "folder, or use --overwrite to remove the run."
        )
    if before != wanted:
        write_json(run.folder / SETTINGS, wanted)


def _environment(model: str) -> dict[str, Any]:
    import torch

    return {
        "model": model,
        "device": models.default_device(),
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "command": sys.argv,
    }


def _reason(error: Exception, run: Run) -> str:
    if isinstance(error, RunError):
        return str(error)
    text = " ".join(str(error).split()) or type(error).__name__
    # PyTorch and safetensors do not raise an `OSError` when the disk is full.
    if run.folder.is_dir() and shutil.disk_usage(run.folder).free < 2**20:
        text = f"No space is left on the disk of {run.folder} ({text[:120]})"
    if isinstance(error, OSError | ImportError | FolderInUseError):
        return text
    return f"{text[:500]} ({type(error).__name__}; the traceback is in {run.log})"
