"""Splits the folder of a joint adapter into a LoRA and a steering adapter, and joins two such folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...files import new_folders
from ..post_block_steering import PostBlockSteeringConfig, PostBlockSteeringLayer
from ..steering.card import ModelCardMixin, public_id
from ..steering.folder import PREFIX, AdapterFolder, check_steering_tensors
from .config import JointSteeringConfig, check_lora_fields

# Part of the keys of steering tensors in a joint adapter, and in a post-block steering adapter.
_JOINT_LEAF, _LEAF = ".post_block_steering.lora_steering_adapter.", ".post_block_steering.steering_adapter."


class Adapter(NamedTuple):
    """The contents of an adapter folder."""

    config: PeftConfig
    tensors: dict[str, torch.Tensor]


def split_adapter(folder: str | Path, lora: str | Path, steering: str | Path) -> None:
    """
    Splits a joint adapter into a LoRA adapter and a post-block steering adapter.

    The LoRA adapter is a plain PEFT adapter, which can be loaded without this package. It includes `modules_to_save`
    and trainable tokens. If writing fails, neither folder is written. If the process is killed between the two,
    running it again completes the split.

    Args:
        folder (`str` or `Path`): Folder or Hub id of the joint adapter.
        lora (`str` or `Path`): Folder to write the LoRA adapter to.
        steering (`str` or `Path`): Folder to write the steering adapter to.

    Raises:
        ValueError:
            `folder` does not have a valid joint adapter, or the adapter uses `layer_replication`, or one output folder
            is inside the other.
        FileExistsError: An output folder exists and is not empty.
    """
    joint = _load(folder, JointSteeringConfig)
    config: Any = joint.config
    if config.layer_replication:
        raise ValueError(
            f"{folder} cannot be split, because it uses layer_replication={config.layer_replication}. A steering "
            "adapter cannot replicate blocks, so it would steer blocks that do not exist. Use the joint adapter."
        )
    halves: dict[bool, dict[str, torch.Tensor]] = {False: {}, True: {}}
    for key, tensor in joint.tensors.items():
        halves[_JOINT_LEAF in key][key.replace(_JOINT_LEAF, _LEAF)] = tensor
    steering_config = config.steering_config()
    steering_config.modules_to_save = steering_config.trainable_token_indices = None
    lora_config: PeftConfig = config.lora_config()
    parts = [Adapter(lora_config, halves[False]), Adapter(steering_config, halves[True])]
    for part in parts:
        _check(folder, part)
    _write([Path(lora), Path(steering)], parts)


def join_adapters(lora: str | Path, steering: str | Path, folder: str | Path) -> None:
    """
    Joins a LoRA and a post-block steering adapter of the same base model into a joint adapter.

    Args:
        lora (`str` or `Path`): Folder or Hub id of the LoRA adapter.
        steering (`str` or `Path`): Folder or Hub id of the post-block steering adapter.
        folder (`str` or `Path`): Folder to write the joint adapter to.

    Raises:
        ValueError:
            An input is not a valid adapter of its kind, the base models are different, or both adapters have the same
            module in `modules_to_save`, with different weights.
        FileExistsError: `folder` exists and is not empty.
    """
    halves = _load(lora, LoraConfig), _load(steering, PostBlockSteeringConfig)
    for path, half in zip((lora, steering), halves, strict=True):
        _check(path, half)
    bases = [half.config.base_model_name_or_path for half in halves]
    if None not in bases and bases[0] != bases[1]:
        raise ValueError(f"The adapters are for different base models: {bases[0]!r} and {bases[1]!r}.")
    lora_config, steering_config = (half.config for half in halves)
    config = JointSteeringConfig.from_parts(lora_config, steering_config)  # type: ignore[arg-type]
    config.base_model_name_or_path = bases[0] or bases[1]
    config.inference_mode = True
    tensors = dict(halves[0].tensors)
    for key, tensor in halves[1].tensors.items():
        if key in tensors and not torch.equal(tensors[key], tensor):
            raise ValueError(
                f"Both adapters have {key}, with different weights. Join adapters that do not share modules."
            )
        tensors[key.replace(_LEAF, _JOINT_LEAF)] = tensor
    _write([Path(folder)], [Adapter(config, tensors)])


def _load(path: str | Path, kind: Any) -> Adapter:
    folder = AdapterFolder.open(path)
    config: Any = folder.config
    if type(config) is not kind:
        raise ValueError(f"{path} has a {type(config).__name__}, expected a {kind.__name__}.")
    if isinstance(config, LoraConfig):
        try:
            check_lora_fields(config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a valid adapter: {error}") from error
    return Adapter(config, folder.tensors())


def _check(path: str | Path, adapter: Adapter) -> None:
    """Checks the tensors of an adapter, as far as possible without a model."""
    is_steering = isinstance(adapter.config, PostBlockSteeringConfig)
    own = {key: t for key, t in adapter.tensors.items() if (_LEAF if is_steering else ".lora_") in key}
    if not own:
        kind = "steering" if is_steering else "LoRA"
        raise ValueError(f"{path} is not a valid adapter: it has no {kind} weights.")
    try:
        if is_steering:
            check_steering_tensors(PostBlockSteeringLayer, adapter.config, own)
        else:
            _check_lora(adapter)
    except ValueError as error:
        raise ValueError(f"{path} is not a valid adapter: {error}") from error
    problems = {
        f"keys should start with {PREFIX!r}": [key for key in adapter.tensors if not key.startswith(PREFIX)],
        "tensors should be floating point": [key for key, t in own.items() if not t.is_floating_point()],
        "tensors have NaN or infinite values": [
            key for key, t in adapter.tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()
        ],
    }
    for problem, keys in problems.items():
        if keys:
            raise ValueError(f"{path} is not a valid adapter: {problem}: {', '.join(sorted(keys)[:4])}.")


def _check_lora(adapter: Adapter) -> None:
    config: Any = adapter.config
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        module, found, tensor_name = key.partition(".lora_")
        if found:
            modules.setdefault(module, {})[tensor_name.removeprefix("embedding_")] = tensor
    for module, named in modules.items():
        pair = {kind: named.get(kind, named.get(f"{kind}.weight")) for kind in "AB"}
        wanted = {"A": True, "B": True, "B.bias": config.lora_bias, "magnitude_vector": config.use_dora}
        missing = [name for name, is_wanted in wanted.items() if is_wanted and {**named, **pair}.get(name) is None]
        unknown = [name for name in named if name[:2] in ("A.", "B.") and name[2:] not in ("weight", "bias")]
        if missing or unknown:
            raise ValueError(f"{module} has missing LoRA tensors {missing} or unexpected ones {unknown}.")
        _check_lora_shapes(config, module, pair["A"], pair["B"])  # type: ignore[arg-type]


def _check_lora_shapes(config: Any, module: str, A: torch.Tensor, B: torch.Tensor) -> None:
    patterns = config.rank_pattern or {}
    r = patterns.get(get_pattern_key(list(patterns), module.removeprefix(PREFIX)), config.r)
    if config.use_bdlora or config.use_qalora or config.target_parameters:  # whose matrices have other shapes
        fits = any(size % r == 0 for size in (*A.shape, *B.shape))
    else:
        fits = A.dim() == B.dim() >= 2 and A.shape[0] == B.shape[1] == r
    if not fits:
        raise ValueError(
            f"{module} has matrices of shapes {tuple(A.shape)} and {tuple(B.shape)}, expected rank {r} as in the "
            "configuration."
        )


def _write(targets: Sequence[Path], adapters: Sequence[Adapter]) -> None:
    """Writes all adapters, or none if one fails. Skips folders that already have the same adapter."""
    pairs = zip(targets, adapters, strict=True)
    missing = [(target, adapter) for target, adapter in pairs if not _is_written(target, adapter)]
    with new_folders(*(target for target, _ in missing)) as partials:
        for partial, (_, adapter) in zip(partials, missing, strict=True):
            contiguous = {key: tensor.contiguous() for key, tensor in adapter.tensors.items()}
            try:
                save_file(contiguous, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            except SafetensorError as error:  # for example if the disk is full
                raise OSError(f"Can't write {SAFETENSORS_WEIGHTS_NAME}: {error}") from error
            adapter.config.save_pretrained(str(partial))
            if not isinstance(adapter.config, ModelCardMixin):
                _lora_card(adapter.config).save(partial / "README.md")


def _is_written(target: Path, adapter: Adapter) -> bool:
    if not (target / CONFIG_NAME).is_file():
        return False
    try:
        found = _load(target, type(adapter.config))
    except Exception:  # not a valid adapter, so not the same one
        return False
    return (
        found.config.to_dict() == adapter.config.to_dict()
        and found.tensors.keys() == adapter.tensors.keys()
        and all(torch.equal(tensor, found.tensors[key]) for key, tensor in adapter.tensors.items())
    )


def _lora_card(config: PeftConfig) -> ModelCard:
    data = ModelCardData(library_name="peft", base_model=public_id(config.base_model_name_or_path), tags=["lora"])
    text = "# LoRA adapter\n\nThe LoRA part of a joint adapter that was trained with `trl_steer`. Load it with PEFT."
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
