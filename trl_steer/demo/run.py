"""The stages of `trl-steer demo`, each skipped where its result is already in the output folder."""

import argparse
import importlib.util
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from trl_steer.demo import settings as demo_settings
from trl_steer.demo.settings import Settings
from trl_steer.files import read_json, write_json

SETTINGS, REMOVED = "settings.json", ".removed"
# Everything a run writes; what else is in the folder is the user's and stays.
OURS = ("task", "checkpoints", "adapter", "base.json", "steered.json", "results.json", "results.md")


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer demo") -> int:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Trains a steering adapter on generated ListOps expressions with TRL, scores the base model and "
        "the adapter with lm-eval, and compares them with what needs no model. Run again, it goes on where it was.",
    )
    demo_settings.add_arguments(parser)
    settings, folder = demo_settings.from_arguments(parser.parse_args(argv))
    # They tell programmers which names will change; a user of this command can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        _check_packages()
        run(settings, folder.expanduser().resolve())
    except (OSError, ModuleNotFoundError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(settings: Settings, folder: Path) -> dict:
    """Runs what is missing in `folder` and returns all results, which are also in `folder/results.json`."""
    start = time.perf_counter()
    # Before PyTorch is imported. OpenMP's threads wait by spinning, which on a machine that something else uses too
    # made training on two cores five times as slow as waiting idly, and gains a few percent on a quiet one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _say(f"{settings.method}, seed {settings.seed}, in {folder}")
    prepare_folder(settings, folder)
    task_folder, adapter = folder / "task", folder / "adapter"
    base, steered = folder / "base.json", folder / "steered.json"

    from trl_steer.demo import model, report, task

    if _missing(task_folder, "Writing the ListOps examples and their lm-eval task"):
        task.write_task(settings, task_folder)
    _say("Looking for the model; the embedded one is converted the first time")
    checkpoint = model.resolve(settings.model)
    if _missing(base, "Scoring the base model"):
        _score(checkpoint, None, task_folder, base)
    if _missing(adapter, "Training"):
        from trl_steer.demo.train import train

        train(settings, checkpoint, task_folder, folder / "checkpoints", adapter)
    if _missing(steered, "Scoring the adapter"):
        _score(checkpoint, adapter, task_folder, steered)

    from trl_steer.demo.score import command

    results = report.collect(settings, task_folder, base, steered, adapter)
    results["command"] = command(checkpoint, adapter, task_folder)
    results["seconds_of_this_run"] = time.perf_counter() - start
    report.write(results, folder)
    report.show(results)
    return results


def prepare_folder(settings: Settings, folder: Path) -> None:
    """Makes the folder ready for `settings`. What an earlier run with other settings left is removed, and said.

    Raises:
        FileExistsError: if the folder holds files and no run of the demo made it.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output {folder} is a file; give a folder.")
    wanted = settings.to_dict()
    before = _earlier_settings(folder)
    if before is None and any(not path.name.endswith(".partial") for path in _files(folder)):
        raise FileExistsError(
            f"--output {folder} is not empty and was not made by this demo (it has no {SETTINGS} of the demo's); give "
            "a new or empty folder, so that nothing of yours is mixed up with the demo's files."
        )
    if before is not None:
        _remove(path for path in _files(folder) if path.name in [f"{name}{REMOVED}" for name in OURS])
    changes = describe_changes(before, wanted) if before is not None else []
    if changes:
        _say(f"Starting anew, because the run in this folder had other settings: {'; '.join(changes)}")
        # Each first loses its name and then its content: killed in between, the next run must not take half of a
        # folder for a whole one. The settings stay until the end, so that it still knows the folder for its own.
        ours = [path for path in _files(folder) if path.name in OURS]
        _remove([path.rename(path.with_name(f"{path.name}{REMOVED}")) for path in ours])
    if before != wanted:
        write_json(folder / SETTINGS, wanted)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _earlier_settings(folder: Path) -> dict | None:
    """The settings of the demo's run in this folder; None where there was none."""
    try:
        settings = read_json(folder / SETTINGS)
    except (FileNotFoundError, ValueError):
        return None
    return settings if isinstance(settings, dict) and settings.get("program") == demo_settings.PROGRAM else None


def describe_changes(before: dict, now: dict) -> list[str]:
    """One line for each setting that differs, nested ones by their dotted name."""
    changes = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += [f"{key}.{line}" for line in describe_changes(old, new)]
        elif old != new:
            changes.append(f"{key} was {old}, now {new}")
    return changes


def _score(model: str, adapter: Path | None, task_folder: Path, result: Path) -> None:
    from trl_steer.demo.score import score

    score(model, adapter, task_folder, result)


def _missing(path: Path, what: str) -> bool:
    missing = not path.exists()
    _say(what if missing else f"{what}: already done, {path.name} is there")
    return missing


def _check_packages() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError(
            "the demo scores with lm-eval, which is not installed: pip install 'trl-steer[demo]'"
        )


def _say(text: str) -> None:
    print(f"» {text}", flush=True)
