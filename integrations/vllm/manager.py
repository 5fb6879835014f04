"""vLLM's managers of LoRA adapters, which also read our folders, and steer."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer

from trl_steer import __version__

from .adapter import (
    ACTIVATIONS_VARIABLE,
    JOINT,
    OURS,
    SITES_VARIABLE,
    Steering,
    check_config,
    check_type,
    peft_type_of,
    read_steering,
)
from .families import is_listed, place_of
from .layer import Slots, SteeringLayer, attach
from .refusal import AdapterRefusedError


class SteeredModel(LoRAModel):
    """An adapter with steering, and perhaps LoRA, in the form of vLLM's LoRA adapters."""

    activation: str | None = None
    has_lora = False

    @classmethod
    def of(cls, lora_model_id: int, lora: LoRAModel | None, steering: Steering) -> SteeredModel:
        """
        Args:
            lora_model_id (`int`): vLLM's number of the adapter.
            lora ([`LoRAModel`], *optional*): The LoRA half.
            steering ([`Steering`]): The steering half.
        """
        loras = {} if lora is None else dict(lora.loras)
        ranks = {block: len(weights.down) for block, weights in steering.blocks.items()}
        for block, weights in steering.blocks.items():
            name = _layer_name(block, steering.site)
            loras[name] = LoRALayerWeights(name, ranks[block], 1, weights.down, weights.up, scaling=1.0)
        model = cls(lora_model_id, max(ranks.values()), loras)
        model.activation, model.has_lora = steering.activation, lora is not None
        return model


class SteeringModelManager(LRUCacheLoRAModelManager):
    """Adds a [`SteeringLayer`] to each block at the sites that adapters use, and keeps rows of the base model as they
    are."""

    # On a CPU, vLLM's operators take the index -1 of the base model's rows for the last slot. So the weights have one
    # more, which stays zero.
    _spare_slots = 0

    def __init__(self, *args: Any, vllm_config: Any, **kwargs: Any):
        compilation = vllm_config.compilation_config
        self._is_eager = not compilation.mode and not compilation.cudagraph_mode
        super().__init__(*args, vllm_config=vllm_config, **kwargs)

    @property
    def lora_slots(self) -> int:
        return super().lora_slots + self._spare_slots

    def _create_lora_modules(self) -> None:
        self._spare_slots = int(self.device.type == "cpu")
        super()._create_lora_modules()
        self._spare_slots = 0
        config = self.lora_config
        self._slots = Slots(
            *(config.max_loras, config.max_lora_rank, self.max_num_batched_tokens),
            *(config.lora_dtype, self.device, self._is_eager),
        )
        self._sites: set[str] = set()
        if is_listed(self.model) and not self.is_split():
            for site in os.environ.get(SITES_VARIABLE, "" if self._is_eager else "post_block").split():
                self._add_site(site)
        for activation in os.environ.get(ACTIVATIONS_VARIABLE, "").split():
            self._slots.allow(activation)

    def _add_site(self, site: str) -> None:
        from trl_steer.tuners.steering.matching import find_blocks, text_config

        place, width = place_of(self.model, site), text_config(self.model).hidden_size
        for block in find_blocks(self.model):
            layer = SteeringLayer(width, self._slots)
            name = _layer_name(block, site)
            attach(layer, self.model.get_submodule(block), name.rpartition(".")[2], place)
            self.register_module(name, layer)
        self._sites.add(site)

    def prepare(self, steering: Steering) -> None:
        """Gives the model what it lacks for an adapter.

        Raises:
            ValueError: It cannot be added, because the model is compiled.
        """
        place_of(self.model, steering.site)
        needed: list[tuple[str, str | None, Any, str, Any]] = [
            ("site", steering.site, self._sites, SITES_VARIABLE, self._add_site),
            ("activation", steering.activation, self._slots.activations, ACTIVATIONS_VARIABLE, self._slots.allow),
        ]
        missing = [each for each in needed if each[1] is not None and each[1] not in each[2]]
        for what, name, known, variable, add in missing:
            if not self._is_eager:
                raise ValueError(
                    f"The model was compiled without the {what} {name!r}. Start the server with {variable}="
                    f"'{' '.join([*known, str(name)])}', or with --enforce-eager."
                )
            add(name)

    def activate_adapter(self, lora_id: int) -> bool:
        activated = super().activate_adapter(lora_id)
        if activated:
            adapter = self._registered_adapters[lora_id]
            activation = adapter.activation if isinstance(adapter, SteeredModel) else None
            self._slots.set_activation(self.lora_index_to_id.index(lora_id), activation)
            self._last_mapping = None  # the adapter may have LoRA now, and not before
        return activated

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        """Lets vLLM's LoRA layers take tokens whose adapter has no LoRA for those of the base model, which saves all
        of their time if no token has LoRA."""
        slots = {lora_id: slot for slot, lora_id in enumerate(self.lora_index_to_id) if lora_id is not None}
        self._slots.set_tokens([slots.get(lora_id, -1) for lora_id in mapping.index_mapping])
        adapters = self.list_adapters().items()
        hidden = {lora_id for lora_id, one in adapters if isinstance(one, SteeredModel) and not one.has_lora}
        index, prompt = (
            tuple(0 if lora_id in hidden else lora_id for lora_id in ids)
            for ids in (mapping.index_mapping, mapping.prompt_mapping)
        )
        super()._set_adapter_mapping(replace(mapping, index_mapping=index, prompt_mapping=prompt))

    def is_split(self) -> bool:
        """Whether other processes have some of the blocks."""
        return any(isinstance(module, PPMissingLayer) for module in self.model.modules())

    def check_matches(self, lora: LoRAModel) -> None:
        """Checks that the model has one of the modules of a LoRA adapter, without which vLLM serves the base model.

        Raises:
            ValueError: It has none.
        """
        known = {*self.modules, *(name for packed in self.packed_modules.values() for name in packed)}
        if not known & lora.loras.keys() and not self.is_split() and not self.is_pooling_model:
            raise ValueError(
                "No module of the model matches the LoRA adapter, which has weights for "
                f"{next(iter(lora.loras), None)} and others. Check that it was trained on this model."
            )


