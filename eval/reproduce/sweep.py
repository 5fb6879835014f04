"""A sweep over learning rates, which recommends one.

Rates are spaced evenly in their logarithm, four to a decade. They are tried from the middle outwards, and beyond while
the best one is the lowest or the highest. The best of them is within a factor of 1.8 of the optimum if scores rise up
to it and fall from it. The sweep is a study of Optuna, whose pruner stops hopeless rates early.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..analysis import figures

PER_DECADE = 4
# Steps to both sides: a decade at first, and at most another one.
SPAN, LIMIT = 4, 8
STORAGE = "sweep.db"
# Rates whose training loss is never among the better three quarters are stopped, when three have been finished.
KEPT_PERCENT, STARTUP = 75.0, 3


class Recommendation(NamedTuple):
    """
    A learning rate and its plateau: the rates around it that score as well, up to the noise.

    Attributes:
        rate (`float`): The rate with the highest score.
        score (`float`): Its score.
        low, high (`float`): The ends of the plateau.
    """

    rate: float
    score: float
    low: float
    high: float


def sweep(
    objective: Callable[[Any, float], float], folder: Path, name: str, start: float, tried: Callable[[float], object]
) -> dict[float, float | None]:
    """Scores learning rates. Those that an earlier call with the same name has finished are not repeated.

    Args:
        objective (`Callable`): Called with the trial of Optuna and a rate. Returns the score, which is better if it is
            higher. It may report intermediate scores to the trial, and raise `optuna.TrialPruned`.
        folder (`Path`): Folder of the SQLite storage.
        name (`str`): Name of the sweep in the storage.
        start (`float`): The rate in the middle.
        tried (`Callable`): Called with each rate before it is tried.

    Returns:
        `dict[float, float | None]`: The scores by rate, in its order, `None` for rates that were stopped.

    Raises:
        OSError: The storage is damaged.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            storage=f"sqlite:///{folder.resolve() / STORAGE}",
            study_name=name,
            direction="maximize",
            pruner=optuna.pruners.PercentilePruner(KEPT_PERCENT, n_startup_trials=STARTUP),
            load_if_exists=True,
        )
    except (SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        why = str(error).splitlines()[0]
        raise OSError(f"{folder / STORAGE} is not the database of a sweep: {why}. Choose another folder.") from error
    complete, pruned = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED
    bounds = _rate(start, -LIMIT), _rate(start, LIMIT)

    def score(trial: Any) -> float:
        return objective(trial, trial.suggest_float("rate", *bounds, log=True))

    while True:
        trials = study.get_trials(deepcopy=False, states=(complete, pruned))
        done = {trial.params["rate"]: trial.value if trial.state == complete else None for trial in trials}
        rate = next_rate(done, start)
        if rate is None:
            return dict(sorted(done.items()))
        tried(rate)
        study.sampler = optuna.samplers.GridSampler({"rate": [rate]})
        study.optimize(score, n_trials=1)


def next_rate(done: Mapping[float, float | None], start: float) -> float | None:
    """The next learning rate to try, `None` if there are enough.

    Args:
        done (`dict[float, float | None]`): The scores so far.
        start (`float`): The rate in the middle.
    """
    for step in sorted(range(-SPAN, SPAN + 1), key=abs):
        if _rate(start, step) not in done:
            return _rate(start, step)
    finished = _finished(done)
    if _is_flat(finished):
        return None
    # Where all diverged, lower ones may not.
    best = max(finished, key=lambda rate: (finished[rate], -rate), default=min(done))
    step = round(math.log10(best / start) * PER_DECADE)
    beyond = step + (1 if best == max(done) else -1 if best == min(done) else 0)
    return _rate(start, beyond) if beyond != step and abs(beyond) <= LIMIT else None


def recommend(scores: Mapping[float, float | None], noise: float = 0.0) -> Recommendation:
    """The rate with the highest score, the lowest one if several have it, and its plateau.

    Args:
        scores (`dict[float, float | None]`): The scores by rate, `None` for rates that were stopped.
        noise (`float`): The difference of scores that is not counted.

    Raises:
        ValueError: All rates score the same, or none was finished.
    """
    rates, finished = sorted(scores), _finished(scores)
    if not finished or _is_flat(finished):
        raise ValueError(
            f"None of the learning rates from {rates[0]:g} to {rates[-1]:g} scores better than another. Train for "
            "more steps, or evaluate on more examples."
        )
    best = max(sorted(finished), key=finished.__getitem__)
    index = low = high = rates.index(best)

    def as_good(at: int) -> bool:
        score = scores[rates[at]]
        return score is not None and score >= finished[best] - noise

    while low > 0 and as_good(low - 1):
        low -= 1
    while high < len(rates) - 1 and as_good(high + 1):
        high += 1
    return Recommendation(rates[index], finished[best], rates[low], rates[high])


def figure(scores: Mapping[float, float | None], found: Recommendation, label: str) -> Any:
    """A picture of score against learning rate.

    Args:
        scores (`dict[float, float | None]`): The scores by rate.
        found (`Recommendation`): The recommendation.
        label (`str`): Name and unit of the score.
    """
    drawn, axes = figures.new_figure()
    finished = _finished(scores)
    stopped = [rate for rate, score in scores.items() if score is None]
    axes.axvspan(found.low, found.high, color=figures.COLOURS[5], alpha=0.2, linewidth=0, label="plateau")
    figures.draw(axes, list(finished), list(finished.values()), 0, "finished")
    axes.plot([found.rate], [found.score], "*", color=figures.COLOURS[1], markersize=12, label="recommended")
    if stopped:
        bottom = min(finished.values())
        axes.plot(stopped, [bottom] * len(stopped), "x", color=figures.COLOURS[6], label="stopped early")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel(label)
    figures.legend_above(axes, 4)
    return drawn


def _finished(scores: Mapping[float, float | None]) -> dict[float, float]:
    return {rate: score for rate, score in scores.items() if score is not None}


def _is_flat(finished: Mapping[float, float]) -> bool:
    return len(finished) > 1 and len({*finished.values()}) == 1


def _rate(start: float, step: int) -> float:
    """The rate so many steps from `start`, with three digits."""
    return float(f"{start * 10 ** (step / PER_DECADE):.3g}")
