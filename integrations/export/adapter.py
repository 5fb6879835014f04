"""What the exporters need of an adapter folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from trl_steer.choices import ALL
from trl_steer.tuners.joint_steering import JointSteeringConfig
from trl_steer.tuners.joint_steering.folders import split_adapter
from trl_steer.tuners.post_block_steering import PostBlockSteeringConfig, PostBlockSteeringLayer
from trl_steer.tuners.steering import AdapterFolder
from trl_steer.tuners.steering.folder import PREFIX, check_steering_tensors
from trl_steer.tuners.steering.matching import block_index

_CONTAINER = f".{PostBlockSteeringLayer.layer_name}.{PostBlockSteeringLayer.adapter_layer_names[0]}."


@dataclass(frozen=True)
class PostBlockAdapter:
    """
    A post-block steering adapter, or the two halves of a joint one.

    Attributes:
        name (`str`): The folder or Hub id given by the user.
        digest (`str`): SHA-256 of its weights.
        config ([`PostBlockSteeringConfig`]): The configuration of steering.
        blocks (`dict[int, str]`): Names of the steered blocks, by index.
        tensors (`dict[int, dict[str, torch.Tensor]]`): Of each steered block, in float32: `down` (r, d) and `up`
            (d, r), or `vector` (d,). Without the factor `config.scaling`.
        steering (`str`): The folder of the steering adapter: `name`, or that of the half of a joint adapter.
        lora (`str`, *optional*): The folder of the LoRA half of a joint adapter.
    """

    name: str
    digest: str
    config: PostBlockSteeringConfig
    blocks: dict[int, str]
    tensors: dict[int, dict[str, torch.Tensor]]
    steering: str
    lora: str | None

    @property
    def is_vector(self) -> bool:
        return self.config.steering_type == "vector"

    @property
    def hidden_size(self) -> int:
        tensors = next(iter(self.tensors.values()))
        return tensors["vector" if self.is_vector else "up"].shape[0]

    def vectors(self) -> dict[int, torch.Tensor]:
        """What a vector adapter adds to the output of each steered block, (d,) each: `scaling * vector`."""
        return {index: self.config.scaling * tensors["vector"] for index, tensors in self.tensors.items()}


@contextmanager
def opened(name: str) -> Iterator[PostBlockAdapter]:
    """Context manager that reads an adapter. The halves of a joint adapter are folders that exist inside it only.

    Args:
        name (`str`): Folder or Hub id.

    Raises:
        ValueError: It is not a valid post-block steering or joint adapter, or it edits some tokens only, or it has
            other trained weights.
    """
    folder = AdapterFolder.open(name)
    with tempfile.TemporaryDirectory() as temporary:
        config, lora = folder.config, None
        digest = sha256(folder.weights.read_bytes()).hexdigest()
        if isinstance(config, JointSteeringConfig):
            lora, half = str(Path(temporary, "lora")), str(Path(temporary, "steering"))
            split_adapter(name, lora, half)
            folder = AdapterFolder.open(half)
            config = folder.config
            _refuse_trained_modules(name, AdapterFolder.open(lora).config)
        if not isinstance(config, PostBlockSteeringConfig):
            raise ValueError(
                f"{name} has a {type(config).__name__}, which this format cannot express. Expected post-block "
                "steering or a joint adapter. What can be merged, --format transformers merges."
            )
        if config.positions != ALL:
            raise ValueError(
                f"{name} has positions={config.positions!r}, so that it edits some tokens only, which no format can "
                "express. Use it with PEFT."
            )
        _refuse_trained_modules(name, config)
        tensors = folder.tensors()
        check_steering_tensors(PostBlockSteeringLayer, config, tensors)
        blocks: dict[int, str] = {}
        by_block: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in sorted(tensors.items()):
            block, _, tensor_name = key.partition(_CONTAINER)
            index = block_index(block)
            blocks[index] = block.removeprefix(PREFIX)
            by_block.setdefault(index, {})[tensor_name] = tensor.float()
        yield PostBlockAdapter(
            name, digest, config, blocks, dict(sorted(by_block.items())), name if lora is None else half, lora
        )


def _refuse_trained_modules(name: str, config: Any) -> None:
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, field, None):
            raise ValueError(
                f"{name} has {field}={getattr(config, field)}: other weights than those of the adapter, which this "
                "format cannot express. --format transformers writes them."
            )
