"""The tuner: puts steering layers into blocks, and takes them out again."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationConfig

from ..blocks import BlockMatcher, hidden_size, text_config
from .config import PostBlockSteeringConfig
from .functional import adapter_scaling, set_scaling
from .layer import LAYER_NAME, LowRankAdapter, PostBlockSteeringLayer, VectorAdapter
from .loading import (
    check_adapter_tensors,
    check_base_model_type,
    keep_until_dispatched,
    materialize_tokens,
    settle,
    take_back,
)
from .merging import fold
from .saving import make_others_whole, whole_tensors


class PostBlockSteeringModel(BaseTuner):
    """
    Adds a small learned update to the output of every transformer block of a frozen model.

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 5.1.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model to steer.
        config ([`PostBlockSteeringConfig`]): The configuration.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create empty weights on the meta device, to be loaded into.

    Example:

        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from trl_steer import PostBlockSteeringConfig

        >>> base = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.2-1B")
        >>> model = get_peft_model(base, PostBlockSteeringConfig(r=8, task_type="CAUSAL_LM"))
        >>> model.print_trainable_parameters()
        ```

    **Attributes**:
        - **model** ([`~transformers.PreTrainedModel`]) -- The model to be steered.
        - **peft_config** (`dict[str, PostBlockSteeringConfig]`) -- The configuration of each adapter.
    """

    prefix: str = "steering_"
    tuner_layer_cls = PostBlockSteeringLayer
    target_module_mapping: dict[str, list[str]] = {}
    steering_layer_cls = PostBlockSteeringLayer
    _matcher: tuple[PeftConfig, BlockMatcher] | None = None

    # Injection

    def _prepare_adapter_config(self, peft_config: PostBlockSteeringConfig, model_config: dict):
        return peft_config  # `target_modules=None` stays, and means all blocks of whatever model this is loaded on

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if peft_config.weights_follow:
            check_base_model_type(peft_config, model)
        super()._prepare_model(peft_config, model)
        self._blocks(peft_config)
        peft_config.base_model_type = getattr(text_config(model), "model_type", None)

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str):
        return self._blocks(peft_config)(key)

    def _steering_config(self, peft_config: Any) -> PostBlockSteeringConfig:
        """The part of an adapter's configuration that is about steering: all of it here, a half of a joint
        adapter's."""
        return peft_config

    def _blocks(self, peft_config: PeftConfig) -> BlockMatcher:
        if self._matcher is None or self._matcher[0] is not peft_config:
            self._matcher = (peft_config, BlockMatcher(self.model, self._steering_config(peft_config)))
        return self._matcher[1]

    def inject_adapter(
        self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, state_dict=None
    ):
        if state_dict is not None:
            # PEFT cuts a key before the prefix and takes what is left for the name of the target.
            marker = f".{LAYER_NAME}.{self.prefix}"
            state_dict = {
                key.removeprefix("base_model.model.").replace(marker, f".{self.prefix}"): tensor
                for key, tensor in state_dict.items()
            }
        _check_name(adapter_name)
        config: Any = self.peft_config[adapter_name]
        if any(other is config for name, other in self.peft_config.items() if name != adapter_name):
            # TRL's reference adapter comes with the very configuration of the policy; each has its own strength.
            self.peft_config[adapter_name] = copy.deepcopy(config)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        config = self.peft_config[adapter_name]
        config.weights_follow = False  # they did for this adapter; as a template it is like any other

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ) -> None:
        self._steer_block(target, adapter_name, self._steering_config(peft_config))

    def _steer_block(self, block: nn.Module, adapter_name: str, config: PostBlockSteeringConfig) -> None:
        layer = getattr(block, LAYER_NAME, None)
        if layer is None:
            layer = self.steering_layer_cls(block, hidden_size(self.model))
            layer.train(block.training)
            block.add_module(LAYER_NAME, layer)
        layer.update_layer(adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.adapters[adapter_name].requires_grad_(False)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        materialize_tokens(self.model, adapter_name)  # before this, everything that is made becomes empty
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        # The only method of a tuner that PEFT calls after it has dispatched a model over devices.
        for layer in self._layers():
            layer.move_to_execution_device(adapter_name)

    # Saving and loading

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        make_others_whole(model, adapter_name, state_dict)
        return whole_tensors(adapter_name, tensors)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        biases = cls._get_learnable_bias_state_dict(model, model.state_dict(), config)
        try:
            check_adapter_tensors(model, adapter_name, tensors, state_dict, biases)
        except ValueError:
            take_back(model, adapter_name)
            raise
        settle(model, adapter_name)
        keep_until_dispatched(model, adapter_name, tensors)
        return tensors

    # Strength

    def set_scaling(self, adapter_name: str, value: float) -> None:
        """Sets the strength of an adapter, see [`trl_steer.set_scaling`]."""
        set_scaling(self, adapter_name, value)

    def adapter_scaling(self, adapter_name: str, value: float) -> AbstractContextManager[None]:
        """Sets the strength of an adapter for a `with` block, see [`trl_steer.adapter_scaling`]."""
        return adapter_scaling(self, adapter_name, value)

    # Several adapters

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any):
        """As [`~peft.PeftModel`]'s: `adapter_names` gives each row of the batch its adapter."""
        if adapter_names is None:
            return super().forward(*args, **kwargs)
        with self._enable_peft_forward_hooks(adapter_names=adapter_names):
            return super().forward(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        # `generate` repeats each row for its beams or its sequences.
        own = getattr(self.model, "generation_config", None)
        configs = [c for c in (*args, kwargs.get("generation_config"), own) if isinstance(c, GenerationConfig)]
        repeats = max(_generation_argument(kwargs, configs, name) for name in ("num_beams", "num_return_sequences"))
        repeated = [name for name in adapter_names for _ in range(repeats)]

        def pass_adapter_names(module, args, kwargs):
            rows = args[0]
            names = repeated if len(rows) == len(repeated) else adapter_names
            if rows.dim() == 2 and names and len(rows) % len(names) == 0:
                # Tokens of all rows, as the MLP of OPT and shared experts get them.
                names = [name for name in names for _ in range(len(rows) // len(names))]
            return args, {**kwargs, "adapter_names": names}

        handles = [
            module.register_forward_pre_hook(pass_adapter_names, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def delete_adapter(self, adapter_name: str) -> None:
        active = self.active_adapters
        super().delete_adapter(adapter_name)
        if adapter_name in active:
            # Layers choose a new active adapter among their own, which differ where adapters sit on different blocks.
            remaining = [name for name in active if name != adapter_name] or sorted(self.peft_config)[:1]
            if remaining:
                self.set_adapter(remaining)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "cat"
    ) -> None:
        """
        Adds an adapter whose update is exactly the weighted sum of the updates of others: vectors add, low-rank
        factors concatenate (so ranks add too, and all must have the same activation).

        Args:
            adapters (`list[str]`): Names of adapters, all low-rank or all vectors.
            weights (`list[float]`): A weight for each, negative ones included.
            adapter_name (`str`): Name of the new adapter. It is not made active.
            combination_type (`str`, defaults to `"cat"`):
                `"cat"` or `"linear"`, PEFT's names; both mean the exact sum here.

        Raises:
            ValueError: An adapter does not exist, the new one does, or they cannot be summed exactly.
        """
        self._check_weighted(adapters, weights, adapter_name, combination_type)
        summands, config = self._summands(adapters, weights)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        self._write_sums(adapter_name, summands)

    def _summands(self, adapters: list[str], weights: list[float]) -> tuple[dict[str, list], PostBlockSteeringConfig]:
        """For each block, what is to be summed there, and the configuration of the sum."""
        configs = [self._steering_config(self.peft_config[name]) for name in adapters]
        summands = {}
        for name, layer in self._named_layers():
            present = [pair for pair in zip(adapters, weights, strict=True) if pair[0] in layer.adapters]
            if present:
                block = name.removesuffix(f".{LAYER_NAME}")
                summands[block] = [(w * layer.adapters[a].scaling, layer.adapters[a]) for a, w in present]
        config: Any = copy.deepcopy(configs[0])
        config.scaling = 1.0
        if config.steering_type == "low_rank":
            config.r = sum(config.r for config in configs)
        config.target_modules, config.exclude_modules, config.layers_to_transform = set(summands), None, None
        return summands, config

    def _write_sums(self, adapter_name: str, summands: dict[str, list]) -> None:
        for block, parts in summands.items():
            _write_sum(getattr(self.model.get_submodule(block), LAYER_NAME).adapters[adapter_name], parts)
        self._cast_adapter_dtype(adapter_name)

    def _check_weighted(self, adapters, weights, adapter_name, combination_type) -> None:
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"Give a weight for each adapter: got {len(adapters)} adapters, {len(weights)} weights.")
        if not all(isinstance(weight, (int, float)) and math.isfinite(weight) for weight in weights):
            raise ValueError(f"The weights of a sum must be finite numbers, got {weights}.")
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist")
        summed = [layer.adapters[name] for layer in self._layers() for name in adapters if name in layer.adapters]
        if any(parameter.is_meta for adapter in summed for parameter in adapter.parameters()):
            raise ValueError(f"Adapters whose weights are offloaded cannot be summed: {adapters}.")
        if combination_type not in ("cat", "linear"):
            raise ValueError(f"Invalid combination_type: {combination_type}. Use 'cat' or 'linear'.")
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        for field in ("steering_type", "activation"):
            values = {name: getattr(self._steering_config(self.peft_config[name]), field) for name in adapters}
            if len(set(values.values())) > 1:
                raise ValueError(f"Adapters of different {field} have no exact sum: {values}.")
        if any(config.modules_to_save or config.trainable_token_indices for config in configs):
            raise ValueError(
                "add_weighted_adapter is not supported for adapters with `modules_to_save` or "
                "`trainable_token_indices`."
            )

    # Merging and unloading

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """
        Folds steering vectors into biases of the base model, where that is exact; see `merging.py`.

        Raises:
            ValueError: That is not possible. The message says why and what to do instead; nothing has changed.
        """
        self._check_merge_allowed()
        fold(self, adapter_names, safe_merge)

    def unmerge_adapter(self) -> None:
        for layer in self._layers():
            layer.unmerge()

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None) -> Any:
        if merge:
            PostBlockSteeringModel.merge_adapter(self, adapter_names, safe_merge)
        else:
            self.unmerge_adapter()
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.set_adapter([])  # PEFT would put the trained copy in the place of the original
        for layer in self._layers():
            layer.remove()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # only for wrappers around a module; no weights need to be moved

    def _named_layers(self):
        return [(n, m) for n, m in self.model.named_modules() if isinstance(m, PostBlockSteeringLayer)]

    def _layers(self) -> list[PostBlockSteeringLayer]:
        return [layer for _, layer in self._named_layers()]


def _check_name(adapter_name: str) -> None:
    if not adapter_name or "." in adapter_name or adapter_name == "__base__" or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(
            f"{adapter_name!r} cannot be the name of an adapter. It becomes the name of a module, so it may not be "
            "empty, have a dot or be that of an attribute; and __base__ means the base model in `adapter_names`."
        )


def _generation_argument(kwargs: dict, configs: list[GenerationConfig], name: str) -> int:
    """As `generate` finds it: an argument, else what a given configuration has, else the model's own."""
    given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in given if isinstance(value, int)), 1)


@torch.no_grad()
def _write_sum(adapter: LowRankAdapter | VectorAdapter, summands: list) -> None:
    """Writes the sum of `(weight, adapter)` pairs. A block that some do not steer has rank left over, kept at zero."""
    if isinstance(adapter, VectorAdapter):
        adapter.vector.copy_(sum(weight * part.vector for weight, part in summands))
        return
    adapter.down.zero_()
    adapter.up.zero_()
    first = 0
    for weight, part in summands:
        last = first + len(part.down)
        adapter.down[first:last] = part.down
        adapter.up[:, first:last] = weight * part.up
        first = last
