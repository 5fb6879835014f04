"""A joint adapter's folder as two, and two as one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..post_block_steering import PostBlockSteeringConfig
from .config import JointSteeringConfig

# The steering half's module inside a joint adapter and in an adapter of its own.
_JOINT_LEAF, _LEAF = ".post_block_steering.lora_steering_adapter.", ".post_block_steering.steering_adapter."


def split_adapter(folder: str | Path, lora: str | Path, steering: str | Path) -> None:
    """
    Writes the halves of a joint adapter into folders of their own.

    The LoRA half is a plain PEFT adapter that loads without this package. `modules_to_save` and trainable tokens go
    with it.

    Args:
        folder (`str` or `Path`): Folder or Hub id of the joint adapter.
        lora (`str` or `Path`): Folder to write the LoRA half into.
        steering (`str` or `Path`): Folder to write the steering half into.

    Raises:
        ValueError:
            `folder` holds another kind of adapter, not both halves of one, or one that replicates blocks; or one
            output lies in the other.
        FileExistsError: A folder to write into exists and is not empty.
    """
    config = _load_config(folder, JointSteeringConfig)
    if config.layer_replication:
        raise ValueError(
            f"{folder} replicates blocks (layer_replication={config.layer_replication}), which only LoRA can do: a "
            "steering half of its own would miss the blocks that it steers."
        )
    halves: dict[bool, dict[str, torch.Tensor]] = {False: {}, True: {}}
    for key, tensor in _load_tensors(folder).items():
        halves[_JOINT_LEAF in key][key.replace(_JOINT_LEAF, _LEAF)] = tensor
    for name, half in (("LoRA", halves[False]), ("steering", halves[True])):
        if not half:
            raise ValueError(f"{folder} holds no weights of a {name} half; it is not complete.")
    paths = [Path(target).resolve() for target in (lora, steering)]
    if paths[0].is_relative_to(paths[1]) or paths[1].is_relative_to(paths[0]):
        raise ValueError(f"The halves need folders of their own, got {lora} and {steering}.")
    lora_config, steering_config = config.lora_config(), config.steering_config()
    steering_config.modules_to_save = steering_config.trainable_token_indices = None
    for target in (lora, steering):
        _check_free(target)
    _write(lora, lora_config, halves[False])
    _write(steering, steering_config, halves[True])


def join_adapters(lora: str | Path, steering: str | Path, folder: str | Path) -> None:
    """
    Writes a LoRA and a steering adapter of the same base model as one joint adapter.

    Args:
        lora (`str` or `Path`): Folder or Hub id of the LoRA adapter.
        steering (`str` or `Path`): Folder or Hub id of the post-block steering adapter.
        folder (`str` or `Path`): Folder to write the joint adapter into.

    Raises:
        ValueError:
            An input is another kind of adapter, they are for different base models, or both hold weights of the same
            other module (`modules_to_save`) and these differ.
        FileExistsError: `folder` exists and is not empty.
    """
    lora_config, steering_config = _load_config(lora, LoraConfig), _load_config(steering, PostBlockSteeringConfig)
    bases = [config.base_model_name_or_path for config in (lora_config, steering_config)]
    if None not in bases and bases[0] != bases[1]:
        raise ValueError(f"The adapters are for different base models: {bases[0]!r} and {bases[1]!r}.")
    config = JointSteeringConfig.from_parts(lora_config, steering_config)
    config.base_model_name_or_path = bases[0] or bases[1]
    config.inference_mode = True
    tensors = _load_tensors(lora)
    for key, tensor in _load_tensors(steering).items():
        if key in tensors and not torch.equal(tensors[key], tensor):
            raise ValueError(f"Both adapters hold {key}, and their weights differ; only one of them can have it.")
        tensors[key.replace(_LEAF, _JOINT_LEAF)] = tensor
    _check_free(folder)
    _write(folder, config, tensors)


def _load_config(folder: str | Path, kind: type) -> Any:
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not kind:
        raise ValueError(f"{folder} holds a {type(config).__name__}, a {kind.__name__} is expected.")
    return config


def _load_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    if Path(folder).is_dir() and not any(
        Path(folder, name).exists() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
    ):
        raise FileNotFoundError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}.")
    try:
        return load_peft_weights(str(folder), device="cpu")
    except SafetensorError as error:
        raise ValueError(f"The weights in {folder} cannot be read: {error}.") from error


def _check_free(folder: str | Path) -> None:
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty; choose another folder or remove it.")


def _model_card(config: PeftConfig) -> ModelCard:
    """PEFT writes one beside every adapter that it saves."""
    method, base = str(config.peft_type.value).lower(), config.base_model_name_or_path  # type: ignore[union-attr]
    return ModelCard.from_template(ModelCardData(library_name="peft", base_model=base, tags=[method, "trl-steer"]))


def _write(folder: str | Path, config: PeftConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Whole or not at all: into a folder beside, which is then renamed."""
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        written = Path(temporary, "adapter")
        written.mkdir()
        config.save_pretrained(str(written))
        _model_card(config).save(written / "README.md")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, written / SAFETENSORS_WEIGHTS_NAME)
        if target.exists():
            target.rmdir()  # empty, as was checked
        os.replace(written, target)
