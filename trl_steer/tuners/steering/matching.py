"""Finding the transformer blocks of a model by structure, and choosing among them.

There is no table of model types. The blocks are the entries of the one `nn.ModuleList` in the text decoder that has
`config.num_hidden_layers` entries, which holds for nearly every causal language model of transformers.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

# What `torch.compile` puts before all names of a module. PEFT drops it in some places and not in others.
_COMPILED = "_orig_mod."


def text_config(model: nn.Module):
    """The configuration of the text decoder, or `None` if `model` has no transformers configuration."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None


def check_hidden_size(model: nn.Module) -> None:
    """Makes sure that the width `d` of the residual stream is known.

    Raises:
        ValueError: The model's configuration does not say.
    """
    if not isinstance(getattr(text_config(model), "hidden_size", None), int):
        raise ValueError(
            f"{type(model).__name__} has no transformers configuration with an integer `hidden_size`, so the width of "
            "its residual stream is unknown. Give the model a `config` with `hidden_size`."
        )


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks of the text decoder, first to last, e.g. `["model.layers.0", "model.layers.1", ...]`.

    Raises:
        ValueError: No list of blocks, or more than one, fits; the message says to pass `target_modules`.
    """
    candidates = _candidate_lists(model)
    if len(candidates) != 1:
        found = f"several lists fit: {sorted(candidates)}" if candidates else "none was found"
        raise ValueError(
            f"Could not tell the transformer blocks of {type(model).__name__}: looked in its text decoder for the one "
            f"nn.ModuleList with config.num_hidden_layers entries, but {found}. Please name the blocks with "
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
    prefix = next((name for name, module in model.named_modules() if module is decoder), None)
    if count is None or prefix is None:
        return {}
    return {
        f"{prefix}.{name}" if prefix else name: blocks
        for name, blocks in _outermost_lists(decoder).items()
        if len(blocks) == count
    }


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Module lists that are not inside another one: a block's list of experts is not a list of blocks."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    return lists


class BlockMatcher:
    """Which blocks of `model` the fields `target_modules`, `exclude_modules`, `layers_to_transform` of `config` mean.

    Where the text decoder's blocks are found by structure, only they can be meant, so an ending such as `"layers.0"`
    never reaches into a vision tower. Otherwise every entry of an outermost `nn.ModuleList` can be.

    Raises:
        ValueError: Nothing is meant, or something that does not exist.
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
        self._layers = self._checked_layers(config.layers_to_transform)
        if not any(self(name) for name in self.blocks):
            raise ValueError(
                f"No block is left to steer with target_modules={config.target_modules}, "
                f"exclude_modules={config.exclude_modules}, layers_to_transform={config.layers_to_transform}, "
                f"modules_to_save={config.modules_to_save}. The blocks are {self._summary()}."
            )

    def __call__(self, name: str):
        """Truthy if `name` is a block to steer. PEFT's own marker, which is falsy, if it is excluded."""
        name = name.removeprefix(_COMPILED)
        if name not in self._known:
            return False
        matched = check_target_module_exists(self._fields, name)
        return matched and (self._layers is None or block_index(name) in self._layers)

    def matched(self) -> list[str]:
        """Names of the blocks to steer, first to last."""
        return [name for name in self.blocks if self(name)]

    def is_block(self, name: str) -> bool:
        """Whether `name` is a block that could be steered, meant or not."""
        return name.removeprefix(_COMPILED) in self._known

    def _expand(self, names):
        """The name of a list of blocks stands for all of its entries."""
        if names is None:
            return self.blocks
        if isinstance(names, str):
            return names
        expanded = []
        for wanted in names:
            suffix = f".{wanted}"
            matches = [
                block
                for block in self.blocks
                if any(name == wanted or name.endswith(suffix) for name in (block, block.rpartition(".")[0]))
            ]
            if not matches:
                raise ValueError(f"There is no block {wanted!r}. The blocks are {self._summary()}.")
            expanded += matches
        return expanded

    def _checked_layers(self, layers: int | list[int] | None) -> set[int] | None:
        if layers is None:
            return None
        wanted = {layers} if isinstance(layers, int) else set(layers)
        missing = sorted(wanted - {block_index(name) for name in self.blocks})
        if missing:
            raise ValueError(f"layers_to_transform names blocks {missing}, but the blocks are {self._summary()}.")
        return wanted

    def _summary(self) -> str:
        names = self.blocks
        return ", ".join(names if len(names) <= 4 else [*names[:2], "...", names[-1]]) or "none"


def block_index(name: str) -> int:
    """The number that ends a block's name: 3 for `"model.layers.3"`."""
    match = re.search(r"(\d+)$", name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of an entry of a list of blocks.")
    return int(match.group(1))
