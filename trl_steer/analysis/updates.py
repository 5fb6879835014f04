"""The updates of an adapter as matrices, read from its folder without a model."""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.other import get_pattern_key

from ..tuners.lofit.config import HeadLayout, HeadSteeringConfig
from ..tuners.steering.adapter import AffineUpdate
from ..tuners.steering.folder import PREFIX, AdapterFolder
from ..tuners.steering.tuner import SteeringTuner

_LORA = re.compile(r"\.lora_([AB])\.weight$")


@dataclass(frozen=True)
class Update:
    """
    The update of one module or site: a matrix `left @ right` or a diagonal one, an offset, or both.

    Attributes:
        block (`int`, *optional*): Index of the block, `None` outside of the blocks.
        module (`str`): Name in the block of the module with LoRA, or the site of steering.
        is_steering (`bool`): Whether it is steering, rather than LoRA.
        tensors (`dict[str, torch.Tensor]`): The tensors of the adapter by name, float64.
        affine ([`AffineUpdate`], *optional*): The update times its scaling, float64. An activation is left out. `None`
            if tensors are missing, have values that are not finite, or LoRA is not `B A`.
        problem (`str`, *optional*): Why `affine` is `None`.
    """

    block: int | None
    module: str
    is_steering: bool
    tensors: Mapping[str, torch.Tensor]
    affine: AffineUpdate | None = None
    problem: str | None = field(default=None)

    @property
    def spectrum(self) -> torch.Tensor:
        """The singular values of the matrix in descending order, without those that are zero because of its rank; for
        an update without matrix, the norm of the offset. Float64, empty if there is no update."""
        if self.affine is None:
            return torch.empty(0, dtype=torch.float64)
        left, right, offset, diagonal = self.affine
        if left is not None and right is not None:
            inner = torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT
            return torch.linalg.svdvals(inner)
        if diagonal is not None:
            return diagonal.abs().sort(descending=True).values
        return offset.norm().reshape(1)  # type: ignore[union-attr]

    @property
    def offset(self) -> float:
        """The norm of the offset."""
        offset = None if self.affine is None else self.affine.offset
        return 0.0 if offset is None else offset.norm().item()


def read_updates(folder: str | Path | AdapterFolder) -> list[Update]:
    """
    The updates of an adapter, in the order of the blocks.

    Args:
        folder (`str`, `Path` or [`AdapterFolder`]): Folder or Hub id of an adapter, ours or LoRA.

    Raises:
        ValueError: There is no adapter, it cannot be read, or it is of another type.
    """
    folder = folder if isinstance(folder, AdapterFolder) else AdapterFolder.open(folder)
    config, tensors = folder.config, folder.tensors()
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    is_steering = isinstance(tuner, type) and issubclass(tuner, SteeringTuner)
    if not is_steering and not isinstance(config, LoraConfig):
        raise ValueError(f"{folder.path} has an adapter of type {config.peft_type}, expected one of ours or LoRA.")
    found = _lora_updates(config, tensors) if isinstance(config, LoraConfig) else []
    found += _steering_updates(tuner, tuner.steering_config(config), tensors) if is_steering else []
    return sorted(found, key=lambda update: (math.inf if update.block is None else update.block, update.is_steering))


def _lora_updates(config: Any, tensors: Mapping[str, torch.Tensor]) -> list[Update]:
    modules: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        match = _LORA.search(key)
        if match:
            modules[key[: match.start()].removeprefix(PREFIX)][match[1]] = tensor.double()
    return [_lora_update(config, name, named) for name, named in modules.items()]


def _lora_update(config: Any, name: str, named: Mapping[str, torch.Tensor]) -> Update:
    block, module = _split(name)
    A, B = named.get("A"), named.get("B")
    if A is None or B is None:
        return Update(block, module, False, named, problem=f"LoRA's {'A' if A is None else 'B'} is missing")
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        return Update(
            block, module, False, named, problem=f"LoRA of shapes {(*A.shape,)} and {(*B.shape,)} is not B A"
        )
    if not (A.isfinite().all() and B.isfinite().all()):
        return Update(block, module, False, named, problem="values are not finite")
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    r = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return Update(block, module, False, named, AffineUpdate(alpha / (r**0.5 if config.use_rslora else r) * B, A))


def _steering_updates(tuner: Any, config: Any, tensors: Mapping[str, torch.Tensor]) -> list[Update]:
    layer_cls = tuner.steering_layer_cls
    container = f".{layer_cls.layer_name}.{layer_cls.adapter_layer_names[0]}."
    blocks: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, separator, tensor_name = key.partition(container)
        if separator:
            blocks[name.removeprefix(PREFIX)][tensor_name] = tensor.double()
    updates: list[Update] = []
    for name, named in blocks.items():
        updates += _steering_update(layer_cls, config, name, named)
    return updates


def _steering_update(layer_cls: Any, config: Any, name: str, named: dict[str, torch.Tensor]) -> list[Update]:
    index = _split(f"{name}.")[0]
    try:
        adapter = _loaded(layer_cls, config, named)
        affine = adapter.merge(None, config.scaling)
    except (ValueError, RuntimeError, KeyError) as error:
        return [Update(index, config.site, True, named, problem=" ".join(str(error).split()))]
    if affine.left is None or affine.left.dim() == 2:
        return [Update(index, config.site, True, named, affine)]
    # The first and the last tokens of the prompt have weights of their own.
    return [
        Update(
            index, f"{config.site} ({which})", True, named, AffineUpdate(*(p if p is None else p[i] for p in affine))
        )
        for i, which in enumerate(("first", "last"))
    ]


def _loaded(layer_cls: Any, config: Any, named: dict[str, torch.Tensor]) -> Any:
    """The adapter of one block, in float64, without its activation."""
    for name, tensor in named.items():
        if not tensor.isfinite().all():
            raise ValueError(f"values of {name} are not finite")
    widest = max(named.values(), key=lambda tensor: tensor.dim())
    width = widest.shape[-1]
    if isinstance(config, HeadSteeringConfig):
        config, width = copy.copy(config), widest.numel()
        vars(config)["layout"] = HeadLayout(*widest.shape)
    adapter_class = layer_cls.adapter_class(config)
    if "down" in named:
        width = named["down"].shape[-1]
    adapter = adapter_class(width, config).double().eval()
    for name, tensor in named.items():
        problem = adapter_class.find_problem(name, tensor)
        if problem:
            raise ValueError(f"{name} {problem}")
    adapter.load_state_dict(named)
    adapter.activation = None
    return adapter


def _split(name: str) -> tuple[int | None, str]:
    """The index of the block in the name of a module, and the rest of the name: `(3, "mlp.down_proj")`."""
    match = re.search(r"\.(\d+)\.", name)
    return (None, name) if match is None else (int(match[1]), name[match.end() :])
