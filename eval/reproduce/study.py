"""A study: a grid of runs, models x tasks x rows x learning rates x seeds, and the file that describes it.

A row is a method with its settings, one line of a table. Learning rates are compared on validation with one seed. The
best one is then used for all seeds on test. Rows with a single rate skip the first stage.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from trl_steer import presets
from trl_steer.files import write_text
from trl_steer.tasks.registry import BENCHMARKS, TASKS

from ..settings import Settings, of_preset, with_rate

Stage = Literal["rates", "test"]
STUDY = "study.yaml"
STUDIES = Path(__file__).resolve().parent / "studies"
# Presets whose values are all those of a run. That of the authors' code has other splits and no end token.
PRESETS = ("default", "paper")
DTYPES = ("float32", "bfloat16", "float16")
# What the fields of a study file hold, by the type, or by its origin.
_HELD: dict[Any, tuple[Any, str]] = {
    str: (str, "text; put it in quotes"),
    Literal: (str, "text; put it in quotes"),
    Mapping: (dict, "a mapping"),
    Sequence: ((list, tuple), "a list"),
}


class StudyError(ValueError):
    """A study file is invalid. The message is a single line."""


@dataclass(frozen=True)
class Model:
    """A base model.

    Args:
        name (`str`): Hub id, checkpoint folder, or `"embedded"`.
        label (`str`): What tables call it. Default: the last part of the name.
        dtype (`str`): Type of its parameters.
        training (`dict`): Arguments of training, such as `gradient_accumulation_steps`.
    """

    name: str
    label: str = ""
    dtype: str = "float32"
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name (`str`): One of [`trl_steer.tasks.TASKS`]. Those that are no benchmark are trained on and not evaluated.
        source (`dict`): Source of the dataset. The seed of a generated one is that of the run.
        scoring (`dict`): Arguments of lm-eval.
        training (`dict`): Arguments of training.
        seeds (`list[int]`): The seeds on this task. Default: those of the study.
    """

    name: str
    source: Mapping[str, Any] = field(default_factory=dict)
    scoring: Mapping[str, Any] = field(default_factory=lambda: {"batch_size": 16})
    training: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()


@dataclass(frozen=True)
class Row:
    """A method with its settings.

    Args:
        name (`str`): What tables call it.
        method (`str`): One of [`trl_steer.presets.METHODS`].
        rates (`list[float]`): Learning rates to choose from. Default: that of the preset.
        preset (`str`): Preset of the other values. Default: that of the study.
        r (`int`, *optional*): Rank. Default: that of the preset.
        steering, lora, training (`dict`): Other values, see [`Settings`].
    """

    name: str
    method: presets.Method
    rates: Sequence[float] = ()
    preset: str = ""
    r: int | None = None
    steering: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)


class Cell(NamedTuple):
    """
    A run of a study.

    Attributes:
        stage (`str`): `"rates"` for the choice of the learning rate on validation, `"test"` for the result.
        model (`str`): Label of the model.
        task (`str`): Name of the task.
        row (`str`): Name of the row.
        rate (`float`): The learning rate.
        seed (`int`): The seed.
        settings (`Settings`): All settings of the run.
    """

    stage: Stage
    model: str
    task: str
    row: str
    rate: float
    seed: int
    settings: Settings

    @property
    def key(self) -> str:
        """The name of its folder: a hash of its settings."""
        return key_of(self.settings.to_dict())


