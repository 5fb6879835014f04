"""The steering layer of joint adapters."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer

from ..post_block_steering.layer import PostBlockSteeringLayer


class JointSteeringLayer(PostBlockSteeringLayer):
    """
    The steering part of the joint adapters of one block, `<block>.post_block_steering`.

    PEFT has one prefix per adapter type, from which the `load_adapter` of transformers finds the position of the
    adapter's name in a key. LoRA's prefix is `lora_`, so the names of the steering tensors start with it too. They are
    renamed when the adapter is split.
    """

    adapter_layer_names = ("lora_steering_adapter",)

    @property
    def scaling(self) -> dict[str, float]:
        """The scaling of each adapter by name, which PEFT's LoRA optimizers read."""
        return {name: adapter.scaling for name, adapter in self.adapters.items()}

    def track_lora_scaling(self, adapter_name: str, lora_layer: LoraLayer) -> None:
        """Applies changes of LoRA's scaling, such as by PEFT's `rescale_adapter_scale`, to steering as well. They are
        read from one of the adapter's LoRA layers."""
        self._lora_layers = {**self._lora_layers, adapter_name: lora_layer}

    # In a dictionary, so that the LoRA layers do not become children of this layer.
    _lora_layers: dict[str, LoraLayer] = {}

    def effective_scaling(self, name: str, adapter: Any) -> float:
        scaling, lora = super().effective_scaling(name, adapter), self._lora_layers.get(name)
        if lora is None or name not in lora.scaling or not lora.lora_alpha[name]:
            return scaling
        initial = lora.lora_alpha[name] / (lora.r[name] ** 0.5 if lora.use_rslora[name] else lora.r[name])
        return scaling if lora.scaling[name] == initial else scaling * float(lora.scaling[name] / initial)
