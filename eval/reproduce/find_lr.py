"""`trl-steer find-lr`: finds a learning rate for a model, a task and a method."""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl_steer import presets
from trl_steer.extras import require
from trl_steer.files import FolderInUseError, locked, remove, write_json
from trl_steer.statistics import binomial_standard_error
from trl_steer.tasks.registry import BENCHMARKS

from .. import runs
from ..analysis.arguments import positive
from ..console import Console, Report
from ..demo import preset as demo
from ..models import EMBEDDED
from ..settings import Settings
from .study import PRESETS, Model, Row, Study, StudyError, Task
from .sweep import Recommendation, figure, recommend, sweep

RECORD, PICTURE = "learning_rates.json", "learning_rates.png"
RUNS = "runs"


def main(argv: Sequence[str] | None = None, prog: str = "trl-steer find-lr") -> int:
    args = _parser(prog).parse_args(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before PyTorch is imported, as in the demo
    folder = args.output or Path("learning-rates", f"{args.task}-{args.method}")
    try:
        require("reproduce", "optuna", "matplotlib", "lm_eval")
        with locked(folder), closing(Console()) as console:
            said = _find(args, folder, console)
    except KeyboardInterrupt:
        print(f"\n{prog}: stopped. The same command continues from there.", file=sys.stderr)
        return 130
    except (runs.RunError, StudyError, FolderInUseError, ValueError, ImportError, OSError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(said)
    return 0


def _find(args: argparse.Namespace, folder: Path, console: Console) -> str:
    """Makes the sweep and its files. Returns the recommendation in words."""
    study = _study(args)
    (model,), (task,), (row,) = study.models, study.tasks, study.rows
    (cell,) = study.test_cells({})
    # Of all settings, with the preset's rate: a sweep with others is another one.
    name = cell.key

    def run_of(rate: float) -> runs.Run:
        return runs.Run(folder / RUNS / f"{name}-{rate:g}")

    def objective(trial: Any, rate: float) -> float:
        settings = replace(study.settings("rates", model, task, row, rate, args.seed), keep_weights=False)
        return _score(settings, run_of(rate), trial, console)

    def tried(rate: float) -> None:
        console.start(1)
        console.step(f"rate {rate:g}")

    scores = sweep(objective, folder, name, args.start or cell.rate, tried)
    best = run_of(recommend(scores).rate).correct(f"steer_{task.name}_val")
    noise = binomial_standard_error(sum(best), len(best))
    found = recommend(scores, noise)
    tested = [{"rate": rate, "accuracy": score} for rate, score in scores.items()]
    write_json(folder / RECORD, {**found._asdict(), "noise": noise, "rates": tested})
    picture = figure(scores, found, f"validation accuracy on {task.name}")
    picture.savefig(folder / PICTURE)
    return f"{sentence(found, scores)}\n{folder / RECORD} has all rates, {folder / PICTURE} a picture."


def _score(settings: Settings, run: runs.Run, trial: Any, console: Console) -> float:
    """The accuracy on validation. Stops training early if the pruner says so, or if it diverges."""
    import optuna

    try:
        runs.make(settings, run.folder, report=_Reporting(trial, console))
    except runs.RunError as error:
        from trl_steer.trainers.callbacks import TrainingDivergedError

        if not isinstance(error.__cause__, optuna.TrialPruned | TrainingDivergedError):
            raise
        diverged = isinstance(error.__cause__, TrainingDivergedError)
        console.end("diverged" if diverged else "stopped early")
        remove(run.folder)
        raise optuna.TrialPruned from error
    accuracy = run.scores(str(settings.task))["accuracy"]
    console.end(f"accuracy {accuracy:.3f}")
    return accuracy


class _Reporting(Report):
    """Reports training losses to a trial, and progress to the console."""

    def __init__(self, trial: Any, console: Console):
        self.trial, self.console = trial, console

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.console.progress(done, total, note)

    def note(self, text: str) -> None:
        self.console.note(text)

    def loss(self, step: int, loss: float) -> None:
        import optuna

        self.trial.report(-loss, step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


def sentence(found: Recommendation, scores: Mapping[float, float | None]) -> str:
    """The recommendation in words."""
    text = f"Recommended learning rate: {found.rate:g} (accuracy {found.score:.3f}). "
    if found.low == found.high:
        text += "Its neighbours are worse."
    else:
        text += f"From {found.low:g} to {found.high:g}, a factor of {found.high / found.low:.1f}, it is as good."
    if found.high == max(scores):
        text += " Higher rates were not tried."
    if found.low == min(scores):
        text += " Lower rates were not tried."
    return text


def _study(args: argparse.Namespace) -> Study:
    training = {} if args.max_steps is None else {"max_steps": args.max_steps}
    task = Task(args.task)
    if args.task == demo.BENCHMARK:
        held_out = dict.fromkeys(("validation", "test"), demo.HELD_OUT_EXAMPLES)
        task = Task(args.task, {"train": demo.TRAIN_EXAMPLES, **held_out, **demo.TOKENS}, demo.SCORING)
    if args.limit is not None:
        task = replace(task, scoring={**task.scoring, "limit": args.limit})
    return Study(
        name="find-lr",
        title="Learning rates",
        models=[Model(args.model, label="model")],
        tasks=[task],
        rows=[Row(args.method, args.method, preset=args.preset, r=args.r, training=training)],
        seeds=[args.seed],
    )


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Finds a learning rate for a model, a task and a method: trains with rates from a tenth to ten "
        "times the preset's in short runs, evaluates them on the validation split, and recommends one with its "
        "plateau. Low-rank steering diverges just above its best rate. Run the command again to continue.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=EMBEDDED, metavar="ID_OR_DIR", help="Hub id or checkpoint folder")
    parser.add_argument("--task", default=demo.BENCHMARK, choices=list(BENCHMARKS), help="the task")
    parser.add_argument("--method", default="low_rank", choices=list(presets.METHODS), help="the method")
    parser.add_argument("--preset", default="default", choices=PRESETS, help="preset of all other settings")
    parser.add_argument("--r", type=positive, help="rank (default: that of the preset)")
    parser.add_argument("--start", type=_rate, metavar="RATE", help="the rate in the middle (default: the preset's)")
    parser.add_argument(
        "--max-steps", type=positive, metavar="N", help="training steps (default: those of the preset)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only so many validation examples (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the sweep (default: learning-rates/TASK-METHOD)"
    )
    return parser


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return rate
