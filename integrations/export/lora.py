"""The format `lora` of `trl-steer export`: linear steering as a LoRA adapter, for engines that know only LoRA.

Its target is a layer `post_block_steering` in each block, which has no weights of its own, reads the block's output
`h`, and gives zeros that are added to it. With LoRA, this is `h + lora_alpha / r * B A h`. An engine needs a model
class with such layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from trl_steer.tuners.post_block_steering import PostBlockSteeringLayer
from trl_steer.tuners.steering.folder import PREFIX

from .adapter import opened
from .output import output_folder


def export_lora(name: str, output: Path, overwrite: bool) -> str:
    """Writes a low-rank adapter as a LoRA adapter.

    Blocks of smaller rank are filled up with zeros, since not every engine reads LoRA's `rank_pattern`.

    Args:
        name (`str`): Folder or Hub id of the adapter.
        output (`Path`): The folder to write.
        overwrite (`bool`): Whether to replace an existing folder.

    Returns:
        `str`: What was written, in one line.

    Raises:
        ValueError: The adapter is not linear, or it is joint.
    """
    layer = PostBlockSteeringLayer.layer_name
    with opened(name) as adapter:
        if adapter.lora is not None:
            raise ValueError(
                f"{name} is a joint adapter. Split it first (trl-steer split), and export the steering half."
            )
        if adapter.is_vector:
            raise ValueError(f"{name} is a vector adapter, and LoRA has no constant. Use another format.")
        if adapter.config.activation is not None:
            raise ValueError(
                f"{name} has activation={adapter.config.activation!r}, and LoRA is linear. Use another format."
            )
        rank = max(len(tensors["down"]) for tensors in adapter.tensors.values())
        tensors: dict[str, torch.Tensor] = {}
        for index, block in adapter.blocks.items():
            down, up = adapter.tensors[index]["down"], adapter.tensors[index]["up"]
            missing = rank - len(down)
            prefix = f"{PREFIX}{block}.{layer}."
            tensors[f"{prefix}lora_A.weight"] = torch.nn.functional.pad(down, (0, 0, 0, missing)).contiguous()
            tensors[f"{prefix}lora_B.weight"] = torch.nn.functional.pad(up, (0, missing)).contiguous()
        config: Any = LoraConfig(
            r=rank,
            lora_alpha=adapter.config.scaling * rank,  # type: ignore[arg-type]
            target_modules=[layer],
            base_model_name_or_path=adapter.config.base_model_name_or_path,
            task_type=adapter.config.task_type,
            inference_mode=True,
        )
        with output_folder(output, overwrite) as partial:
            save_file(tensors, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            config.save_pretrained(str(partial))
    return f"Wrote {output}: LoRA of rank {rank} on {layer} in {len(adapter.blocks)} blocks."
