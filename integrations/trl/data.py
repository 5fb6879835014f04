"""The data of `trl-steer sft`: one of our tasks, a file, a dataset on the Hub, or a mixture of datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_steer.integrations.trl.arguments import SteeringArguments
from trl_steer.integrations.trl.source_arguments import ArgumentError
from trl_steer.tasks import load_task
from trl_steer.tasks.sources import reader_of


def load_dataset(ours: SteeringArguments, script: Any, training: Any, mixture: Any, model: str) -> Any:
    """The splits to train and evaluate on, as a `DatasetDict`.

    Raises:
        ArgumentError: The dataset cannot be loaded, or a split is missing.
    """
    splits = _load(ours, script, mixture)
    needed = [script.dataset_train_split, *([script.dataset_test_split] if training.eval_strategy != "no" else [])]
    for name in needed:
        if name not in splits:
            raise ArgumentError(
                f"The dataset has no split {name}, only {', '.join(map(str, splits))}. Choose another split with "
                "--dataset_train_split or --dataset_test_split, or another copy with --dataset_name or "
                "--dataset_config."
            )
    if not ours.train_end_token:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        splits = splits.map(
            lambda row: without_end_token(row, tokenizer), remove_columns=splits[needed[0]].column_names
        )
    return splits


def _load(ours: SteeringArguments, script: Any, mixture: Any) -> Any:
    import datasets
    from trl import get_dataset

    try:
        if ours.task:
            return load_task_rows(ours, script.dataset_name, script.dataset_config)
        if mixture.datasets:
            return get_dataset(mixture)
        name, streaming = script.dataset_name, script.dataset_streaming
        reader = reader_of(name)
        if reader is not None and Path(name).is_file():
            rows = datasets.load_dataset(reader, data_files=name, split="train", streaming=streaming)
            return datasets.DatasetDict({"train": rows})
        return datasets.load_dataset(name, name=script.dataset_config, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        what = f"--task {ours.task}" if ours.task else "The dataset"
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        notes = getattr(error, "__notes__", [])
        raise ArgumentError(" ".join([f"{what}: {cause or error}", *notes])) from error


def load_task_rows(ours: SteeringArguments, dataset_path: str | None, config: str | None) -> Any:
    """The splits of `--task`, limited to `--task_rows`."""
    given = {"dataset_path": dataset_path, "config": config}
    source = {key: value for key, value in given.items() if value is not None}
    splits = load_task(str(ours.task), ours.task_splits, conversational=ours.task_conversational, **source)
    if ours.task_rows is None:
        return splits
    return type(splits)({name: rows.select(range(min(ours.task_rows, len(rows)))) for name, rows in splits.items()})


def without_end_token(row: dict, tokenizer: Any) -> dict[str, list[int]]:
    """A prompt-completion example in TRL's tokenized format, without the EOS token that TRL would add.

    Raises:
        ArgumentError: The row is not a prompt and a completion of text.
    """
    if not (isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)):
        raise ArgumentError(
            f"--train_end_token false needs rows with `prompt` and `completion` as text, got {', '.join(row)}"
            f"{' as messages' if 'prompt' in row else ''}. Pass --train_end_token true."
        )
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
    if tokenizer.eos_token_id is not None and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return {"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * (len(ids) - len(prompt))}
