"""The tuner of joint adaptation: LoRA on the linear layers inside the blocks and steering on the blocks."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import PeftType
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
    get_model_conversion_mapping,
)
from torch import nn

from ..post_block_steering import PostBlockSteeringConfig
from ..steering.folder import PREFIX
from ..steering.load_in_progress import Load
from ..steering.matching import block_index, find_blocks, modules_outside_adapters, name_matches
from ..steering.sites import linear_layers
from ..steering.sums import check_summable, summed_config, write_sums
from ..steering.tuner import SteeringTuner
from .config import JointSteeringConfig, steering_dict
from .layer import JointSteeringLayer

# LoRA's fields that must be equal for a hot swap. As in PEFT's own, these include the dropout.
_LORA_STRUCTURE = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("lora_dropout", "lora_bias", "bias", "fan_in_fan_out", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "qalora_group_size", "use_bdlora", "kasa_config", "arrow_config"),
)
# Initializations of LoRA that also change the weights of the base model.
_MODIFIES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica", "orthogonal")


class JointSteeringModel(SteeringTuner, LoraModel):  # type: ignore[misc] # LoRA names an argument differently
    """
    Trains LoRA and post-block steering together, as one adapter in one folder.

    Without [`JointOrthSFTTrainer`], which keeps the outputs of LoRA and of steering in orthogonal subspaces, this is
    the naive joint training of the paper.

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 4.1.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to adapt.
        config ([`JointSteeringConfig`]): The configuration.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create empty adapter weights on the meta device.

    Example:

        ```py
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import AutoModelForCausalLM
        >>> from trl_steer import JointSteeringConfig, PostBlockSteeringConfig

        >>> lora = LoraConfig(r=8, task_type="CAUSAL_LM")
        >>> config = JointSteeringConfig.from_parts(lora, PostBlockSteeringConfig(r=8))
        >>> model = get_peft_model(AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B"), config)
        ```
    """

    prefix: str = "lora_"
    tuner_layer_cls = (LoraLayer, JointSteeringLayer)  # type: ignore[assignment]
    steering_layer_cls = JointSteeringLayer

    # The steering part of a configuration

    @classmethod
    def steering_config(cls, config: JointSteeringConfig) -> PostBlockSteeringConfig:
        return config.steering_config()

    @classmethod
    def update_steering_config(cls, config: JointSteeringConfig, **fields: Any) -> None:
        config.steering = {**vars(config)["steering"], **fields}

    @classmethod
    def structure(cls, config: JointSteeringConfig) -> dict[str, Any]:
        shared = ("modules_to_save", "trainable_token_indices")
        fields = {
            name if name in shared else f"steering.{name}": value for name, value in super().structure(config).items()
        }
        fields |= {name: getattr(config, name) for name in _LORA_STRUCTURE}
        init = str(config.init_lora_weights).lower()
        fields["init_lora_weights"] = init if init.startswith(_MODIFIES_BASE) else None
        return {name: sorted(v) if isinstance(v, (list, tuple, set)) else v for name, v in fields.items()}

    # What PEFT does only for adapters whose type is LoRA

    @staticmethod
    def _as_lora(config: JointSteeringConfig) -> JointSteeringConfig:
        """The configuration with the type of LoRA, for functions of PEFT that check the type."""
        lora = copy.copy(config)
        lora.peft_type = PeftType.LORA
        return lora

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        super()._check_target_module_compatiblity(self._as_lora(peft_config), model, target_name)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, peft_model, peft_config, path, output_state_dict, kwargs):
        # PEFT sets `init_lora_weights` for adapters of type LoRA only.
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path)
        converted = super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path, output_state_dict, kwargs
        )
        marker = f".{cls.steering_layer_cls.layer_name}."
        return converted | {key: tensor for key, tensor in output_state_dict.items() if marker in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # The LoRA adapter that this was joined from may be older than transformers 5, which has fused experts' layers.
        lora = {key: tensor for key, tensor in state_dict.items() if cls.steering_layer_cls.layer_name not in key}
        converted = convert_peft_adapter_state_dict_for_transformers(model, cls._as_lora(config), lora, adapter_name)
        others = {key: tensor for key, tensor in state_dict.items() if key not in lora}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, {**others, **converted})

    # Injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        lora_layers = {
            name: module
            for name, module in modules_outside_adapters(model)
            if isinstance(module, LoraLayer) and adapter_name in module.scaling
        }
        for name, layer in self.named_steering_layers():
            block = name.removesuffix(layer.layer_name)
            own = [lora for lora_name, lora in lora_layers.items() if lora_name.startswith(block)]
            for lora in (own or list(lora_layers.values()))[:1]:
                layer.track_lora_scaling(adapter_name, lora)  # type: ignore[operator]

    def _other_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
        return LoraModel._enable_peft_forward_hooks(self, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        model: Any = self.model
        targets, names = peft_config.target_modules, [name for name, _ in modules_outside_adapters(model)]
        if isinstance(targets, (list, set)) and not all(
            any(name_matches(n, target) for n in names) for target in targets
        ):
            # PEFT converts the names of experts' layers, which transformers 5 has fused, for LoRA.
            lora = self._as_lora(peft_config)
            convert_peft_config_for_transformers(lora, model, get_model_conversion_mapping(model))
            vars(peft_config).update({**vars(lora), "peft_type": peft_config.peft_type})
        return peft_config  # `target_modules=None` is handled by `_prepare_model`, which may replicate blocks

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if peft_config.target_parameters:
            return
        if peft_config.target_modules is None:
            peft_config.target_modules = _linear_layers_in_blocks(model, peft_config.layers_to_transform)
        self._check_lora_targets(peft_config, model)

    def _check_lora_targets(self, config: JointSteeringConfig, model: nn.Module) -> None:
        """Checks that LoRA has a target. PEFT's own check also counts the blocks to steer.

        Raises:
            ValueError: It has none.
        """
        targets = config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            return
        matcher = self._matcher(config)
        others = [name for name, _ in modules_outside_adapters(model) if not matcher.is_block(name)]
        if not any(self._check_target_module_exists(config, name) for name in others):
            raise ValueError(
                f"No module for LoRA matches target_modules={targets}, exclude_modules={config.exclude_modules}, "
                f"layers_to_transform={config.layers_to_transform}. Change these, or use PostBlockSteeringConfig for "
                "steering without LoRA."
            )

    def _modified_base_weights(self, config: JointSteeringConfig) -> list[torch.Tensor]:
        if not config.kasa_config and not str(config.init_lora_weights).lower().startswith(_MODIFIES_BASE):
            return []
        return [linear.weight for linear in linear_layers(self.model).values()]

    def _check_header(self, config: JointSteeringConfig, load: Load) -> None:
        super()._check_header(config, load)
        if config.use_dora and load.by_transformers:
            raise ValueError(
                "An adapter with use_dora=True cannot be loaded with the `load_adapter` of transformers, which "
                "ignores DoRA's magnitudes. Load it with `PeftModel.from_pretrained`."
            )

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if self.current_load is not None and not self._matcher(peft_config).is_block(current_key):
            # A target parameter is not a module, so that its matrices may be in any module.
            self._check_file_rank(
                peft_config, current_key, "" if parameter_name else f"{current_key}.", self.current_load
            )
        super()._create_and_replace(
            peft_config, adapter_name, target, target_name, parent, current_key, parameter_name
        )

    def _check_file_rank(self, config: JointSteeringConfig, target: str, place: str, load: Load) -> None:
        """Checks that the file has matrices of the configured rank for a target of LoRA, before memory is allocated
        for them. In all variants of LoRA, one dimension is a multiple of the rank.

        Raises:
            ValueError: It does not.
        """
        ranks: dict = config.rank_pattern or {}
        r = ranks.get(get_pattern_key(list(ranks), target), config.r)
        header = load.header.items()
        matrices = {k: tuple(t.shape) for k, t in header if k.startswith(f"{PREFIX}{place}") and ".lora_" in k}
        if r > 0 and not any(size % r == 0 for shape in matrices.values() for size in shape):
            raise ValueError(
                f"The weights do not match the configuration, so nothing was loaded: expected rank {r} for {target}, "
                f"but the file has {matrices or 'no matrices'} there. Check that the adapter's folder is complete."
            )

    # Saving

    @classmethod
    def _is_matrix(cls, config: Any, key: str) -> bool:
        is_lora = (".lora_A." in key or ".lora_B." in key) and key.endswith(".weight")
        return is_lora or super()._is_matrix(config, key)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(config.layer_replication for config in self.peft_config.values()):
            # PEFT's own check has no effect, because it looks for the field in the dictionary of configurations.
            raise ValueError(
                "Adapters with `layer_replication` cannot be merged, because the replicated blocks share their "
                "weights. Keep the adapter instead (`save_pretrained`)."
            )

    # Several adapters

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="cat", *args, **kwargs) -> None:
        """
        As [`~peft.LoraModel.add_weighted_adapter`] for LoRA, where `combination_type="cat"` is the exact sum, and
        always the exact sum for steering.
        """
        check_summable(self, adapters, weights, adapter_name)
        steering = summed_config(self, adapters)
        super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, *args, **kwargs)
        config: Any = self.peft_config[adapter_name]
        config.steering = steering_dict(steering)
        for name, layer in self.named_steering_layers():
            if set(adapters) & set(layer.adapters):
                self.steer_block(self.model.get_submodule(name.rpartition(".")[0]), adapter_name, steering)
        write_sums(self, adapters, weights, adapter_name)


def _linear_layers_in_blocks(model: nn.Module, layers: list[int] | int | None) -> set[str]:
    """Full names of all linear layers inside the blocks, the default targets of LoRA."""
    wanted = {layers} if isinstance(layers, int) else layers  # PEFT ignores `layers_to_transform` for full names
    blocks = [block for block in find_blocks(model) if wanted is None or block_index(block) in wanted]
    return {f"{block}.{name}" for block in blocks for name in linear_layers(model.get_submodule(block))}
