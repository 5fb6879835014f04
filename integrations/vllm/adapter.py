"""What of an adapter folder vLLM is given, checked as PEFT's loading checks it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from trl_steer.choices import ALL

# Names of the sites and activations that the model has from the start, separated by spaces. Where vLLM compiles the
# model or records graphs, no others can be added later.
SITES_VARIABLE, ACTIVATIONS_VARIABLE = "TRL_STEER_VLLM_SITES", "TRL_STEER_VLLM_ACTIVATIONS"

JOINT = "JOINT_STEERING"
OURS = ("POST_BLOCK_STEERING", "SUBLAYER_STEERING", JOINT)
# Tuners whose adapters are never served, and what to do instead.
_OTHERS = {
    "LOREFT": "its edit has a form that is not computed here. Generate with transformers",
    "LOFIT": "it steers attention heads. Merge it into a base model whose attention output has a bias",
    "JOLA": "it steers attention heads. Merge it into a base model whose attention output has a bias",
}


class SiteWeights(NamedTuple):
    """The update in one block.

    Attributes:
        down (`torch.Tensor`): (r, d), `W_down`. `r` is 0 for a vector.
        up (`torch.Tensor`): (d, r + 1), the scaled `W_up` and, in the last column, the scaled vector.
    """

    down: torch.Tensor
    up: torch.Tensor


class Steering(NamedTuple):
    """The steering of an adapter.

    Attributes:
        site (`str`): Its site, one of [`SITES`].
        activation (`str`, *optional*): The activation of the bottleneck.
        blocks (`dict[str, SiteWeights]`): The weights by the names of blocks.
    """

    site: str
    activation: str | None
    blocks: dict[str, SiteWeights]


def peft_type_of(folder: str) -> str | None:
    """The type of the adapter in a folder, `None` if its configuration does not say.

    Raises:
        ValueError: The configuration is not a regular file, which vLLM might read for ever.
    """
    path = Path(folder, "adapter_config.json")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is not a regular file.")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    found = config.get("peft_type") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None


def check_type(peft_type: str | None) -> None:
    """Checks that adapters of a type can be served.

    Raises:
        ValueError: They cannot.
    """
    if peft_type in _OTHERS:
        raise ValueError(f"An adapter of type {peft_type} cannot be served: {_OTHERS[peft_type]}.")


def check_config(config: Any) -> Any:
    """Checks that the options of an adapter can be served.

    Args:
        config ([`SteeringConfig`] or [`JointSteeringConfig`]): The configuration of the adapter.

    Returns:
        [`AdditiveSteeringConfig`]: The configuration of the steering.

    Raises:
        ValueError: They cannot.
    """
    steering = config.steering_config() if hasattr(config, "steering_config") else config
    if steering.positions != ALL:
        raise ValueError(
            f"positions={steering.positions!r} cannot be served, because vLLM computes prompts in parts and in the "
            "same batch as new tokens. Only 'all' can."
        )
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name):
            raise ValueError(
                f"{name}={getattr(config, name)!r} cannot be served: vLLM has one set of weights of these modules for "
                "all requests. Train without it."
            )
    return steering


def ranks_of(config: Any) -> list[int]:
    """The largest ranks of an adapter's halves.

    Args:
        config ([`~peft.PeftConfig`]): A configuration of steering, of LoRA or of both.
    """
    found = []
    steering = config.steering_config() if hasattr(config, "steering_config") else config
    if hasattr(steering, "largest_rank"):
        found.append(steering.largest_rank if steering.steering_type == "low_rank" else 1)
    if hasattr(config, "lora_alpha"):
        found.append(max([config.r, *(config.rank_pattern or {}).values()]))
    return found


def read_steering(folder: str, model: nn.Module, max_rank: int, dtype: torch.dtype) -> Steering:
    """The steering of an adapter, as the layers for vLLM take it.

    Args:
        folder (`str`): A folder with an adapter of post-block or sublayer steering.
        model (`nn.Module`): vLLM's model, with a transformers configuration.
        max_rank (`int`): The largest rank that the server has room for.
        dtype (`torch.dtype`): The dtype of the weights.

    Raises:
        ValueError: The folder has no valid adapter, or it is for another model, or its rank is too large.
    """
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    from trl_steer.tuners.steering.folder import AdapterFolder, check_steering_tensors
    from trl_steer.tuners.steering.loading import check_base_model_type

    opened = AdapterFolder.open(folder)
    config = check_config(opened.config)
    check_base_model_type(config, model, config.base_model_type)
    if max(ranks_of(config)) > max_rank:
        raise ValueError(
            f"Its rank {max(ranks_of(config))} is larger than --max-lora-rank {max_rank}. Start the server with a "
            "larger one."
        )
    tensors = opened.tensors()
    tuner_cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    layer_cls = tuner_cls.steering_layer_cls
    check_steering_tensors(layer_cls, config, tensors)
    by_block = _by_block(tensors, f".{layer_cls.layer_name}.")
    _check_blocks(model, config, by_block)
    blocks = {name: _weights(named, config.scaling, dtype) for name, named in by_block.items()}
    return Steering(config.site, config.activation, blocks)


def _by_block(tensors: Mapping[str, torch.Tensor], separator: str) -> dict[str, dict[str, torch.Tensor]]:
    from trl_steer.tuners.steering.folder import PREFIX

    blocks: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).partition(separator)[0]
        blocks.setdefault(name, {})[key.rpartition(".")[2]] = tensor
    return blocks


def _check_blocks(model: nn.Module, config: Any, blocks: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Checks that a file has weights for exactly the blocks that its configuration chooses, and of the right width.

    Raises:
        ValueError: It has not.
    """
    from trl_steer.tuners.steering.matching import BlockMatcher, text_config

    wanted = BlockMatcher(model, config).matched()
    missing, extra = [name for name in wanted if name not in blocks], sorted(blocks.keys() - set(wanted))
    if missing or extra:
        raise ValueError(
            f"The blocks of the adapter are not those of the model: weights are missing for {_few(missing)}, and "
            f"there are unexpected ones for {_few(extra)}. Check that it was trained on this model, and that its "
            "folder is complete."
        )
    named = next(iter(blocks.values()))
    width, theirs = text_config(model).hidden_size, named.get("down", named.get("vector")).shape[-1]  # type: ignore[union-attr]
    if theirs != width:
        raise ValueError(
            f"The adapter is for hidden states of size {theirs}, but those of the model have {width}. Serve the model "
            "that it was trained on."
        )


def _weights(named: Mapping[str, torch.Tensor], scaling: float, dtype: torch.dtype) -> SiteWeights:
    if "vector" in named:
        up = named["vector"].float().unsqueeze(1)
        down = up.new_empty(0, len(up))
    else:
        down, up = named["down"], F.pad(named["up"].float(), (0, 1))
    weights = SiteWeights(down.to(dtype), (scaling * up).to(dtype))
    if not all(torch.isfinite(tensor).all() for tensor in weights):
        raise ValueError(f"The adapter has values that are infinite in {dtype}. Serve the model in another --dtype.")
    return weights


def _few(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]) or "none"
