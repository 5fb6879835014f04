"""Finds the folder that an adapter is being loaded from.

When PEFT loads an adapter, it injects it first and then reads its weights, and does not pass the folder to the tuner.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel

from .folder import PREFIX, AdapterFolder

# Functions that inject an adapter and then load its weights: module and name, and the local variables that are read,
# first the one with the folder or Hub id.
_LOADERS = {
    ("peft.peft_model", "from_pretrained"): ("model_id", "kwargs", "key_mapping"),
    ("peft.peft_model", "load_adapter"): (
        *("model_id", "kwargs", "key_mapping"),
        *("hf_hub_download_kwargs", "torch_device"),
    ),
    ("peft.mixed_model", "from_pretrained"): ("model_id", "kwargs"),
    ("transformers.integrations.peft", "load_adapter"): (
        *("peft_model_id", "kwargs"),
        *("adapter_state_dict", "load_config"),
    ),
}


@dataclass
class Load:
    """
    A call that loads an adapter from a folder.

    Attributes:
        folder ([`AdapterFolder`]): The folder with the weights.
        key_mapping (`dict[str, str]`): Regular expressions that PEFT applies to the keys, and their replacements.
        by_transformers (`bool`): Whether transformers loads the weights, rather than PEFT.
    """

    folder: AdapterFolder
    key_mapping: Mapping[str, str]
    by_transformers: bool

    @classmethod
    def in_progress(cls) -> Load | None:
        """The load that the current injection is part of, found by inspecting the call stack. `None` for a new
        adapter, even if its configuration was read from a folder.

        Raises:
            ValueError: The folder has no weights, or none that can be read.
        """
        frame: Any = sys._getframe(1)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            names = _LOADERS.get((module, frame.f_code.co_name))
            if names is not None and frame.f_locals.get(names[0]) is not None:
                values = {name: frame.f_locals.get(name) for name in names}
                return cls._from_call(values[names[0]], values, module.startswith("transformers."))
            frame = frame.f_back
        return None

    @classmethod
    def _from_call(cls, path: Any, values: Mapping[str, Any], by_transformers: bool) -> Load | None:
        if values.get("adapter_state_dict") is not None:
            return None  # transformers accepts tensors instead of a folder
        given, load_config = values.get("kwargs") or {}, values.get("load_config")
        options = {
            **PeftModel._split_kwargs(given)[0],
            **(values.get("hf_hub_download_kwargs") or {}),
            **(getattr(load_config, "download_kwargs", None) or {}),
        }
        device = {**given, **values}.get("torch_device")
        if device is not None:
            torch.empty(0, device=device)  # raises PEFT's error for an invalid device, but before the injection
        if getattr(load_config, "use_safetensors", None) is False:
            raise ValueError(
                "Got use_safetensors=False, but adapters are loaded from safetensors files only. Leave it out."
            )
        return cls(AdapterFolder.open(path, **options), values.get("key_mapping") or {}, by_transformers)

    @cached_property
    def header(self) -> dict[str, torch.Tensor]:
        """All tensors of the file on the meta device, with `key_mapping` applied to their keys."""
        return self._renamed(self.folder.header())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of the file, with `key_mapping` applied to their keys."""
        return self._renamed(self.folder.tensors())

    def _renamed(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {self._renamed_key(key): tensor for key, tensor in tensors.items()}

    def _renamed_key(self, key: str) -> str:
        bare = key.removeprefix(PREFIX)
        for pattern, replacement in self.key_mapping.items():
            new, count = re.subn(pattern, replacement, bare)
            if count:
                return PREFIX + new
        return key
