"""A run is a folder: one adapter, trained and scored, with all that decided the result and all that came out.

    settings.json        all that decides the result
    environment.json     versions, device, threads, command: what it was made with
    adapter/             the PEFT adapter, with its tokenizer
    training.json        losses, seconds, tokens, trainable parameters, peak memory
    scores/<task>.json   accuracy, and every example: prompt id, text, answer, right or wrong
    log                  what the libraries said

Each of these exists only when it is finished. So a run that was killed goes on where it was when it is made again, and
one that is finished is taken as it is. Importing this loads nothing heavy.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from trl_steer.extras import require
from trl_steer.files import new_folder, read_json, remove, write_json

from . import models
from .console import Report, output_to

Method = Literal["low_rank", "vector", "lora", "joint", "joint_orth"]
METHODS: tuple[Method, ...] = get_args(Method)
FORMAT = "trl_steer run 1"
SETTINGS, ENVIRONMENT, ADAPTER, TRAINING, SCORES, LOG = (
    *("settings.json", "environment.json", "adapter"),
    *("training.json", "scores", "log"),
)
CHECKPOINTS, LOCK, RESULTS = "checkpoints", ".lock", "results.md"
OURS = (ENVIRONMENT, ADAPTER, TRAINING, SCORES, LOG, CHECKPOINTS, RESULTS)
# Written into a checkpoint last: one without it was cut off. Holds what `training.json` says at that step.
MARK = "progress.json"
# What a checkpoint has beside the adapter.
_STATE = (
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"),
    *("trainer_state.json", "training_args.bin", MARK),
)
_PACKAGES = ("trl-steer", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "tokenizers", "lm-eval")
TASKS = Path(__file__).resolve().parent / "tasks"


class RunError(RuntimeError):
    """A run cannot be made, or a folder is none. The message is one line for the user."""


@dataclass(frozen=True)
class Settings:
    """All that decides the result of a run. Every value is one of JSON.

    Args:
        method (`str`): One of [`METHODS`].
        model (`str`): Hub id, checkpoint folder, or [`models.EMBEDDED`].
        benchmark (`str`): The task of `trl_steer.tasks` whose train split is trained on.
        source (`dict`): Arguments of the benchmark's source: sizes and seed of one that is generated, for example.
        task (`str`): The lm-eval task that scores.
        seed (`int`): Of the initial weights and the order of the examples.
        r (`int`): Rank of LoRA and of low-rank steering.
        training (`dict`): What TRL's `SFTConfig`, for joint methods `JointOrthSFTConfig`, is given.
        scoring (`dict`): What lm-eval is given: `batch_size` and `gen_kwargs`.
    """

    method: Method
    model: str
    benchmark: str
    source: Mapping[str, Any]
    task: str
    seed: int
    r: int
    training: Mapping[str, Any]
    scoring: Mapping[str, Any] = field(default_factory=lambda: {"batch_size": 1})

    def to_dict(self) -> dict[str, Any]:
        """As they are written down."""
        return {"format": FORMAT, **asdict(self)}


class Run:
    """Reads the folder of a run, finished or not.

    Args:
        folder (`Path`): The folder, which need not be there.
    """

    def __init__(self, folder: Path):
        self.folder = folder.expanduser().resolve()
        self.adapter = self.folder / ADAPTER
        self.checkpoints = self.folder / CHECKPOINTS
        self.log = self.folder / LOG
        self.results = self.folder / RESULTS

    @property
    def settings(self) -> dict[str, Any] | None:
        """None where there is no run."""
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
        """`accuracy` and `examples` of the adapter, or of the base model, in an lm-eval task."""
        return read_json(self.scores_file(task, base))

    def correct(self, task: str, base: bool = False) -> list[bool]:
        """Whether each example was answered correctly."""
        return [example["correct"] for example in self.scores(task, base)["examples"]]

    def tasks(self) -> list[str]:
        """The tasks that the adapter was scored on."""
        return sorted(file.stem for file in (self.folder / SCORES).glob("*.json") if not file.stem.endswith(".base"))

    def is_trained(self) -> bool:
        return self.adapter.is_dir() and (self.folder / TRAINING).is_file()

    def is_finished(self, task: str, with_base: bool = False) -> bool:
        scored = all(self.scores_file(task, base).is_file() for base in {False, with_base})
        return self.is_trained() and scored

    def newest_checkpoint(self) -> Path | None:
        """The last of those that are whole."""
        whole = [mark.parent for mark in self.checkpoints.glob(f"checkpoint-*/{MARK}")]
        return max(whole, key=_step, default=None)

    def command(self) -> str:
        """The stock lm-eval command that scores the adapter as this run did, for the shell."""
        settings, environment = self.settings or {}, self.environment
        arguments = {"pretrained": environment["model"], "peft": str(self.adapter), "dtype": "float32"}
        joined = ",".join(f"{key}={value}" for key, value in arguments.items())
        metadata = {settings["benchmark"]: settings["source"]} if settings["source"] else {}
        scoring = settings["scoring"]
        options = {
            "--model": "hf",
            "--model_args": joined if joined.count(",") < len(arguments) else json.dumps(arguments),  # a path has one
            "--include_path": str(TASKS),
            "--tasks": settings["task"],
            "--metadata": json.dumps(metadata) if metadata else None,
            "--gen_kwargs": ",".join(f"{key}={value}" for key, value in scoring.get("gen_kwargs", {}).items()),
            "--batch_size": str(scoring["batch_size"]),
            "--device": environment["device"],
        }
        words = [f"{name} {shlex.quote(value)}" for name, value in options.items() if value]
        return " \\\n    ".join(["lm_eval run", *words])

    def kept(self) -> str:
        """What a run that was stopped has, in words."""
        parts = []
        if any((self.folder / SCORES).glob("*.base.json")):
            parts.append("the base model's score")
        checkpoint = self.newest_checkpoint()
        if self.is_trained():
            parts.append("the trained adapter")
        elif checkpoint is not None:
            parts.append(f"training up to step {_step(checkpoint)}")
        return " and ".join(parts) or "the settings alone"


def open_run(folder: Path) -> Run:
    """A run that is there.

    Raises:
        RunError: if the folder holds none.
    """
    run = Run(folder)
    if run.settings is None:
        raise RunError(f"{folder} is not the folder of a run: it has no {SETTINGS} of one.")
    return run


def make(
    settings: Settings,
    folder: Path,
    *,
    score_base: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> Run:
    """Does what is missing of a run.

    Args:
        settings (`Settings`): All that decides the result.
        folder (`Path`): Where the run is, or will be.
        score_base (`bool`, *optional*, defaults to `False`): Whether to score the base model too.
        overwrite (`bool`, *optional*, defaults to `False`): Whether to remove the run that is there and start anew.
        report (`Report`, *optional*): Is told how it goes.

    Raises:
        RunError: if the folder holds something else, or a run with other settings; if another process is making a run
            there; if training or scoring fails. Nothing that is finished is lost.
    """
    run, report = Run(folder), report or Report()
    if run.settings == settings.to_dict() and run.is_finished(settings.task, score_base) and not overwrite:
        report.note("This run is finished; what follows is what it left.")
        return run
    try:
        require("eval", "lm_eval")
        _check_ours(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        with _locked(run.folder):
            _prepare(run, settings, overwrite)
            with output_to(run.log):
                try:
                    _make(run, settings, score_base, report)
                except Exception as error:
                    with suppress(OSError), run.log.open("a", encoding="utf-8") as log:  # the disk may be full
                        traceback.print_exc(file=log)
                    raise RunError(_reason(error, run)) from error
    except (ImportError, OSError) as error:
        raise RunError(_reason(error, run)) from error
    return run


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that differ, nested ones by their dotted name."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [f"{key}.{line}" for line in changes(old, new)]
        elif old != new:
            found.append(f"{key} {old}, asked for {new}")
    return found


def _make(run: Run, settings: Settings, score_base: bool, report: Report) -> None:
    report.start(4 if score_base else 3)
    report.step("Model")
    model = models.resolve(settings.model, report.note)
    write_json(run.folder / ENVIRONMENT, _environment(model))
    report.end(models.HUB_ID if settings.model == models.EMBEDDED else settings.model)
    if score_base:
        report.step("Scoring the base model")
        _score(run, settings, model, True, report)
    report.step("Training")
    _train(run, settings, model, report)
    report.step("Scoring the adapter")
    _score(run, settings, model, False, report)


def _score(run: Run, settings: Settings, model: str, base: bool, report: Report) -> None:
    file = run.scores_file(settings.task, base)
    if not file.is_file():
        from .scoring import score

        write_json(file, score(settings, model, None if base else run.adapter, TASKS, report))
    report.end(f"accuracy {read_json(file)['accuracy']:.3f}")


def _train(run: Run, settings: Settings, model: str, report: Report) -> None:
    if not run.is_trained():
        for checkpoint in sorted(run.checkpoints.glob("checkpoint-*")):
            if not (checkpoint / MARK).is_file():
                report.note(f"{checkpoint.name} was cut off while it was written; it is skipped.")
                remove(checkpoint)
        newest = run.newest_checkpoint()
        if newest is None or not _is_last(newest):
            from .training import train

            train(settings, model, run.checkpoints, newest, report)
            newest = run.newest_checkpoint()
        if newest is None:
            raise RunError("Training ended without a checkpoint, because there was no step to take.")
        write_json(run.folder / TRAINING, read_json(newest / MARK))
        with new_folder(run.adapter) as partial:
            for file in newest.iterdir():
                if file.name not in _STATE:
                    shutil.copy(file, partial)
    remove(run.checkpoints)
    report.end("{steps} steps in {seconds:.0f} s".format(**run.training))


def _is_last(checkpoint: Path) -> bool:
    state = read_json(checkpoint / "trainer_state.json")
    return state["global_step"] >= state["max_steps"]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _check_ours(run: Run) -> None:
    if run.folder.exists() and not run.folder.is_dir():
        raise RunError(f"{run.folder} is a file; give a folder.")
    names = [path.name for path in run.folder.iterdir()] if run.folder.is_dir() else []
    if run.settings is None and any(name != LOCK and not name.endswith(".partial") for name in names):
        raise RunError(
            f"{run.folder} is not empty and holds no run (it has no {SETTINGS} of one); give a new or empty folder."
        )


def _prepare(run: Run, settings: Settings, overwrite: bool) -> None:
    """Makes the folder ready for `settings`, which only the process that has locked it may do."""
    wanted, before = settings.to_dict(), run.settings
    for folder in (run.folder, run.folder / SCORES):
        for name in (SETTINGS, *OURS) if folder == run.folder else ("*.json",):
            for partial in folder.glob(f".{name}.*.partial"):  # what a kill has left
                remove(partial)
    if overwrite:
        # The settings last: killed in between, the folder is still known for a run.
        for name in OURS:
            remove(run.folder / name)
    elif before is not None and before != wanted and any((run.folder / name).exists() for name in OURS):
        raise RunError(
            f"{run.folder} holds a run with other settings ({'; '.join(changes(before, wanted))}). Give another "
            "folder, or --overwrite to start anew."
        )
    if before != wanted:
        write_json(run.folder / SETTINGS, wanted)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes off the folder. The system unlocks it when this process ends, however that happens.

    Raises:
        RunError: if another process has it.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunError(f"{folder} is in use by {holder}; wait for it to end, or give another folder.") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _environment(model: str) -> dict[str, Any]:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "model": model,
        "device": accelerator.type if accelerator else "cpu",
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
    # Neither PyTorch nor safetensors raises an `OSError`, nor says it plainly.
    if run.folder.is_dir() and shutil.disk_usage(run.folder).free < 2**20:
        text = f"No space is left on the disk of {run.folder} ({text[:120]})"
    if isinstance(error, OSError | ImportError):
        return text
    return f"{text[:500]} ({type(error).__name__}; the traceback is in {run.log})"
