"""Finds the transformer blocks of a model, and selects those to steer.

The blocks are found by structure, without a table of model types: they are the entries of the only `nn.ModuleList` in
the text decoder with `config.num_hidden_layers` entries. This works for nearly all causal language models in
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

# The prefix of all names in a module wrapped by `torch.compile`. PEFT removes it in some places but not in others.
_COMPILED = "_orig_mod."


def text_config(model: nn.Module) -> Any:
    """The configuration of the text decoder, or `None` if `model` does not have a transformers configuration."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None


def check_hidden_size(model: nn.Module) -> None:
    """Checks that the model's configuration has the width `d` of the residual stream.

    Raises:
        ValueError: It does not.
    """
    if not isinstance(getattr(text_config(model), "hidden_size", None), int):
        raise ValueError(
            f"{type(model).__name__} has no transformers configuration with an integer `hidden_size`, so the width of "
            "its residual stream is unknown. Give the model a `config` with `hidden_size`."
        )


def modules_outside_adapters(
    model: nn.Module, prefix: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Like `model.named_modules()`, but of adapters only the containers (`nn.ModuleDict`, ...), so that it takes the
    same time however many adapters there are."""
    seen = set() if seen is None else seen
    if model in seen:
        return
    seen.add(model)
    yield prefix, model
    containers: tuple[str, ...] = ()
    if isinstance(model, BaseTunerLayer):
        containers = (*model.adapter_layer_names, *model.other_param_names)
    for name, child in model._modules.items():
        full_name = f"{prefix}.{name}" if prefix else name
        if name in containers and child is not None and child not in seen:
            seen.add(child)
            yield full_name, child
        elif child is not None:
            yield from modules_outside_adapters(child, full_name, seen)


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks of the text decoder in order, for example `["model.layers.0", "model.layers.1", ...]`.

    Raises:
        ValueError: No list of blocks was found, or more than one.
    """
    candidates = _candidate_lists(model)
    if len(candidates) != 1:
        found = f"found several: {sorted(candidates)}" if candidates else "found none"
        raise ValueError(
            f"Could not find the transformer blocks of {type(model).__name__}: expected a single nn.ModuleList with "
            f"config.num_hidden_layers entries in its text decoder, but {found}. Please specify the blocks with "
            r"`target_modules`, for example target_modules=r'model\.decoder\.layers\.\d+' or "
            "target_modules=['model.decoder.layers']."
        )
    ((name, blocks),) = candidates.items()
    return [f"{name}.{index}" for index in range(len(blocks))]


def _candidate_lists(model: Any) -> dict[str, nn.ModuleList]:
    count = getattr(text_config(model), "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    if not _outermost_lists(decoder):
        decoder = model  # ModernBERT calls its output layer `decoder`
    prefix = next((name for name, module in modules_outside_adapters(model) if module is decoder), None)
    if count is None or prefix is None:
        return {}
    return {
        f"{prefix}.{name}" if prefix else name: blocks
        for name, blocks in _outermost_lists(decoder).items()
        if len(blocks) == count
    }


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Module lists that are not inside another one, which excludes a block's list of experts."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in modules_outside_adapters(model):
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    return lists


class BlockMatcher:
    """Selects the blocks of `model` that match `target_modules`, `exclude_modules` and `layers_to_transform`.

    If the blocks of the text decoder are found by structure, only they can match, so that `"layers.0"` does not match
    a block of the vision tower. Otherwise every entry of an outermost `nn.ModuleList` can.

    Raises:
        ValueError: No block matches, or a name or index does not exist.
    """

    def __init__(self, model: nn.Module, config):
        self.config = config
        try:
            self.blocks = find_blocks(model)
        except ValueError:
            if config.target_modules is None:
                raise
            lists = _outermost_lists(model)
            self.blocks = [f"{name}.{index}" for name, blocks in lists.items() for index in range(len(blocks))]
        self.blocks = [name.removeprefix(_COMPILED) for name in self.blocks]
        self._known = set(self.blocks)
        self._fields = SimpleNamespace(
            target_modules=self._expand(config.target_modules),
            exclude_modules=self._expand(config.exclude_modules) if config.exclude_modules else None,
            modules_to_save=config.modules_to_save,
            target_parameters=None,
        )
        self._layers = self._checked_indices(config.layers_to_transform)
        if not any(self(name) for name in self.blocks):
            raise ValueError(
                f"No block to steer matches target_modules={config.target_modules}, "
                f"exclude_modules={config.exclude_modules}, layers_to_transform={config.layers_to_transform}, "
                f"modules_to_save={config.modules_to_save}. The blocks are {self._summary()}."
            )

    def __call__(self, name: str) -> Any:
        """Truthy if `name` is a block to steer. For an excluded block, PEFT's falsy `_ExcludedModule`."""
        name = name.removeprefix(_COMPILED)
        if name not in self._known:
            return False
        matched = check_target_module_exists(self._fields, name)
        return matched and (self._layers is None or block_index(name) in self._layers)

    def matched(self) -> list[str]:
        """Names of the blocks to steer, in order."""
        return [name for name in self.blocks if self(name)]

    def is_block(self, name: str) -> bool:
        """Whether `name` is a block, selected or not."""
        return name.removeprefix(_COMPILED) in self._known

    def _expand(self, names):
        """Replaces the names of lists of blocks by the names of their entries."""
        if names is None:
            return self.blocks
        if isinstance(names, str):
            return names
        expanded = []
        for wanted in names:
            matches = [
                block
                for block in self.blocks
                if any(name_matches(n, wanted) for n in (block, block.rpartition(".")[0]))
            ]
            if not matches:
                raise ValueError(f"There is no block {wanted!r}. The blocks are {self._summary()}.")
            expanded += matches
        return expanded

    def _checked_indices(self, layers: int | list[int] | None) -> set[int] | None:
        if layers is None:
            return None
        wanted = {layers} if isinstance(layers, int) else set(layers)
        missing = sorted(wanted - {block_index(name) for name in self.blocks})
        if missing:
            raise ValueError(f"layers_to_transform contains {missing}, but the blocks are {self._summary()}.")
        return wanted

    def _summary(self) -> str:
        names = self.blocks
        return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]]) or "none"


def name_matches(name: str, wanted: str) -> bool:
    """Whether a module's full name is `wanted` or ends in it."""
    return name == wanted or name.endswith(f".{wanted}")


def block_index(name: str) -> int:
    """The index of a block, which is at the end of its name: 3 for `"model.layers.3"`.

    Raises:
        ValueError: The name does not end in a number.
    """
    match = re.search(r"(\d+)$", name)
    if match is None:
        raise ValueError(f"Expected the name of a block, which ends in an index, got {name!r}.")
    return int(match.group(1))
