"""Loading the models, adapters and batches that the arguments name."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from trl_steer.checkpoint_names import check_folder, check_on_hub

from .. import models
from ..console import Report as Progress

T = TypeVar("T")
ADAPTER_CONFIG = "adapter_config.json"


def tracked(items: Sequence[T], progress: Progress, name: str) -> Iterator[T]:
    """The items, as a step with a progress bar."""
    progress.step(name)
    for done, item in enumerate(items, 1):
        yield item
        progress.progress(done, len(items))
    progress.end("done")


def load_model(args: Any, progress: Progress, adapter: str | None = None) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer.

    Args:
        args: The arguments of the command.
        progress ([`Progress`]): Receives messages.
        adapter (`str`, *optional*): Hub id or folder of an adapter, which is loaded on `--model`.

    Raises:
        FileNotFoundError: There is no such model or adapter.
        ValueError: Neither `--model` nor an adapter is given, or the adapter is of another base model.
    """
    if adapter is not None:
        check_adapter(adapter)
    name = args.model or _base_of(adapter)
    models.check(name)
    name = models.resolve(name, progress.note)
    if adapter is not None and args.model:
        _note_another_base(adapter, name, progress)
    _quiet()
    model, tokenizer = models.load_base(name, adapter, dtype=args.dtype, device=args.device)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return model.eval(), tokenizer


def check_adapter(name: str) -> None:
    """Checks that an adapter exists.

    Raises:
        FileNotFoundError: It does not.
    """
    check_folder(name, ADAPTER_CONFIG)
    check_on_hub(name, config=ADAPTER_CONFIG)


def load_adapter(model: Any, adapter: str) -> Any:
    """The model with an adapter, as a `PeftModel`.

    Raises:
        ValueError: The adapter is of another base model.
    """
    from peft import PeftModel

    from trl_steer.tuners.steering import AdapterFolder

    try:
        loaded = PeftModel.from_pretrained(model, adapter, torch_device=str(model.device))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{adapter} is not an adapter of this base model: {reason[:400]}") from error
    _check_all_loaded(loaded, adapter, AdapterFolder.open(adapter).header())
    return loaded


def each_adapter(args: Any, progress: Progress) -> Iterator[tuple[str, Any, Iterator[dict[str, Any]]]]:
    """A short name, the model, and the batches of the texts, as a step, for each of `--adapter`."""
    progress.start(len(args.adapter))
    for adapter, name in zip(args.adapter, short_names(args.adapter), strict=True):
        model, tokenizer = load_model(args, progress, adapter)
        yield name, model, tracked(load_batches(args, tokenizer), progress, f"Running {name}")


def load_pair(args: Any, progress: Progress) -> tuple[Any, Any, Any]:
    """The base model (`None` if the fine-tuned one is that with an adapter), the model of `--tuned`, and the
    tokenizer. See `trl_steer.analysis.record_pair`.

    Raises:
        FileNotFoundError: There is no such model or adapter.
        ValueError: The models have different shapes, or the adapter is of another base model.
    """
    if _is_adapter(args.tuned):
        return (None, *load_model(args, progress, args.tuned))
    return load_separate_pair(args, progress, args.tuned)


def load_separate_pair(args: Any, progress: Progress, tuned: str) -> tuple[Any, Any, Any]:
    """The base model, the fine-tuned one, which shares no weights with it, and the tokenizer.

    Args:
        args: The arguments of the command.
        progress ([`Progress`]): Receives messages.
        tuned (`str`): Hub id or folder of the fine-tuned model: an adapter of the base model, or a full checkpoint.

    Raises:
        FileNotFoundError: There is no such model or adapter.
        ValueError: The models have different shapes, or the adapter is of another base model.
    """
    from trl_steer.analysis import check_same_shape

    if _is_adapter(tuned):
        with_adapter, tokenizer = load_model(args, progress, tuned)
        base, _ = load_model(argparse.Namespace(**{**vars(args), "model": args.model or _base_of(tuned)}), progress)
    else:
        models.check(tuned)
        base, tokenizer = load_model(args, progress)
        with_adapter, _ = models.load(tuned, dtype=args.dtype, device=args.device)
    check_same_shape(base, with_adapter)
    return base, with_adapter, tokenizer


def load_split(args: Any, tokenizer: Any) -> Any:
    """The batches of the texts that the arguments name, in the three parts of `trl_steer.analysis.Split`.

    Raises:
        ValueError: There are too few texts, or they have another format.
    """
    from trl_steer.analysis import Split, split_rows, text_batches

    from .texts import read_texts

    texts, is_chat = read_texts(args, tokenizer)
    parts = split_rows([text for text in texts if text])
    return Split(
        *(
            text_batches(tokenizer, part, args.batch_size, args.max_length, add_special_tokens=not is_chat)
            for part in parts
        )
    )


def load_batches(args: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The batches of the texts that the arguments name.

    Raises:
        ValueError: There are no texts, or they have another format.
    """
    from trl_steer.analysis import text_batches

    from .texts import read_texts

    texts, is_chat = read_texts(args, tokenizer)
    return text_batches(tokenizer, texts, args.batch_size, args.max_length, add_special_tokens=not is_chat)


def count_tokens(batches: Sequence[dict[str, Any]]) -> int:
    """Tokens of all batches, without padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def count_tokens_of_parts(split: Any) -> dict[str, int]:
    """Tokens of each part of a split, by its name."""
    return dict(zip(split._fields, map(count_tokens, split), strict=True))


def short_names(paths: Sequence[str]) -> list[str]:
    """Short names for adapters, all different: without `/adapter` at the end (of a run), the last part of the path, or
    as much of it as is needed."""
    parts = [Path(path).parts[:-1] if Path(path).name == "adapter" else Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def base_parameters(adapter: str) -> int | None:
    """The number of parameters of an adapter's base model, if its configuration is on this machine."""
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(base, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config).num_parameters()
    except (OSError, ValueError):
        return None


def _is_adapter(name: str) -> bool:
    if Path(name).is_dir():
        return Path(name, ADAPTER_CONFIG).is_file()
    from peft.utils.other import check_file_exists_on_hf_hub

    return bool(check_file_exists_on_hf_hub(name, ADAPTER_CONFIG))


def _base_of(adapter: str | None) -> str:
    if adapter is None:
        raise ValueError("Pass --model, the base model.")
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not name its base model. Pass --model.")
    return base


def _note_another_base(adapter: str, name: str, progress: Progress) -> None:
    """A model of the same shape is not an error: it may be the same model in another place, or a version of it."""
    from peft import PeftConfig

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if base and Path(base).resolve() != Path(name).resolve():
        progress.note(f"{adapter} names {base} as its base model. It is loaded on {name}.")


def _check_all_loaded(model: Any, adapter: str, header: dict[str, Any]) -> None:
    """PEFT only warns of missing and unexpected tensors."""
    from peft import get_peft_model_state_dict

    loaded = {
        key: tensor.shape for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    saved = {key: tensor.shape for key, tensor in header.items() if "embed" not in key and "lm_head" not in key}
    different = sorted(key for key, shape in saved.items() if loaded.get(key, shape) != shape or key not in loaded)
    different += sorted(loaded.keys() - header.keys())
    if different:
        raise ValueError(
            f"{adapter} is not an adapter of this base model: {len(different)} of its tensors do not match, for "
            f"example {different[0]}."
        )


def _quiet() -> None:
    """Leaves the screen to our progress."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore")
