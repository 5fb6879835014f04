"""The steering half of a joint adapter in a block."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer

from ..post_block_steering.layer import PostBlockSteeringLayer


class JointSteeringLayer(PostBlockSteeringLayer):
    """
    The steering half of a joint adapter in a block.

    PEFT knows one prefix for each type, and transformers' own `load_adapter` finds the place of the adapter's name by
    it. LoRA's is `lora_`, so the steering half begins with it too; it is renamed when the halves are split.
    """

    adapter_layer_names = ("lora_steering_adapter",)

    @property
    def scaling(self) -> dict[str, float]:
        """Strength of each adapter by name, where PEFT's LoRA optimizers look for it."""
        return {name: adapter.scaling for name, adapter in self.adapters.items()}

    def follow(self, adapter_name: str, lora_layer: LoraLayer) -> None:
        """Lets the strength of an adapter follow what PEFT's tools multiply its LoRA half by, told by one of its
        layers (`rescale_adapter_scale`)."""
        self._lora_layers = {**self._lora_layers, adapter_name: lora_layer}

    # A dictionary, so that LoRA layers do not become children.
    _lora_layers: dict[str, LoraLayer] = {}

    def strength(self, name: str, adapter: Any) -> float:
        strength, lora = super().strength(name, adapter), self._lora_layers.get(name)
        if lora is None or name not in lora.scaling or not lora.lora_alpha[name]:
            return strength
        own = lora.lora_alpha[name] / (lora.r[name] ** 0.5 if lora.use_rslora[name] else lora.r[name])
        return strength if lora.scaling[name] == own else strength * float(lora.scaling[name] / own)
