"""A joint adapter's folder as two, and two as one."""

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
from ..steering.card import DescribesItself, public_id
from ..steering.folder import PREFIX, AdapterFolder, check_without_model
from .config import JointSteeringConfig, check_lora_fields

# The steering half's module inside a joint adapter and in an adapter of its own.
_JOINT_LEAF, _LEAF = ".post_block_steering.lora_steering_adapter.", ".post_block_steering.steering_adapter."


class Adapter(NamedTuple):
    """What a folder holds."""

    config: PeftConfig
    tensors: dict[str, torch.Tensor]


def split_adapter(folder: str | Path, lora: str | Path, steering: str | Path) -> None:
    """
    Writes the halves of a joint adapter into folders of their own: both, or none where something fails. If this was
    killed after the first one, running it again writes the other.

    The LoRA half is a plain PEFT adapter that loads without this package. `modules_to_save` and trainable tokens go
    with it.

    Args:
        folder (`str` or `Path`): Folder or Hub id of the joint adapter.
        lora (`str` or `Path`): Folder to write the LoRA half into.
        steering (`str` or `Path`): Folder to write the steering half into.

    Raises:
        ValueError:
            `folder` holds another kind of adapter, a broken or incomplete one, or one that replicates blocks; or one
            output lies in the other.
        FileExistsError: A folder to write into exists and is not empty.
    """
    joint = _load(folder, JointSteeringConfig)
    config: Any = joint.config
    if config.layer_replication:
        raise ValueError(
            f"{folder} replicates blocks (layer_replication={config.layer_replication}), which only LoRA can do: a "
            "steering half of its own would miss the blocks that it steers."
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
    Writes a LoRA and a steering adapter of the same base model as one joint adapter.

    Args:
        lora (`str` or `Path`): Folder or Hub id of the LoRA adapter.
        steering (`str` or `Path`): Folder or Hub id of the post-block steering adapter.
        folder (`str` or `Path`): Folder to write the joint adapter into.

    Raises:
        ValueError:
            An input is another kind of adapter or broken, they are for different base models, or both hold weights of
            the same other module (`modules_to_save`) and these differ.
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
            raise ValueError(f"Both adapters hold {key}, and their weights differ; only one of them can have it.")
        tensors[key.replace(_LEAF, _JOINT_LEAF)] = tensor
    _write([Path(folder)], [Adapter(config, tensors)])


def _load(path: str | Path, kind: Any) -> Adapter:
    folder = AdapterFolder.open(path)
    config: Any = folder.config
    if type(config) is not kind:
        raise ValueError(f"{path} holds a {type(config).__name__}, a {kind.__name__} is expected.")
    if isinstance(config, LoraConfig):
        try:
            check_lora_fields(config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is broken: {error}") from error
    return Adapter(config, folder.tensors())


def _check(path: str | Path, adapter: Adapter) -> None:
    """What can be told without a model of what `PeftModel.from_pretrained` checks."""
    is_steering = isinstance(adapter.config, PostBlockSteeringConfig)
    own = {key: t for key, t in adapter.tensors.items() if (_LEAF if is_steering else ".lora_") in key}
    if not own:
        half = "steering" if is_steering else "LoRA"
        raise ValueError(f"{path} holds no weights of a {half} half; it is not complete.")
    try:
        if is_steering:
            check_without_model(PostBlockSteeringLayer, adapter.config, own)
        else:
            _check_lora(adapter)
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    strays = sorted(key for key in adapter.tensors if not key.startswith(PREFIX))
    if strays:
        raise ValueError(f"{path} is broken: {', '.join(strays[:4])} should begin with {PREFIX!r}.")
    integers = sorted(key for key, t in own.items() if not t.is_floating_point())
    if integers:
        raise ValueError(f"{path} is broken: {', '.join(integers[:4])} should have floating point numbers.")
    broken = [key for key, t in adapter.tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"{path} is broken: NaN or infinite values in {', '.join(sorted(broken)[:4])}.")


def _check_lora(adapter: Adapter) -> None:
    config: Any = adapter.config
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        module, found, leaf = key.partition(".lora_")
        if found:
            modules.setdefault(module, {})[leaf.removeprefix("embedding_")] = tensor
    for module, leaves in modules.items():
        pair = {kind: leaves.get(kind, leaves.get(f"{kind}.weight")) for kind in "AB"}
        wanted = {"A": True, "B": True, "B.bias": config.lora_bias, "magnitude_vector": config.use_dora}
        missing = [leaf for leaf, is_wanted in wanted.items() if is_wanted and {**leaves, **pair}.get(leaf) is None]
        unknown = [leaf for leaf in leaves if leaf[:2] in ("A.", "B.") and leaf[2:] not in ("weight", "bias")]
        if missing or unknown:
            raise ValueError(f"{module} lacks {missing} of lora_ and has {unknown} too many.")
        _check_rank(config, module, pair["A"], pair["B"])  # type: ignore[arg-type]


def _check_rank(config: Any, module: str, A: torch.Tensor, B: torch.Tensor) -> None:
    patterns = config.rank_pattern or {}
    r = patterns.get(get_pattern_key(list(patterns), module.removeprefix(PREFIX)), config.r)
    if config.use_bdlora or config.use_qalora or config.target_parameters:  # which store matrices of other shapes
        fits = any(size % r == 0 for size in (*A.shape, *B.shape))
    else:
        fits = A.dim() == B.dim() >= 2 and A.shape[0] == B.shape[1] == r
    if not fits:
        raise ValueError(
            f"{module} has matrices of shapes {tuple(A.shape)} and {tuple(B.shape)}, and the configuration says "
            f"rank {r}."
        )


def _write(targets: Sequence[Path], adapters: Sequence[Adapter]) -> None:
    """Writes all adapters, or none. What is already there, whole and the same, is left as it is."""
    pairs = zip(targets, adapters, strict=True)
    missing = [(target, adapter) for target, adapter in pairs if not _holds(target, adapter)]
    with new_folders(*(target for target, _ in missing)) as partials:
        for partial, (_, adapter) in zip(partials, missing, strict=True):
            contiguous = {key: tensor.contiguous() for key, tensor in adapter.tensors.items()}
            try:
                save_file(contiguous, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            except SafetensorError as error:  # of a full disk, for example
                raise OSError(f"{SAFETENSORS_WEIGHTS_NAME} cannot be written: {error}") from error
            adapter.config.save_pretrained(str(partial))
            if not isinstance(adapter.config, DescribesItself):
                _lora_card(adapter.config).save(partial / "README.md")


def _holds(target: Path, adapter: Adapter) -> bool:
    if not (target / CONFIG_NAME).is_file():
        return False
    try:
        found = _load(target, type(adapter.config))
    except Exception:  # whatever it is, it is something else
        return False
    return (
        found.config.to_dict() == adapter.config.to_dict()
        and found.tensors.keys() == adapter.tensors.keys()
        and all(torch.equal(tensor, found.tensors[key]) for key, tensor in adapter.tensors.items())
    )


def _lora_card(config: PeftConfig) -> ModelCard:
    data = ModelCardData(library_name="peft", base_model=public_id(config.base_model_name_or_path), tags=["lora"])
    text = "# LoRA adapter\n\nThe LoRA half of a joint adapter that was trained with `trl_steer`. Load it with PEFT."
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
