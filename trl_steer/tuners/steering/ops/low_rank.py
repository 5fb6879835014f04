"""The low-rank update as an operator on tensors, in two forms of equal standing.

Both compute `h + scaling * dropout(act(h @ down.T)) @ up.T`.

- `"memory_efficient"` (the default) is an autograd function that keeps its **output** and the r-dimensional `z`, not
  its input. The next layer keeps that output anyway, so autograd holds no second copy of the residual stream, also
  under gradient checkpointing, where transformers checkpoints a block's `forward` and leaves its hooks outside. `h` is
  never formed again: `dL/d down = dz^T h = dz^T h' - scaling * (dz^T a) up^T`. In 16-bit formats that subtraction is
  as good as the plain form while the update is no larger than `h`, and worse beyond.
- `"plain"` is ordinary PyTorch, and what `torch.compile` and `torch.export` trace in any case. Choose it for double
  backward, for `torch.func` transforms, and where a later layer writes into the hidden state in place: the other form
  raises PyTorch's error there.

[`steering_operator`] is the one switch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..contexts import ContextStack, Entry

OPERATORS = ("memory_efficient", "plain")
# Up to so many numbers in `h`, a decoded token or two, calls cost more than arithmetic.
_FEW = 2**12


class steering_operator:  # noqa: N801 - reads like torch.set_grad_enabled
    """Chooses how low-rank steering is computed: for the whole process from here on, or as a `with` block for the
    thread or task that runs it. What was computed before keeps the operator that it was computed with.

    With gradient checkpointing on a GPU, a block that is computed again in the backward pass runs in another thread,
    which sees no `with` block. Choose the operator for the whole process then.

    Args:
        name (`str`): `"memory_efficient"` or `"plain"`, see the module's documentation.

    Raises:
        ValueError: `name` is neither.

    Example:

        ```py
        >>> steering_operator("plain")  # from here on
        >>> with steering_operator("memory_efficient"):
        ...     loss.backward()
        ```
    """

    _blocks: ContextStack[str] = ContextStack("steering_operator")
    _lock = threading.Lock()
    # Calls outside of any `with` block, the last of which holds. A few before it are kept, because a call may turn out
    # to be the beginning of a `with` block.
    _calls: list[steering_operator] = []

    def __init__(self, name: str):
        if name not in OPERATORS:
            raise ValueError(f"There is no steering operator {name!r}; use one of {OPERATORS}.")
        self.name = name
        self._entries: list[Entry[str]] = []
        self._around = self._blocks.innermost()
        if self._around is not None:  # until the block around this call ends
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
        # The innermost of this thread or task: others may have entered the same object. A generator that another task
        # closes has none there.
        own = next((entry for entry in reversed(self._entries) if self._blocks.has(entry)), self._entries[-1])
        self._entries.remove(own)
        self._blocks.remove(own)

    @classmethod
    def current(cls) -> str:
        """Name of the operator in force here."""
        block, calls = next(iter(cls._blocks), None), cls._calls
        return block if block is not None else calls[-1].name if calls else OPERATORS[0]


def low_rank_update(
    h: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    dropout: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual + scaling * dropout(activation(h @ down.T)) @ up.T`, where `residual` is `h` unless given.

    The update is computed in the wider of the dtypes of `h` and the factors, or in autocast's where that is on, and
    added in the dtype of `h`. Autocast itself is off inside, so both forms round in the same places.

    Args:
        h (`torch.Tensor`): (..., d), floating point, contiguous or not. May hold no tokens at all.
        down (`torch.Tensor`): (r, d).
        up (`torch.Tensor`): (d, r).
        scaling (`float`): Strength of the update.
        activation (`Callable`, *optional*): Elementwise function of the bottleneck; `None` is the identity.
        dropout (`float`, defaults to `0.0`): Dropout probability; pass 0 in evaluation mode.
        residual (`torch.Tensor`, *optional*):
            (..., d), what the update is added to when several adapters read the same `h`. Always the plain form.

    Returns:
        `torch.Tensor`: (..., d), dtype and device of `h`, never one of the inputs.
    """
    # Not while tracing, where sizes may be symbols that a comparison would fix.
    if not torch.is_grad_enabled() and not dropout and not torch.compiler.is_compiling() and h.numel() <= _FEW:
        dtype = h.dtype if h.dtype == down.dtype else torch.promote_types(h.dtype, down.dtype)
        # Half precision, autocast's included, could overflow where the strength is multiplied in by itself.
        if dtype != torch.float16 and (scaling == 1.0 or not _autocast_enabled(h)):
            return _few_tokens(h, down, up, scaling, activation, residual, dtype)
    if _autocast_enabled(h):
        dtype = torch.get_autocast_dtype(h.device.type)
        with torch.autocast(h.device.type, enabled=False):
            return _low_rank_update(h, down, up, scaling, activation, dropout, residual, dtype)
    dtype = h.dtype if h.dtype == down.dtype else torch.promote_types(h.dtype, down.dtype)
    return _low_rank_update(h, down, up, scaling, activation, dropout, residual, dtype)


