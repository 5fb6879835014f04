"""The container of the adapters of a block."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_ONLY: ContextVar[str | None] = ContextVar("steering_only_adapter", default=None)


class AdapterDict(nn.ModuleDict):
    """The adapters of a block by name. Inside [`only_adapter`], walks through the model and state dicts have only one
    of them."""

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        name = _ONLY.get()
        if name is None:
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        if name in self:
            yield from self[name].named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        name = _ONLY.get()
        if name is None:
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        destination = OrderedDict() if destination is None else destination
        if name in self:
            self[name].state_dict(destination=destination, prefix=f"{prefix}{name}.", keep_vars=keep_vars)
        return destination


@contextmanager
def only_adapter(name: str) -> Iterator[None]:
    """Context manager in which `modules()`, `parameters()`, `state_dict()` and their like leave out all steering
    adapters but one, in this thread or task. PEFT walks through the model a dozen times to add an adapter, which would
    take longer with each of them.

    The other adapters do not change in it, see [`SteeringLayer.set_adapter`].
    """
    token = _ONLY.set(name)
    try:
        yield
    finally:
        _ONLY.reset(token)


def current_only_adapter() -> str | None:
    """The name given to the innermost [`only_adapter`]."""
    return _ONLY.get()
