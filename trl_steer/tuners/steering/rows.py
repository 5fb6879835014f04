"""One adapter for each row of a batch: `model(..., adapter_names=[...])`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from .layer import SteeringLayer
from .mixed_batch import BatchRows

# A context variable, so that each thread or task that runs the model sees its own names.
_ROWS: ContextVar[BatchRows | None] = ContextVar("adapter_names", default=None)


@contextmanager
def adapters_by_row(
    layers: Sequence[nn.Module], names: Sequence[str], args: tuple = (), kwargs: dict | None = None, model: Any = None
) -> Iterator[None]:
    """Context manager in which `adapter_names` is passed to each of `layers`.

    Args:
        layers (`Sequence[nn.Module]`): Steering layers, and other modules that take `adapter_names`.
        names (`Sequence[str]`): The name of the adapter for each row of the batch.
        args (`tuple`), kwargs (`dict`, *optional*), model: Arguments and model of `generate`, for `num_beams` and
            `num_return_sequences`.
    """
    own = getattr(model, "generation_config", None)
    configs = [c for c in (*args, (kwargs or {}).get("generation_config"), own) if isinstance(c, GenerationConfig)]
    repeats = max(_argument(kwargs or {}, configs, name) for name in ("num_beams", "num_return_sequences"))
    token = _ROWS.set(BatchRows(names, repeats))
    handles = [layer.register_forward_pre_hook(_pass_names, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _ROWS.reset(token)


@torch.compiler.disable  # torch.compile cannot trace context variables
def _pass_names(module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
    rows = _ROWS.get()
    # The call may come from another thread, which did not pass names. While another thread removes its hook, PyTorch
    # may call it without keyword arguments; this thread has its own hook, which passes the names.
    if rows is None or kwargs is None:
        return None
    names = rows if isinstance(module, SteeringLayer) else rows.names_for(len(args[0]), args[0].dim() == 2)
    return args, {**kwargs, "adapter_names": names}


def _argument(kwargs: dict, configs: list[GenerationConfig], name: str) -> int:
    """The value that `generate` uses: an argument, else that of the given configuration, else of the model's."""
    given = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in given if isinstance(value, int)), 1)