class SteeringWorkerManager(LRUCacheWorkerLoRAManager):
    """Reads our adapter folders, and leaves those of LoRA to vLLM."""

    _manager_cls = SteeringModelManager

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any):
        super().__init__(vllm_config, *args, **kwargs)
        # Part of the key of vLLM's compilation cache, which does not know of plugins.
        if isinstance(vllm_config.additional_config, dict):
            sites, activations = (os.environ.get(name, "") for name in (SITES_VARIABLE, ACTIVATIONS_VARIABLE))
            vllm_config.additional_config["trl_steer"] = [__version__, sites, activations]

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        folder = get_adapter_absolute_path(lora_request.lora_path)
        try:
            return self._read(lora_request, folder)
        except LoRAAdapterNotFoundError:
            raise
        except Exception as error:  # vLLM and PEFT do not check all of a folder, so this can be any exception
            raise AdapterRefusedError(str(error) or type(error).__name__) from error

    def _read(self, lora_request: Any, folder: str) -> LoRAModel:
        peft_type = peft_type_of(folder)
        check_type(peft_type)
        if peft_type not in OURS:
            return self._read_lora(lora_request)
        manager: Any = self._adapter_manager
        if manager.is_split():
            raise ValueError("Steering is not served with pipeline parallelism.")
        lora = None
        with tempfile.TemporaryDirectory() as halves:
            steering_folder = folder
            if peft_type == JOINT:
                from trl_steer.tuners.joint_steering import split_adapter
                from trl_steer.tuners.steering.folder import AdapterFolder

                check_config(AdapterFolder.open(folder).config)
                lora_folder, steering_folder = str(Path(halves, "lora")), str(Path(halves, "steering"))
                split_adapter(folder, lora_folder, steering_folder)
                lora = self._read_lora(msgspec.structs.replace(lora_request, lora_path=lora_folder))
            config = self.lora_config
            steering = read_steering(steering_folder, manager.model, config.max_lora_rank, config.lora_dtype)
        manager.prepare(steering)
        return SteeredModel.of(lora_request.lora_int_id, lora, steering)

    def _read_lora(self, lora_request: Any) -> LoRAModel:
        lora = super()._load_adapter(lora_request)
        self._adapter_manager.check_matches(lora)
        return lora


def _layer_name(block: str, site: str) -> str:
    return f"{block}.{site}_steering"
