"""One adapter for each row of a batch: `model(..., adapter_names=[...])`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers import GenerationConfig

# Read by the hooks below when they run: they see the names of the thread or task that runs the model, whoever
# registered them.
_NAMES: ContextVar[_Rows | None] = ContextVar("adapter_names", default=None)


class _Rows:
    """
    The adapter of each row.

    Args:
        names (`Sequence[str]`): One for each row of the batch.
        repeats (`int`): How often `generate` repeats each row, for its beams or sequences.
    """

    def __init__(self, names: Sequence[str], repeats: int):
        self.names = list(names)
        self.repeated = [name for name in names for _ in range(repeats)]

    def for_rows(self, count: int, is_flat: bool) -> list[str]:
        """The names for a tensor with `count` rows, which holds the tokens of all rows if `is_flat`, as the MLP of OPT
        and shared experts get them."""
        names = self.repeated if count == len(self.repeated) else self.names
        if is_flat and names and count % len(names) == 0:
            return [name for name in names for _ in range(count // len(names))]
        return names


@contextmanager
def adapters_by_row(
    layers: Sequence[nn.Module], names: Sequence[str], args: tuple = (), kwargs: dict | None = None, model: Any = None
) -> Iterator[None]:
    """Passes each of `layers`, modules that take `adapter_names`, the names for its rows.

    Args:
        layers (`Sequence[nn.Module]`): Steering layers, and other modules with adapters.
        names (`Sequence[str]`): One for each row of the batch.
        args (`tuple`), kwargs (`dict`, *optional*), model: What `generate` was called with, to tell its repetitions.
    """
    own = getattr(model, "generation_config", None)
    configs = [c for c in (*args, (kwargs or {}).get("generation_config"), own) if isinstance(c, GenerationConfig)]
    repeats = max(_argument(kwargs or {}, configs, name) for name in ("num_beams", "num_return_sequences"))
    token = _NAMES.set(_Rows(names, repeats))
    handles = [layer.register_forward_pre_hook(_pass_names, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _NAMES.reset(token)


def _pass_names(module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    rows = _NAMES.get()
    # In another thread, which has not asked for names, or just as another one removes this hook: PyTorch then calls it
    # without the keywords. The hooks of this thread pass them.
    if rows is None or kwargs is None:
        return None
    return args, {**kwargs, "adapter_names": rows.for_rows(len(args[0]), args[0].dim() == 2)}


def _argument(kwargs: dict, configs: list[GenerationConfig], name: str) -> int:
    """As `generate` finds it: an argument, else what a given configuration has, else the model's own."""
    given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in given if isinstance(value, int)), 1)
