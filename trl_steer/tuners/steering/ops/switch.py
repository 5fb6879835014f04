"""The switch between the implementations of the low-rank update."""

from __future__ import annotations

import threading

import torch

from ..contexts import ContextStack, Entry

OPERATORS = ("auto", "triton", "memory_efficient", "plain")


class steering_operator:  # noqa: N801 - reads like torch.set_grad_enabled
    """Selects how low-rank steering is computed: as a function for the process, as a context manager for the current
    thread or asyncio task. The backward pass uses the operator of the forward pass.

    - `"auto"` (the default) is `"triton"` on a GPU and `"memory_efficient"` elsewhere.
    - `"triton"` runs fused kernels where they apply: on a GPU, with Triton installed, up to rank 64, for floating
      point formats of 16 or 32 bits, and with the activations ReLU, SiLU, GELU or the identity. Elsewhere, it is the
      same as `"memory_efficient"`. With `TRITON_INTERPRET=1` in the environment, they also run on a CPU, but slowly.
    - `"memory_efficient"` saves the output of the update for the backward pass, not its input, so that no second copy
      of the residual stream is kept. The kernels do the same.
    - `"plain"` is ordinary PyTorch. Use it for double backward, for `torch.func` transforms, and for models that
      modify the hidden state in place.

    With gradient checkpointing on a GPU, the backward pass recomputes blocks in another thread, where a context
    manager has no effect. Select the operator for the process then.

    Args:
        name (`str`): `"auto"`, `"triton"`, `"memory_efficient"` or `"plain"`.

    Raises:
        ValueError: `name` is none of these.

    Example:

        ```py
        >>> steering_operator("plain")
        >>> with steering_operator("memory_efficient"):
        ...     loss.backward()
        ```
    """

    _blocks: ContextStack[str] = ContextStack("steering_operator")
    _lock = threading.Lock()
    # Calls outside any `with` block, of which the last one counts. Earlier ones are kept, because a call is taken back
    # when it turns out to be the start of a `with` block.
    _calls: list[steering_operator] = []

    def __init__(self, name: str):
        if name not in OPERATORS:
            raise ValueError(f"There is no steering operator {name!r}; use one of {OPERATORS}.")
        self.name = name
        self._entries: list[Entry[str]] = []
        self._around = self._blocks.innermost()
        if self._around is not None:  # a call inside a `with` block applies until its end
            self._before, self._around.value = self._around.value, name
            return
        with self._lock:
            self._calls.append(self)
            del self._calls[:-16]

    def __enter__(self):
        if self._around is not None:
            self._around.value, self._around = self._before, None
        else:
            with self._lock:
                self._calls[:] = [call for call in self._calls if call is not self]
        self._entries.append(self._blocks.push(self.name))
        return self

    def __exit__(self, *exc_info):
        # The innermost entry of this thread or task, since others may have entered the same object. There is none if
        # another task closes a generator.
        own = next((entry for entry in reversed(self._entries) if self._blocks.has(entry)), self._entries[-1])
        self._entries.remove(own)
        self._blocks.remove(own)

    @classmethod
    def current(cls) -> str:
        """Name of the current operator."""
        block, calls = next(iter(cls._blocks), None), cls._calls
        return block if block is not None else calls[-1].name if calls else OPERATORS[0]


@torch.compiler.assume_constant_result  # torch.compile cannot trace context variables
def current_operator() -> str:
    """The same for code that is compiled, which keeps the operator that was current when it was compiled."""
    return steering_operator.current()