def _low_rank_update(h, down, up, scaling, activation, dropout, residual, dtype):
    efficient = torch.is_grad_enabled() and residual is None and not torch.compiler.is_compiling()
    if efficient and steering_operator.current() != "plain":
        return _MemoryEfficientUpdate.apply(h, down, up, scaling, activation, dropout, dtype)
    tokens = _flat(h)
    z = F.linear(_cast(tokens, dtype), _cast(down, dtype))
    a = _bottleneck(z, activation, _dropout_mask(z, dropout))
    return _add_update(tokens if residual is None else _flat(residual), a, _cast(up, dtype), scaling).view_as(h)


def _few_tokens(h, down, up, scaling, activation, residual, dtype):
    """Few calls, because a decoded token costs a block little more than its calls.

    Two products and a sum round in the same places when autocast does the casting, so it need not be looked for, which
    would take a third of the time that they take.
    """
    a = F.linear(_cast(h, dtype), _cast(down, dtype))
    if activation is not None:
        a = activation(a)
    if scaling != 1.0:
        a = scaling * a
    return _cast(F.linear(a, _cast(up, dtype)), h.dtype).add_(h if residual is None else residual)


class _MemoryEfficientUpdate(torch.autograd.Function):
    """Keeps the output and `z` (r wide). Matrices have two dimensions, tokens by features."""

    @staticmethod
    def forward(ctx, h, down, up, scaling, activation, dropout, dtype):
        tokens = _flat(h)
        z = F.linear(_cast(tokens, dtype), _cast(down, dtype))
        mask = _dropout_mask(z, dropout)
        output = _add_update(tokens, _bottleneck(z, activation, mask), _cast(up, dtype), scaling).view_as(h)
        ctx.save_for_backward(output if ctx.needs_input_grad[1] else None, z, mask, down, up)
        ctx.scaling, ctx.activation = scaling, activation
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if not _autocast_enabled(grad_output):
            return _backward(ctx, grad_output)
        # A backward pass inside autocast would round the products, and `h` is recovered from their difference.
        with torch.autocast(grad_output.device.type, enabled=False):
            return _backward(ctx, grad_output)


def _backward(ctx, grad_output):
    output, z, mask, down, up = ctx.saved_tensors
    needs_h, needs_down, needs_up = ctx.needs_input_grad[:3]
    dtype, scaling = z.dtype, ctx.scaling
    up_ = _cast(up, dtype)
    grad_tokens = _flat(grad_output)
    grad = _cast(grad_tokens, dtype)
    grad_a = scaling * (grad @ up_)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        a = _bottleneck(z, ctx.activation, mask)
    grad_z = grad_a if a is z else torch.autograd.grad(a, z, grad_a)[0]
    a = a.detach()

    grad_h = grad_down = grad_up = None
    if needs_up:
        grad_up = _cast(scaling * (a.T @ grad), up.dtype).T  # on CPUs three times as fast as grad.T @ a
    if needs_down:
        grad_down = _cast(_grad_down(_cast(_flat(output), dtype), a, grad_z, up_, scaling), down.dtype)
    if needs_h:
        grad_h = _add_update(grad_tokens, grad_z, _cast(down, dtype).T, 1.0).view_as(grad_output)
    return grad_h, grad_down, grad_up, None, None, None, None


def _grad_down(output, a, grad_z, up, scaling):
    """`dz^T h` with `h = output - scaling * a up^T`."""
    if output.dtype == torch.float16:  # products of the output, which may be far larger than `h`, could overflow
        return grad_z.T @ torch.addmm(output, a, up.T, alpha=-scaling)
    # In other formats `h` is never formed.
    return torch.addmm(grad_z.T @ output, grad_z.T @ a, up.T, alpha=-scaling)


def _autocast_enabled(tensor: torch.Tensor) -> bool:
    """Meta tensors have no autocast, and PyTorch raises if asked."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def _flat(h: torch.Tensor) -> torch.Tensor:
    """(tokens, d), a copy only if it must be."""
    return h.reshape(-1, h.shape[-1])


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _bottleneck(z, activation, mask):
    a = z if activation is None else activation(z)
    return a if mask is None else a * mask


def _dropout_mask(z: torch.Tensor, p: float) -> torch.Tensor | None:
    return None if p == 0.0 else F.dropout(torch.ones_like(z), p)


def _add_update(tokens: torch.Tensor, a: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    """`tokens + scaling * a @ up.T`, in one product where the dtypes allow it."""
    if tokens.dtype == a.dtype:
        return torch.addmm(tokens, a, up.T, alpha=scaling)
    return tokens + _cast(scaling * F.linear(a, up), tokens.dtype)
