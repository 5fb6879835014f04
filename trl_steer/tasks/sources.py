"""Where a task's rows come from, and the ways to say that they come from elsewhere.

Every task names a data set of the Hub. A program whose working directory holds a folder of that name reads the
folder instead, which is what `datasets` does by itself. Beyond that, in this order:

1. arguments: `load_task("boolq", config="boolq_offline")`, or lm-eval's
   `--metadata '{"boolq": {"config": "boolq_offline"}}'`;
2. the environment variable `TRL_STEER_DATASETS`, with the same JSON object;
3. the environment variable `TRL_STEER_HUB_MIRROR`, a folder laid out like the Hub (`<it>/google/boolq/...`).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

DATASETS_VARIABLE = "TRL_STEER_DATASETS"
MIRROR_VARIABLE = "TRL_STEER_HUB_MIRROR"


def resolve(task: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The source of `task`: its defaults, overridden by the environment, overridden by what was given.

    Raises:
        ValueError: if an override names something that the task's source does not have, or the environment variable
            does not hold a JSON object of objects.
    """
    overrides = {**_from_environment(task), **{key: value for key, value in given.items() if value is not None}}
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        raise ValueError(
            f"The source of task {task!r} has no {', '.join(unknown)}. What can be overridden: {', '.join(defaults)}."
        )
    source = {**defaults, **overrides}
    if "dataset_path" in source and "dataset_path" not in overrides:
        source["dataset_path"] = _in_mirror(source["dataset_path"])
    elif "config" in source and "config" not in overrides:
        source["config"] = _config_in_copy(source["dataset_path"], source["config"])
    return source


def from_metadata(task: str, defaults: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What lm-eval's `--metadata` says about the source of `task`.

    Entries under the task's name are for it alone. At the top level `dataset_path` and `config` are for every task of
    the run, so they suit a run of one. lm-eval mixes the model's arguments into the same mapping, so other keys are
    not ours to judge, a generator's `seed` among them.
    """
    for_all = {key: metadata[key] for key in ("dataset_path", "config") if key in defaults and key in metadata}
    for_task = metadata.get(task, {})
    if not isinstance(for_task, Mapping):
        raise ValueError(f"--metadata has {task!r}: {for_task!r}; expected an object like {dict(defaults)}.")
    return {**for_all, **for_task}


def read_hub(dataset_path: str, config: str | None = None) -> Mapping[str, "Dataset"]:
    """All splits of a data set: a Hub id, or the folder of a local copy."""
    import datasets

    folder = Path(dataset_path)
    try:
        return datasets.load_dataset(dataset_path, config, cache_dir=_cache_of(folder) if folder.is_dir() else None)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        error.add_note(
            f"This was reading the data set {dataset_path!r}, config {config!r}. Without network access, start the "
            f"program in a folder that holds {dataset_path!r}, or name such a folder in {MIRROR_VARIABLE}. For "
            f"another copy or config, set {DATASETS_VARIABLE} or pass dataset_path and config (lm-eval: --metadata)."
        )
        raise


def _cache_of(folder: Path) -> str:
    """A place in the cache for this folder as it is now.

    `datasets` knows a local folder by the `configs` of its README alone, so that of two copies with the same layout,
    or of one before and after a change, the second would silently be given the rows of the first.
    """
    import datasets

    state = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = file.stat()
        state.update(f"{file.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return str(Path(datasets.config.HF_DATASETS_CACHE, "trl_steer", state.hexdigest()[:16]))


def _from_environment(task: str) -> dict[str, Any]:
    text = os.environ.get(DATASETS_VARIABLE)
    if not text:
        return {}
    expected = f'{DATASETS_VARIABLE} must be a JSON object like {{"boolq": {{"config": "boolq_offline"}}}}'
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{expected}, but is not JSON: {text!r}") from error
    entry = entries.get(task, {}) if isinstance(entries, dict) else None
    if not isinstance(entry, dict):
        raise ValueError(f"{expected}, got {text!r}")
    return entry


def _config_in_copy(dataset_path: str, default: str | None) -> str | None:
    """The config to read of a copy that was named without one: the only one it has, where it lacks the task's own."""
    import datasets

    if not Path(dataset_path).is_dir():
        return default
    try:
        names = datasets.get_dataset_config_names(dataset_path)
    except (FileNotFoundError, ValueError):
        return default  # reading it will say what is wrong
    return names[0] if default not in names and len(names) == 1 else default


def _in_mirror(dataset_path: str) -> str:
    mirror = os.environ.get(MIRROR_VARIABLE)
    folder = Path(mirror, dataset_path) if mirror else None
    return str(folder) if folder is not None and folder.is_dir() else dataset_path
