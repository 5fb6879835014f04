"""The joint tuner: LoRA on the linear layers inside the blocks, steering on the blocks, one adapter."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import onload_layer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ..blocks import block_index, find_blocks, linear_layers
from ..post_block_steering import PostBlockSteeringConfig, PostBlockSteeringModel
from ..post_block_steering.layer import PostBlockSteeringLayer
from .config import JointSteeringConfig, steering_dict


class JointSteeringLayer(PostBlockSteeringLayer):
    """
    The steering half of a joint adapter in a block.

    PEFT knows one prefix for each type, and transformers' own `load_adapter` finds the place of the adapter's name by
    it. LoRA's is `lora_`, so the steering half begins with it too; it is renamed when the halves are split.
    """

    adapter_layer_names = ("lora_steering_adapter",)


class JointSteeringModel(PostBlockSteeringModel, LoraModel):  # type: ignore[misc]
    """
    Trains LoRA and post-block steering together, as one adapter in one folder.

    [`JointOrthSFTTrainer`] keeps the two halves in orthogonal output subspaces; by itself this is naive joint
    training.

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 4.1.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to adapt.
        config ([`JointSteeringConfig`]): The configuration.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create empty weights on the meta device, to be loaded into.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from trl_steer import JointSteeringConfig

        >>> base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> config = JointSteeringConfig(r=8, steering={"r": 8}, task_type="CAUSAL_LM")
        >>> model = get_peft_model(base, config)
        ```
    """

    prefix: str = "lora_"
    tuner_layer_cls = (LoraLayer, PostBlockSteeringLayer)  # type: ignore[assignment]
    steering_layer_cls = JointSteeringLayer

    def _steering_config(self, peft_config: JointSteeringConfig) -> PostBlockSteeringConfig:
        return peft_config.steering_config()

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict):
        return peft_config  # `target_modules=None` waits for `_prepare_model`, which may replicate blocks

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if peft_config.target_parameters:
            return
        if peft_config.target_modules is None:
            peft_config.target_modules = _linears_in_blocks(model, peft_config.layers_to_transform)
        _check_lora_targets(peft_config, model)

    def _check_target_module_exists(self, peft_config: JointSteeringConfig, key: str):
        steered = PostBlockSteeringModel._check_target_module_exists(self, peft_config, key)
        return steered or LoraModel._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        if peft_config.init_lora_weights is False and (peft_config.weights_follow or peft_config.inference_mode):
            # As for the steering half: should loading fail, the base model must not be left with a random adapter.
            peft_config = copy.copy(peft_config)
            peft_config.init_lora_weights = True
        # Also where the targets come from the keys of a file instead of from the configuration.
        tuner: Any = PostBlockSteeringModel if self._is_block(current_key) else LoraModel
        tuner._create_and_replace(
            self, peft_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )

    def _is_block(self, name: str) -> bool:
        return self._matcher is not None and self._matcher[1].is_block(name)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        # Per-sample adapters go to both halves alike; what else LoRA asks of a forward pass, it does itself.
        others = {name: value for name, value in kwargs.items() if name != "adapter_names"}
        with (
            LoraModel._enable_peft_forward_hooks(self, *args, **others),
            PostBlockSteeringModel._enable_peft_forward_hooks(self, *args, **kwargs),
        ):
            yield

    # Merging and unloading

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        Folds steering vectors into biases, where that is exact, and LoRA into weights.

        Raises:
            ValueError: The steering half cannot be folded, see [`PostBlockSteeringModel.merge_adapter`]. Nothing has
                changed.
        """
        super().merge_adapter(adapter_names, safe_merge)
        for layer in self._lora_layers():
            with onload_layer(layer):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        for layer in self._lora_layers():
            if layer.merged:
                with onload_layer(layer):
                    layer.unmerge()
        super().unmerge_adapter()  # last what was merged first

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        LoraModel._replace_module(self, parent, child_name, new_module, child)

    def _lora_layers(self) -> list[LoraLayer]:
        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    # Several adapters

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="cat", **kwargs) -> None:
        """
        As [`~peft.LoraModel.add_weighted_adapter`] for the LoRA half, where `combination_type="cat"` is the exact sum,
        and the exact sum for the steering half.
        """
        self._check_weighted(adapters, weights, adapter_name, "cat")
        summands, steering = self._summands(adapters, weights)
        LoraModel.add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **kwargs)
        config: Any = self.peft_config[adapter_name]
        config.steering = steering_dict(steering)
        for block in summands:
            self._steer_block(self.model.get_submodule(block), adapter_name, steering)
        self._write_sums(adapter_name, summands)


def _linears_in_blocks(model: nn.Module, layers: list[int] | int | None) -> set[str]:
    """Full names of all linear layers inside the blocks, the default targets of the LoRA half."""
    wanted = {layers} if isinstance(layers, int) else layers  # for full names, PEFT itself would not look at them
    blocks = [block for block in find_blocks(model) if wanted is None or block_index(block) in wanted]
    return {f"{block}.{name}" for block in blocks for name in linear_layers(model.get_submodule(block))}


def _check_lora_targets(config: JointSteeringConfig, model: nn.Module) -> None:
    """PEFT asks for any target at all, and a block to steer is one."""
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    if not any(LoraModel._check_target_module_exists(config, name) for name, _ in model.named_modules()):
        raise ValueError(
            f"No module is left for LoRA with target_modules={targets}, exclude_modules={config.exclude_modules}, "
            f"layers_to_transform={config.layers_to_transform}. Change these, or use PostBlockSteeringConfig for "
            "steering alone."
        )
