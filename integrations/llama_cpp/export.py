"""The formats `gguf` and `gguf-control-vector` of `trl-steer export`."""

from __future__ import annotations

import json
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from trl_steer.files import new_file

from ..export.adapter import PostBlockAdapter, opened
from ..export.progress import Progress
from . import base_model, calibration, inserted_blocks
from .families import FLEXIBLE, Family, family_of
from .gguf_file import BaseFile, Tensor, Value, count, number, text, write

ACTIVATIONS = (None, "silu")
# Prefix of our metadata.
OURS = "trl_steer."
CONSTANT = f"{OURS}constant"


def export_gguf(name: str, output: Path, base_path: str | Path, text_file: Path | None, progress: Progress) -> str:
    """Writes the GGUF file of a model with an adapter inside.

    Args:
        name (`str`): Folder or Hub id of the adapter.
        output (`Path`): The file to write.
        base_path (`str` or `Path`): The GGUF file of the base model.
        text_file (`Path`, *optional*): The text for calibration. Default: that of this package.
        progress ([`Progress`]): Receives the progress.

    Returns:
        `str`: What was written, in one line.

    Raises:
        ValueError: The adapter or the base model cannot be exported.
    """
    with opened(name) as adapter, new_file(output) as partial:
        base = BaseFile(Path(base_path))
        family = _checked_family(base, adapter)
        model: Any = None
        changed: list[str] = []
        if adapter.lora is not None or not adapter.is_vector:
            progress.step("Loading the base model")
            model, tokenizer = base_model.load(base)
        if adapter.lora is not None:
            progress.step("Merging LoRA")
            model, changed = base_model.merge_lora(base, model, adapter, family)
        record = _record(base, adapter, changed)
        if adapter.is_vector:
            architecture, metadata, tensors = _with_biases(base, family, adapter)
        else:
            progress.step("Measuring norms")
            passages = calibration.read_text(text_file)
            steered = base_model.with_adapter(model, adapter.steering, family)
            measured = calibration.measure(steered, tokenizer, passages, progress.update)
            record |= _record_of_calibration(passages, measured)
            architecture, metadata, tensors = _with_blocks(base, family, adapter, measured.constant)
        progress.step("Writing")
        write(partial, architecture, metadata | record, tensors, progress.update)
    return _summary(output, base, architecture, changed)


def check_gguf(name: str, file: Path, base_path: str | Path, text_file: Path | None, progress: Progress) -> str:
    """Checks that the constant in an exported file is large enough for an adapter on a text.

    Args: as in [`export_gguf`], but `file` is an exported file.

    Raises:
        ValueError: It is not, or the file has no constant.
    """
    constant = BaseFile(file).get(CONSTANT)
    if constant is None:
        raise ValueError(f"{file} has no {CONSTANT}: it is not a model with a low-rank adapter inside.")
    with opened(name) as adapter:
        base = BaseFile(Path(base_path))
        family = _checked_family(base, adapter)
        progress.step("Loading the base model")
        model, tokenizer = base_model.load(base)
        if adapter.lora is not None:
            progress.step("Merging LoRA")
            model, _ = base_model.merge_lora(base, model, adapter, family)
        progress.step("Measuring norms")
        steered = base_model.with_adapter(model, adapter.steering, family)
        measured = calibration.measure(steered, tokenizer, calibration.read_text(text_file), progress.update)
    margin = calibration.check(measured, constant)
    return (
        f"{file} is fine: the largest norm on {measured.tokens:,} tokens is {measured.norm:.4g}, and the constant is "
        f"{margin:,.0f} times as large."
    )


def export_control_vector(name: str, output: Path) -> str:
    """Writes a vector adapter as a control vector of llama.cpp.

    Raises:
        ValueError: The adapter is no vector, or it steers block 0.
    """
    with opened(name) as adapter:
        if not adapter.is_vector or adapter.lora is not None:
            raise ValueError(f"{name} is not a vector adapter. Use --format gguf.")
        if 0 in adapter.tensors:
            raise ValueError(
                f"{name} steers block 0, where llama.cpp applies no control vector. Use --format gguf, which writes "
                "the vectors as biases of the model, or train with --layers_to_transform."
            )
        metadata = {
            "controlvector.model_hint": text(adapter.config.base_model_type or ""),
            "controlvector.layer_count": count(len(adapter.tensors)),
            **_record_of_adapter(adapter),
        }
        tensors = {f"direction.{index}": Tensor(vector.numpy()) for index, vector in adapter.vectors().items()}
        with new_file(output) as partial:
            write(partial, "controlvector", metadata, tensors)
    return f"Wrote {len(tensors)} directions to {output}. Use it with llama.cpp's --control-vector."


