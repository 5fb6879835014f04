"""The sources of datasets, and how to override them.

By default, tasks are loaded from the Hub, or from a folder with the same name in the working directory, as `datasets`
does. To load them from elsewhere, use (in order of precedence):

1. arguments: `load_task("boolq", config="boolq_offline")`, or lm-eval's
   `--metadata '{"boolq": {"config": "boolq_offline"}}'`;
2. the environment variable `TRL_STEER_DATASETS`, with the same JSON object;
3. the environment variable `TRL_STEER_HUB_MIRROR`, a folder with the layout of the Hub (`<folder>/google/boolq/...`).
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
# Extension of a file name -> name of the builder in `datasets`.
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def resolve(task: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The source of `task`: its defaults, overridden by the environment and by `given`.

    Raises:
        ValueError: The source of the task does not have an entry, or the environment variable is not a JSON object of
            objects.
    """
    overrides = {**_from_environment(task), **{key: value for key, value in given.items() if value is not None}}
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        raise ValueError(
            f"The source of task {task!r} has no entry {', '.join(unknown)}. Choose from: {', '.join(defaults)}."
        )
    source = {**defaults, **overrides}
    if "dataset_path" in source and "dataset_path" not in overrides:
        source["dataset_path"] = _in_mirror(source["dataset_path"])
    elif "config" in source and "config" not in overrides:
        source["config"] = _config_in_copy(source["dataset_path"], source["config"])
    return source


def from_metadata(task: str, defaults: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries in lm-eval's `--metadata` about the source of `task`.

    Entries under the task's name are for this task only. `dataset_path` and `config` at the top level are for all
    tasks of the run. Other keys at the top level are ignored, because lm-eval adds the model's arguments there.

    Raises:
        ValueError: The entry under the task's name is not a mapping.
    """
    for_all = {key: metadata[key] for key in ("dataset_path", "config") if key in defaults and key in metadata}
    for_task = metadata.get(task, {})
    if not isinstance(for_task, Mapping):
        raise ValueError(f"--metadata: expected an object such as {dict(defaults)} for {task!r}, got {for_task!r}.")
    return {**for_all, **for_task}


def reader_of(file: str) -> str | None:
    """The builder in `datasets` that reads a file, by its extension, or `None`."""
    return READERS.get(Path(file).suffix.lower())


def read_hub(dataset_path: str, config: str | None = None) -> Mapping[str, "Dataset"]:
    """All splits of a dataset: a Hub id, or the folder of a local copy."""
    import datasets

    folder = Path(dataset_path)
    try:
        return datasets.load_dataset(dataset_path, config, cache_dir=_cache_of(folder) if folder.is_dir() else None)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        error.add_note(
            f"The dataset is {dataset_path!r}, config {config!r}. Without network access, run the program in a "
            f"folder that contains {dataset_path!r}, or set {MIRROR_VARIABLE} to such a folder. For another copy or "
            f"config, set {DATASETS_VARIABLE} or pass dataset_path and config (lm-eval: --metadata)."
        )
        raise


def _cache_of(folder: Path) -> str:
    """A cache folder for the current contents of a local folder.

    The cache of `datasets` identifies a local folder by the `configs` in its README only, so that it would return old
    rows for a folder that has changed, and rows of another folder with the same layout.
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
        raise ValueError(f"{expected}, got {text!r}, which is not JSON.") from error
    entry = entries.get(task, {}) if isinstance(entries, dict) else None
    if not isinstance(entry, dict):
        raise ValueError(f"{expected}, got {text!r}.")
    return entry


def _config_in_copy(dataset_path: str, default: str | None) -> str | None:
    """The default config, or the only config of a local copy that does not have the default one."""
    import datasets

    if not Path(dataset_path).is_dir():
        return default
    try:
        names = datasets.get_dataset_config_names(dataset_path)
    except (FileNotFoundError, ValueError):
        return default  # loading the dataset will raise a better error
    return names[0] if default not in names and len(names) == 1 else default


def _in_mirror(dataset_path: str) -> str:
    mirror = os.environ.get(MIRROR_VARIABLE)
    folder = Path(mirror, dataset_path) if mirror else None
    return str(folder) if folder is not None and folder.is_dir() else dataset_path