def key_of(settings: Mapping[str, Any]) -> str:
    """The name of the folder of a cell, by the contents of its `settings.json`."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """A grid of runs.

    Args:
        name (`str`): Its name.
        title (`str`): What it measures, in one line.
        models (`list[Model]`): The models.
        tasks (`list[Task]`): The tasks.
        rows (`list[Row]`): The methods.
        seeds (`list[int]`): The seeds on test. The first one is that of the comparison of rates.
        preset (`str`): Preset of all rows that do not name another.
        training (`dict`): Arguments of training for all rows.
        guessed (`list[str]`): What is not known of the setup that the study reproduces, and what was assumed.

    Raises:
        StudyError: Names are not unique, or a row does not fit its method.
    """

    name: str
    title: str
    models: Sequence[Model]
    tasks: Sequence[Task]
    rows: Sequence[Row]
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    preset: str = "default"
    training: Mapping[str, Any] = field(default_factory=dict)
    guessed: Sequence[str] = ()

    def __post_init__(self) -> None:
        for what, names in (
            ("models", [model.label for model in self.models]),
            ("tasks", [task.name for task in self.tasks]),
            ("rows", [row.name for row in self.rows]),
        ):
            if not names:
                raise StudyError(f"{self.name} has no {what}.")
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise StudyError(f"{self.name}: {what} must have different names, got {twice!r} twice.")
        if not self.seeds:
            raise StudyError(f"{self.name} has no seeds.")
        if Path(self.name).name != self.name or self.name == "..":
            raise StudyError(f"A study's name is that of its folder, got {self.name!r}.")
        for where, seeds in (
            (self.name, self.seeds),
            *((f"{self.name}, {task.name}", task.seeds) for task in self.tasks),
        ):
            if not all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds) or len({*seeds}) < len(seeds):
                raise StudyError(f"{where}: expected seeds to be different integers from 0, got {[*seeds]}.")
        for model in self.models:
            if model.dtype not in DTYPES:
                raise StudyError(f"{self.name}: no dtype {model.dtype!r}. Choose from {', '.join(DTYPES)}.")
        for row in self.rows:
            self._check(row)

    def _check(self, row: Row) -> None:
        for name, value, known in (
            ("method", row.method, presets.METHODS),
            ("preset", row.preset or self.preset, PRESETS),
            *(("task", task.name, TASKS) for task in self.tasks),
        ):
            if value not in known:
                raise StudyError(
                    f"{self.name}, row {row.name!r}: no {name} {value!r}. Choose from {', '.join(known)}."
                )
        unscored = next((task.name for task in self.tasks if task.name not in BENCHMARKS), None)
        if unscored is not None and len(row.rates) > 1:
            raise StudyError(
                f"{self.name}, row {row.name!r}: {unscored} has no validation score to choose from "
                f"{len(row.rates)} rates. Give one rate to a row."
            )

        if len({*row.rates}) < len(row.rates) or not all(0 < rate < math.inf for rate in row.rates):
            raise StudyError(
                f"{self.name}, row {row.name!r}: expected rates to be different positive numbers, got {[*row.rates]}."
            )
        if row.r is not None and (type(row.r) is not int or row.r < 1):
            raise StudyError(f"{self.name}, row {row.name!r}: expected r to be a positive integer, got {row.r!r}.")

    def rates_of(self, row: Row, task: Task) -> Sequence[float]:
        """The learning rates of a row, that of its preset if it gives none."""
        return row.rates or (self._of_preset(row, task)["training"]["learning_rate"],)

    def seeds_of(self, task: Task) -> Sequence[int]:
        """The seeds on a task."""
        return task.seeds or self.seeds

    def rate_cells(self) -> Iterator[Cell]:
        """The cells of the first stage."""
        for model, task, row in product(self.models, self.tasks, self.rows):
            rates = self.rates_of(row, task)
            for rate in rates if len(rates) > 1 else ():
                yield self._cell("rates", model, task, row, rate, self.seeds_of(task)[0])

    def test_cells(self, best: Mapping[tuple[str, str, str], float]) -> Iterator[Cell]:
        """The cells of the second stage.

        Args:
            best (`dict`): The best rate by model, task and row. Rows with several rates that are not in it are left
                out.
        """
        for model, task, row in product(self.models, self.tasks, self.rows):
            rates = self.rates_of(row, task)
            rate = rates[0] if len(rates) == 1 else best.get((model.label, task.name, row.name))
            if rate is not None:
                for seed in self.seeds_of(task):
                    yield self._cell("test", model, task, row, rate, seed)

    def size(self) -> int:
        """The number of cells of both stages."""
        tests = len(self.models) * len(self.rows) * sum(len(self.seeds_of(task)) for task in self.tasks)
        return tests + sum(1 for _ in self.rate_cells())

    def settings(self, stage: Stage, model: Model, task: Task, row: Row, rate: float, seed: int) -> Settings:
        """The settings of a run. Later ones go before earlier ones: preset, study, model, task, row."""
        made = self._of_preset(row, task)
        training = {**made["training"], **self.training, **model.training, **task.training, **row.training}
        scored = task.name in BENCHMARKS
        return Settings(
            method=row.method,
            model=model.name,
            benchmark=task.name,
            source=_source(task, stage, seed),
            task=f"steer_{task.name}{'_val' if stage == 'rates' else ''}" if scored else None,
            seed=seed,
            r=made["r"] if row.r is None else row.r,
            training=with_rate(training, rate),
            scoring=task.scoring,
            steering={**made["steering"], **row.steering},
            lora={**made["lora"], **row.lora},
            dtype=model.dtype,
            keep_weights=row.method != "full" or not scored,
        )

    def to_dict(self) -> dict[str, Any]:
        """The contents of a study file, with all defaults."""
        return json.loads(json.dumps(asdict(self)))

    def _of_preset(self, row: Row, task: Task) -> dict[str, Any]:
        steering_type = row.steering.get("steering_type", "low_rank")
        return of_preset(row.preset or self.preset, row.method, task.name, steering_type, row.steering.get("site"))

    def _cell(self, stage: Stage, model: Model, task: Task, row: Row, rate: float, seed: int) -> Cell:
        settings = self.settings(stage, model, task, row, rate, seed)
        return Cell(stage, model.label, task.name, row.name, rate, seed, settings)


def load(name: str | Path) -> Study:
    """A study by the name of one of ours, such as `"table1"`, or by the path of its file.

    Raises:
        StudyError: There is no such study, or its file is invalid.
    """
    import yaml

    ours = STUDIES / f"{name}.yaml"
    path = ours if ours.is_file() else Path(name)
    try:
        contents = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in STUDIES.glob("*.yaml")))
        raise StudyError(f"Can't read the study {name}: {error.strerror}. Give a file, or one of {known}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from error
    return from_dict(contents, str(path))


def save(study: Study, folder: Path) -> None:
    """Writes a study into its folder."""
    import yaml

    text = yaml.safe_dump(study.to_dict(), sort_keys=False, allow_unicode=True, width=110)
    write_text(folder / STUDY, text)


def from_dict(contents: Any, where: str = "study") -> Study:
    """A study from the contents of its file.

    Models and tasks may be given by their names alone. A row with a `grid`, such as `{r: [1, 8], site: [post_mlp]}`,
    stands for a row for each combination of its values, which are put in its `name` and are values of `steering`, but
    for `r`.

    Raises:
        StudyError: The contents are invalid.
    """
    values = _checked(Study, contents, where)
    parts: dict[str, Any] = {
        "models": [_part(Model, item, f"{where}, models") for item in values["models"]],
        "tasks": [_part(Task, item, f"{where}, tasks") for item in values["tasks"]],
        "rows": [_row(item, f"{where}, rows") for entry in values["rows"] for item in _expanded(entry, where)],
    }
    parts["models"] = [replace(model, label=model.label or model.name.rpartition("/")[2]) for model in parts["models"]]
    return Study(**{**values, **parts})


def _source(task: Task, stage: Stage, seed: int) -> dict[str, Any]:
    """The source of the dataset. Of a generated one, only the rows of the stage are generated."""
    source = dict(task.source)
    if "seed" in TASKS[task.name].source:
        source = {"seed": seed, **source, ("test" if stage == "rates" else "validation"): 0}
    return source


def _expanded(entry: Any, where: str) -> Iterator[Any]:
    """The rows of an entry with a `grid`."""
    if not isinstance(entry, dict) or "grid" not in entry:
        yield entry
        return
    plain = {name: value for name, value in entry.items() if name != "grid"}
    grid = entry["grid"]
    if not isinstance(grid, dict) or not all(isinstance(values, list) for values in grid.values()):
        raise StudyError(f"{where}: expected grid to be a mapping of names to lists, got {grid!r}.")
    for values in product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        try:
            name = str(plain.get("name", "")).format(**{key: value or "linear" for key, value in chosen.items()})
        except (AttributeError, LookupError, ValueError):
            raise StudyError(
                f"{where}: expected the name of a row with a grid to have {', '.join(f'{{{key}}}' for key in grid)}, "
                f"got {plain['name']!r}."
            ) from None
        if not isinstance(plain.get("steering", {}), dict):
            raise StudyError(f"{where}, {name!r}: expected steering to be a mapping, got {plain['steering']!r}.")
        steering = {key: value for key, value in chosen.items() if key != "r" and value is not None}
        row = {**plain, "name": name, "steering": {**plain.get("steering", {}), **steering}}
        yield {**row, "r": chosen["r"]} if "r" in chosen else row


def _row(item: Any, where: str) -> Row:
    row = _part(Row, item, where)
    try:
        if any(isinstance(rate, bool) for rate in row.rates):
            raise TypeError
        return replace(row, rates=tuple(float(rate) for rate in row.rates))
    except (TypeError, ValueError):
        raise StudyError(
            f"{where}, {row.name!r}: expected rates to be a list of numbers, got {row.rates!r}."
        ) from None


def _part(kind: Any, item: Any, where: str) -> Any:
    return kind(**_checked(kind, {"name": item} if isinstance(item, str) else item, where))


def _checked(kind: Any, values: Any, where: str) -> dict[str, Any]:
    known = {part.name: part for part in fields(kind)}
    if not isinstance(values, dict):
        raise StudyError(f"{where}: expected a mapping with {', '.join(known)}, got {values!r}.")
    unknown = [name for name in values if name not in known]
    missing = [
        name
        for name, part in known.items()
        if name not in values and part.default is MISSING and part.default_factory is MISSING
    ]
    if unknown or missing:
        wrong = f"unknown {unknown[0]!r}" if unknown else f"{missing[0]!r} is missing"
        raise StudyError(f"{where}: {wrong}. A {kind.__name__.lower()} has {', '.join(known)}.")
    for name, value in values.items():
        annotation: Any = known[name].type
        held, words = _HELD.get(get_origin(annotation) or annotation, (object, ""))
        if not isinstance(value, held):
            raise StudyError(f"{where}: expected {name} to be {words}, got {value!r}.")
        if get_args(annotation) == (str,) and not all(isinstance(item, str) for item in value):
            raise StudyError(f"{where}: expected {name} to be a list of texts, got {value!r}.")
        if name in ("name", "label", "title") and ("\0" in value or value.splitlines() != [value]):
            raise StudyError(f"{where}: expected {name} to be one line of text, got {value!r}.")
    return dict(values)