def _checked_family(base: BaseFile, adapter: PostBlockAdapter) -> Family:
    """The family of the base model, after checks that the adapter fits.

    Raises:
        ValueError: It does not, or it has an activation that llama.cpp's block does not have.
    """
    family = family_of(base, adapter.config.base_model_type)
    width, blocks = (base.get(f"{base.architecture}.{key}") for key in ("embedding_length", "block_count"))
    if adapter.hidden_size != width or max(adapter.tensors) >= blocks:
        raise ValueError(
            f"{adapter.name} is of another model: its hidden size is {adapter.hidden_size} and its last block "
            f"{max(adapter.tensors)}, but {base.path.name} has hidden size {width} and {blocks} blocks."
        )
    if adapter.config.activation not in ACTIVATIONS:
        raise ValueError(
            f"{adapter.name} has activation={adapter.config.activation!r}. llama.cpp can run adapters without "
            "activation or with 'silu'. --format transformers can express all activations."
        )
    return family


def _with_biases(base: BaseFile, family: Family, adapter: PostBlockAdapter) -> tuple[str, dict, dict[str, Tensor]]:
    """Architecture, metadata and tensors of the model with vectors as biases of the MLPs' last layers."""
    if family.reads_bias:
        architecture, metadata, tensors = base.architecture, base.metadata(), dict(base.tensors)
    else:
        layout = inserted_blocks.plan_layout(base, {})
        architecture, metadata = FLEXIBLE, inserted_blocks.metadata(base, layout)
        tensors = inserted_blocks.base_tensors(base, family, layout)
    for index, vector in adapter.vectors().items():
        key = f"blk.{index}.ffn_down.bias"
        existing = tensors[key].values().astype(np.float64) if key in tensors else 0.0
        tensors[key] = Tensor((existing + vector.double().numpy()).astype(np.float32))
    return architecture, metadata, tensors


def _with_blocks(
    base: BaseFile, family: Family, adapter: PostBlockAdapter, constant: float
) -> tuple[str, dict, dict[str, Tensor]]:
    """Architecture, metadata and tensors of the model with a low-rank adapter in blocks of its own."""
    ranks = {index: tensors["down"].shape[0] for index, tensors in adapter.tensors.items()}
    layout = inserted_blocks.plan_layout(base, ranks)
    metadata = inserted_blocks.metadata(base, layout) | {CONSTANT: number(constant)}
    tensors = inserted_blocks.base_tensors(base, family, layout)
    return FLEXIBLE, metadata, tensors | inserted_blocks.inserted_tensors(base, adapter, layout, constant)


def _record(base: BaseFile, adapter: PostBlockAdapter, changed: list[str]) -> dict[str, Value]:
    record = {
        f"{OURS}base": text(base.path.name),
        f"{OURS}base.sha256": text(_digest(base.path)),
        **_record_of_adapter(adapter),
    }
    if adapter.lora is not None:
        record[f"{OURS}merged_tensors"] = count(len(changed))
    return record


def _record_of_adapter(adapter: PostBlockAdapter) -> dict[str, Value]:
    settings: dict[str, Any] = {
        field: getattr(adapter.config, field) for field in ("steering_type", "r", "activation", "scaling")
    }
    return {
        f"{OURS}version": text(version("trl-steer")),
        f"{OURS}adapter": text(Path(adapter.name).name),
        f"{OURS}adapter.sha256": text(adapter.digest),
        f"{OURS}adapter.config": text(json.dumps(settings)),
    }


def _record_of_calibration(passages: calibration.Text, measured: calibration.Measured) -> dict[str, Value]:
    return {
        f"{OURS}calibration": text(passages.name),
        f"{OURS}calibration.sha256": text(passages.digest),
        f"{OURS}calibration.tokens": count(measured.tokens),
        f"{OURS}largest_norm": number(measured.norm),
        f"{OURS}margin": number(measured.constant / measured.norm),
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _summary(output: Path, base: BaseFile, architecture: str, changed: list[str]) -> str:
    size, before = (file.stat().st_size / 1e6 for file in (output, base.path))
    said = f"Wrote {output}: architecture {architecture}, {size:.1f} MB (base model {before:.1f} MB)"
    if changed:
        said += f"; {len(changed)} tensors that LoRA changes, float16 where the base model is quantized"
    return f"{said}."
