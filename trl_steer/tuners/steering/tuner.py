"""The part of a tuner that steers blocks: injects, checks, merges and removes the steering layers."""

from __future__ import annotations

import copy
import warnings
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from trl_steer.choices import ALL

from .adapter_dict import only_adapter
from .config import SteeringConfig
from .folder import PREFIX
from .forward import ForwardMixin
from .functional import adapter_scaling, set_scaling
from .initial_weights import write_initial_weights
from .layer import SteeringLayer
from .load_in_progress import Load
from .loading import (
    check_adapter_tensors,
    check_base_model_type,
    check_header,
    keep_until_dispatched,
    model_keys,
    restored_on_failure,
)
from .matching import BlockMatcher, check_hidden_size, modules_outside_adapters, text_config
from .merging import merge as merge_steering
from .merging import merge_other_layers
from .prompts import unwatch, watch
from .saving import check_other_names, check_tensor_names, gather_auxiliary_tensors, gather_tensors


class SteeringTuner(ForwardMixin):
    """
    Mixin that steers blocks. In the list of base classes, it comes before the tuner that handles all other targets,
    which it calls by `super()`.

    Attributes:
        steering_layer_cls (`type[SteeringLayer]`): The layer class of this tuner.
        current_load ([`Load`], *optional*): During an injection, the load that it is part of.
    """

    steering_layer_cls: type[SteeringLayer]
    current_load: Load | None = None
    model: nn.Module
    peft_config: dict[str, Any]

    @cached_property
    def loaded_weights(self) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
        """Weights of an adapter by steering layer, kept while PEFT dispatches a model with offloaded weights again."""
        return {}

    # The steering part of a configuration. Here, this is the configuration itself

    @classmethod
    def steering_config(cls, config: Any) -> SteeringConfig:
        """The steering part of an adapter's configuration."""
        return config

    @classmethod
    def update_steering_config(cls, config: Any, **fields: Any) -> None:
        """Sets fields of the steering part of an adapter's configuration."""
        for name, value in fields.items():
            setattr(config, name, value)

    @classmethod
    def structure(cls, config: Any) -> dict[str, Any]:
        """The fields that must be equal for one adapter to replace another in place."""
        steering = cls.steering_config(config)
        adapter_class = cls.steering_layer_cls.adapter_class(steering)
        fields = {name: getattr(config, name, None) for name in ("modules_to_save", "trainable_token_indices")}
        for name in ("site", "positions", *adapter_class.structural_fields, *adapter_class.size_fields):
            fields[name] = getattr(steering, name, None)
        return {name: sorted(v) if isinstance(v, (list, tuple, set)) else v for name, v in fields.items()}

    # Injection

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # `target_modules=None` is kept, and selects all blocks of the model it is loaded on

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        check_hidden_size(model)
        self._matchers.clear()
        self._matcher(peft_config)
        if self.current_load is not None:
            self._check_header(peft_config, self.current_load)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        steered = self._matcher(peft_config)(key)
        if steered is None or steered is False:  # but not PEFT's `_ExcludedModule`, which is falsy too
            return super()._check_target_module_exists(peft_config, key)
        return steered

    def _matcher(self, peft_config: Any) -> BlockMatcher:
        """The blocks selected by a configuration. Cached, since an injection looks up every module of the model."""
        if id(peft_config) not in self._matchers:
            self._matchers[id(peft_config)] = BlockMatcher(self.model, self.steering_config(peft_config))
        return self._matchers[id(peft_config)]

    @cached_property
    def _matchers(self) -> dict[int, BlockMatcher]:
        return {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """As in [`~peft.tuners.tuners_utils.BaseTuner`], but checks the weights if the adapter is being loaded, and
        restores the model if anything fails.

        Raises:
            ValueError: The name is invalid, blocks or sites do not exist, or the weights do not match the model.
        """
        _check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        if any(other is config for name, other in self.peft_config.items() if name != adapter_name):
            # TRL uses the policy's configuration object for its reference adapter, but each has its own scaling.
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        if state_dict is not None:
            # PEFT takes the part of a key before the prefix as the name of the target.
            marker = f".{self.steering_layer_cls.layer_name}.{self.prefix}"
            state_dict = {k.removeprefix(PREFIX).replace(marker, f".{self.prefix}"): t for k, t in state_dict.items()}
        with only_adapter(adapter_name), restored_on_failure(self, adapter_name, self._modified_base_weights(config)):
            self.current_load = Load.in_progress()
            if self.current_load is not None:
                check_base_model_type(config, model, self.steering_config(config).base_model_type)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            if self.current_load is not None:
                self.check_tensors(model, config, adapter_name, self.current_load.tensors())
            elif self.steering_config(config).init_from is not None:
                write_initial_weights(self, adapter_name)
            self.current_load = None
            if self.steering_config(config).positions != ALL:
                watch(model)
        self.update_steering_config(config, base_model_type=getattr(text_config(model), "model_type", None))

    def _modified_base_weights(self, config: Any) -> list[torch.Tensor]:
        """Weights of the base model that the injection of an adapter changes in place."""
        return []

    def _check_header(self, config: Any, load: Load) -> None:
        """Checks that the file has exactly the steering tensors of the configuration, before memory is allocated for
        them."""
        if any(name.startswith("_orig_mod.") for name, _ in modules_outside_adapters(self.model)):
            return  # the keys of a compiled model differ from those of the file; `check_tensors` handles that
        steering, layer_cls = self.steering_config(config), self.steering_layer_cls
        container = f"{layer_cls.layer_name}.{layer_cls.adapter_layer_names[0]}"
        expected = {}
        for block in self._matcher(config).matched():
            site = self._new_layer(self.model.get_submodule(block)).anatomy.site(steering.site)
            shapes = layer_cls.adapter_class(steering).shapes(steering.for_block(block, site), site.width)
            for tensor_name, shape in shapes.items():
                expected[f"{PREFIX}{block}.{container}.{tensor_name}"] = torch.empty(shape, device="meta")
        adapter_name = next(name for name, known in self.peft_config.items() if known is config)
        check_header(adapter_name, expected, {k: t for k, t in load.header.items() if f".{container}." in k})

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        # `is_block`, because with `state_dict` PEFT injects into the modules in its keys, not those selected here.
        if self._matcher(peft_config).is_block(current_key):
            self.steer_block(target, adapter_name, self.steering_config(peft_config), current_key)
            return
        others = {} if parameter_name is None else {"parameter_name": parameter_name}
        super()._create_and_replace(  # type: ignore[safe-super]
            peft_config, adapter_name, target, target_name, parent, current_key=current_key, **others
        )

    def steer_block(self, block: nn.Module, adapter_name: str, config: SteeringConfig, name: str = "") -> None:
        """Adds an adapter to a block, called `name`, and a steering layer if the block does not have one."""
        layer = getattr(block, self.steering_layer_cls.layer_name, None)
        if layer is None:
            layer = self._new_layer(block)
            layer.train(block.training)
            block.add_module(layer.layer_name, layer)
        layer.update_layer(adapter_name, config.for_block(name, layer.anatomy.site(config.site)))
        if adapter_name not in self.active_adapters:
            layer.adapters[adapter_name].requires_grad_(False)

    def _new_layer(self, block: nn.Module) -> SteeringLayer:
        return self.steering_layer_cls(block, text_config(self.model))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with only_adapter(adapter_name):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        # This is the only method that PEFT calls after it has dispatched the model to devices.
        loaded = self.loaded_weights.pop(adapter_name, {})
        for name, layer in self.named_steering_layers():
            layer.move_to_execution_device(adapter_name, loaded.get(f"{PREFIX}{name}"))
            if not autocast_adapter_dtype:
                layer.cast_to_block(adapter_name)

    # Saving and loading

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        steering, layer_cls = cls.steering_config(config), cls.steering_layer_cls
        container = f".{layer_cls.layer_name}.{layer_cls.adapter_layer_names[0]}.{adapter_name}."
        check_tensor_names(adapter_name, tensors, container, layer_cls.adapter_class(steering).shapes(steering, 1))
        layers = [
            n for n, m in modules_outside_adapters(model) if isinstance(m, layer_cls) and adapter_name in m.adapters
        ]
        check_other_names(adapter_name, layers, unwanted_adapter_names)
        gather_auxiliary_tensors(model, adapter_name, state_dict)
        return gather_tensors(adapter_name, tensors, lambda key: cls._is_matrix(config, key))

    @classmethod
    def _is_matrix(cls, config: Any, key: str) -> bool:
        """Whether the tensor of an adapter with this key has two dimensions."""
        steering = cls.steering_config(config)
        shapes = cls.steering_layer_cls.adapter_class(steering).shapes(steering, 1)
        shape = shapes.get(key.rpartition(".")[2], ())
        return f".{cls.steering_layer_cls.layer_name}." in key and len(shape) == 2

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        with only_adapter(adapter_name):
            return cls._checked_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _checked_for_load(cls, model, config, adapter_name, state_dict):
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        has_biases = getattr(config, "bias", "none") != "none"
        biases = cls._get_learnable_bias_state_dict(model, model.state_dict() if has_biases else {}, config)
        steering, layer_cls = cls.steering_config(config), cls.steering_layer_cls
        adapter_class, container = layer_cls.adapter_class(steering), f".{layer_cls.layer_name}."

        def find_problem(key: str, tensor: torch.Tensor) -> str | None:
            return adapter_class.find_problem(key.rpartition(".")[2], tensor) if container in key else None

        check_adapter_tensors(model, adapter_name, tensors, state_dict, biases, find_problem)
        keep_until_dispatched(model, adapter_name, tensors)
        return tensors

    @classmethod
    def check_tensors(cls, model: Any, config: Any, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Checks the tensors of a file against an injected adapter.

        Raises:
            ValueError: They do not match. The message lists them.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        cls._remap_adapter_state_dict_for_load(base, config, adapter_name, model_keys(base, adapter_name, tensors))

    # Scaling

    def set_scaling(self, adapter_name: str, value: float) -> None:
        """Sets the scaling of an adapter, see [`trl_steer.set_scaling`]."""
        set_scaling(self, adapter_name, value)

    def adapter_scaling(self, adapter_name: str, value: float) -> AbstractContextManager[None]:
        """Context manager that sets the scaling of an adapter, see [`trl_steer.adapter_scaling`]."""
        return adapter_scaling(self, adapter_name, value)

    # Several adapters

    def delete_adapter(self, adapter_name: str) -> None:
        active = self.active_adapters
        super().delete_adapter(adapter_name)
        if adapter_name in active:
            # Each layer activates one of its own adapters, which differ between blocks with different adapters.
            remaining = [name for name in active if name != adapter_name] or sorted(self.peft_config)[:1]
            if remaining:
                self.set_adapter(remaining)
        if all(self.steering_config(config).positions == ALL for config in self.peft_config.values()):
            unwatch(self.model)

    # Merging and unloading

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        Merges adapters into linear layers of the base model, if this is exact. Keeps a copy of each tensor that it
        changes, so that unmerging restores it bit for bit.

        Raises:
            ValueError: The adapters cannot be merged exactly. The model is left unchanged. If merging another kind of
                layer fails, all adapters are unmerged.
        """
        self._check_merge_allowed()
        merge_steering(self, adapter_names, safe_merge)
        try:
            merge_other_layers(self, adapter_names, safe_merge)
        except BaseException:
            self.unmerge_adapter()
            raise

    def unmerge_adapter(self) -> None:
        merged = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer) and module.merged]
        # In the reverse order of merging.
        for layer in sorted(merged, key=lambda layer: isinstance(layer, SteeringLayer)):
            with onload_layer(layer):
                layer.unmerge()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self.merge_adapter(adapter_names, safe_merge)  # can fail, so before the first layer is removed
        else:
            self.unmerge_adapter()
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.set_adapter([])  # PEFT would replace the original by the trained copy
        for _, layer in self.named_steering_layers():
            layer.remove()
        unwatch(self.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            setattr(parent, child_name, new_module)  # PEFT's method expects an adapter layer
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def named_steering_layers(self) -> list[tuple[str, SteeringLayer]]:
        """The steering layers of this tuner and their names, in order."""
        layer_cls = self.steering_layer_cls
        modules = modules_outside_adapters(self.model)
        return [(name, module) for name, module in modules if isinstance(module, layer_cls)]


def _check_adapter_name(adapter_name: str) -> None:
    if (
        not adapter_name
        or any(character in adapter_name for character in "./\\\0")
        or adapter_name == "__base__"
        or hasattr(nn.ModuleDict(), adapter_name)
    ):
        raise ValueError(
            f"{adapter_name!r} cannot be used as an adapter name. An adapter name is also the name of a module and of "
            "a folder: it must not be empty, contain a dot or a path separator, be an attribute of `nn.ModuleDict`, "
            "or be '__base__'. Choose another name."
        )
