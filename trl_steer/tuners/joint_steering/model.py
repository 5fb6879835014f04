"""The joint tuner: LoRA on the linear layers inside the blocks, steering on the blocks, one adapter."""

from __future__ import annotations

import copy
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
from ..steering.loading import Load
from ..steering.matching import block_index, find_blocks
from ..steering.sites import linear_layers
from ..steering.sums import check_summable, summed_config, write_sums
from ..steering.tuner import SteeringTuner
from .config import JointSteeringConfig, steering_dict
from .layer import JointSteeringLayer

# Fields that decide what the LoRA half computes. PEFT's hot swap asks for equal dropout as well.
_LORA_STRUCTURE = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("lora_dropout", "lora_bias", "bias", "fan_in_fan_out", "layer_replication"),
    *("alora_invocation_tokens", "use_qalora", "qalora_group_size", "use_bdlora", "kasa_config", "arrow_config"),
)
# Ways to initialize LoRA that also change the weights of the base model.
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica", "orthogonal")


class JointSteeringModel(SteeringTuner, LoraModel):  # type: ignore[misc] # LoRA names an argument differently
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
    tuner_layer_cls = (LoraLayer, JointSteeringLayer)  # type: ignore[assignment]
    steering_layer_cls = JointSteeringLayer

    # The steering half of a configuration

    @classmethod
    def steering_config(cls, config: JointSteeringConfig) -> PostBlockSteeringConfig:
        return config.steering_config()

    @classmethod
    def update_steering_config(cls, config: JointSteeringConfig, **fields: Any) -> None:
        config.steering.update(fields)

    @classmethod
    def structure(cls, config: JointSteeringConfig) -> dict[str, Any]:
        whole = ("modules_to_save", "trainable_token_indices")
        fields = {
            name if name in whole else f"steering.{name}": value for name, value in super().structure(config).items()
        }
        fields |= {name: getattr(config, name) for name in _LORA_STRUCTURE}
        init = str(config.init_lora_weights).lower()
        fields["init_lora_weights"] = init if init.startswith(_REWRITES_BASE) else None
        return {name: sorted(v) if isinstance(v, (list, tuple, set)) else v for name, v in fields.items()}

    # What PEFT does for LoRA and tells by the type of the adapter

    @staticmethod
    def _as_lora(config: JointSteeringConfig) -> JointSteeringConfig:
        """The configuration under LoRA's own type, for functions of PEFT that look at the type."""
        lora = copy.copy(config)
        lora.peft_type = PeftType.LORA
        return lora

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        super()._check_target_module_compatiblity(self._as_lora(peft_config), model, target_name)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, peft_model, peft_config, path, output_state_dict, kwargs):
        # PEFT has done this for LoRA, and `init_weights` for other types.
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path)
        converted = super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path, output_state_dict, kwargs
        )
        marker = f".{cls.steering_layer_cls.layer_name}."
        return converted | {key: tensor for key, tensor in output_state_dict.items() if marker in key}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        # Of experts' layers that transformers 5 has fused, a folder that was joined may have the tensors of before.
        lora = {key: tensor for key, tensor in state_dict.items() if cls.steering_layer_cls.layer_name not in key}
        converted = convert_peft_adapter_state_dict_for_transformers(model, cls._as_lora(config), lora, adapter_name)
        others = {key: tensor for key, tensor in state_dict.items() if key not in lora}
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, {**others, **converted})

    # Injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        lora_layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer) and adapter_name in module.scaling
        }
        for name, layer in self.named_steering_layers():
            block = name.removesuffix(layer.layer_name)
            own = [lora for lora_name, lora in lora_layers.items() if lora_name.startswith(block)]
            for lora in (own or list(lora_layers.values()))[:1]:
                layer.follow(adapter_name, lora)  # type: ignore[operator]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        model: Any = self.model
        targets, names = peft_config.target_modules, [name for name, _ in model.named_modules()]
        if isinstance(targets, (list, set)) and not all(
            any(_is_called(n, target) for n in names) for target in targets
        ):
            # Names of experts' layers that transformers 5 has fused, which PEFT translates for LoRA.
            lora = self._as_lora(peft_config)
            convert_peft_config_for_transformers(lora, model, get_model_conversion_mapping(model))
            vars(peft_config).update({**vars(lora), "peft_type": peft_config.peft_type})
        return peft_config  # `target_modules=None` waits for `_prepare_model`, which may replicate blocks

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        if peft_config.target_parameters:
            return
        if peft_config.target_modules is None:
            peft_config.target_modules = _linears_in_blocks(model, peft_config.layers_to_transform)
        self._check_lora_targets(peft_config, model)

    def _check_lora_targets(self, config: JointSteeringConfig, model: nn.Module) -> None:
        """PEFT asks for any target at all, and a block to steer is one."""
        targets = config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            return
        matcher = self._matcher(config)
        others = [name for name, _ in model.named_modules() if not matcher.is_block(name)]
        if not any(self._check_target_module_exists(config, name) for name in others):
            raise ValueError(
                f"No module is left for LoRA with target_modules={targets}, exclude_modules={config.exclude_modules}, "
                f"layers_to_transform={config.layers_to_transform}. Change these, or use PostBlockSteeringConfig for "
                "steering alone."
            )

    def _rewritten_weights(self, config: JointSteeringConfig) -> list[torch.Tensor]:
        if not config.kasa_config and not str(config.init_lora_weights).lower().startswith(_REWRITES_BASE):
            return []
        return [linear.weight for linear in linear_layers(self.model).values()]

    def _check_header(self, config: JointSteeringConfig, load: Load) -> None:
        super()._check_header(config, load)
        if config.use_dora and load.by_transformers:
            raise ValueError(
                "The `load_adapter` of transformers drops the magnitudes of DoRA (use_dora=True). Load this adapter "
                "with `PeftModel.from_pretrained`."
            )

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        if self.load is not None and not self._matcher(peft_config).is_block(current_key):
            # A trained parameter has no module of its own, so its matrices may be anywhere.
            self._check_rank(peft_config, current_key, "" if parameter_name else f"{current_key}.", self.load)
        super()._create_and_replace(
            peft_config, adapter_name, target, target_name, parent, current_key, parameter_name
        )

    def _check_rank(self, config: JointSteeringConfig, target: str, place: str, load: Load) -> None:
        """Makes sure that the file has matrices of the rank that a target of LoRA is about to get, before memory is
        taken for them. Whatever variants of LoRA make of the shapes, one size is a multiple of the rank."""
        ranks: dict = config.rank_pattern or {}
        r = ranks.get(get_pattern_key(list(ranks), target), config.r)
        header = load.header.items()
        matrices = {k: tuple(t.shape) for k, t in header if k.startswith(f"{PREFIX}{place}") and ".lora_" in k}
        if r > 0 and not any(size % r == 0 for shape in matrices.values() for size in shape):
            raise ValueError(
                f"The weights do not fit, so nothing was loaded: the configuration says rank {r} for {target}, and "
                f"the file has {matrices or 'nothing'} there."
            )

    # Saving

    @classmethod
    def _is_matrix(cls, config: Any, key: str) -> bool:
        is_lora = (".lora_A." in key or ".lora_B." in key) and key.endswith(".weight")
        return is_lora or super()._is_matrix(config, key)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(config.layer_replication for config in self.peft_config.values()):
            # PEFT means to, but looks for it among the names of the adapters.
            raise ValueError(
                "Adapters cannot be merged into replicated blocks (`layer_replication`), which share their weights. "
                "Keep the adapter instead (`save_pretrained`)."
            )

    # Several adapters

    def add_weighted_adapter(self, adapters, weights, adapter_name, combination_type="cat", *args, **kwargs) -> None:
        """
        As [`~peft.LoraModel.add_weighted_adapter`] for the LoRA half, where `combination_type="cat"` is the exact sum,
        and the exact sum for the steering half.
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


def _is_called(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")


def _linears_in_blocks(model: nn.Module, layers: list[int] | int | None) -> set[str]:
    """Full names of all linear layers inside the blocks, the default targets of the LoRA half."""
    wanted = {layers} if isinstance(layers, int) else layers  # for full names, PEFT itself would not look at them
    blocks = [block for block in find_blocks(model) if wanted is None or block_index(block) in wanted]
    return {f"{block}.{name}" for block in blocks for name in linear_layers(model.get_submodule(block))}
