"""The low-rank update as an operator on tensors, in three implementations.

All compute `h' = h + scaling * a @ up.T` with `a = dropout(act(z))` and `z = h @ down.T`.

- `"triton"` (the default on a GPU) fuses this into one kernel, see `triton_update.py`. Like the next one, it saves
  its output and `z`. It is a single operator under `torch.compile` and `torch.export`.
- `"memory_efficient"` (the default elsewhere) is an autograd function that saves its **output** `h'` and the
  r-dimensional `z`, not its input. The next block saves `h'` anyway, so that no second copy of the residual stream is
  kept. This also holds under gradient checkpointing, since transformers checkpoints the `forward` of a block without
  its hooks. The gradient is `dL/d down = dz^T h = dz^T h' - scaling * (dz^T a) up^T`. In 16-bit formats it is as
  accurate as the plain implementation as long as the update is not larger than `h`, and less accurate otherwise.
- `"plain"` is ordinary PyTorch. It is used under `torch.compile` and `torch.export` where the kernels do not apply.
  Use it for double backward, for `torch.func` transforms, and for models that modify the hidden state in place, where
  the others raise an error.

[`steering_operator`] selects the implementation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import triton_update
from .dtypes import autocast_enabled, cast, compute_dtype
from .switch import current_operator, steering_operator

# Up to this number of elements in `h`, as in decoding, the overhead of calls exceeds the cost of the arithmetic.
_FEW_ELEMENTS = 2**12


def low_rank_update(
    h: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    dropout: float = 0.0,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual + scaling * dropout(activation(h @ down.T)) @ up.T`, where `residual` is `h` by default.

    The update is computed in the promoted dtype of `h` and the factors, or in autocast's dtype if autocast is enabled,
    and added in the dtype of `h`. Autocast is disabled inside, so that both implementations round in the same places.

    Args:
        h (`torch.Tensor`): (..., d), floating point, not necessarily contiguous. May have no elements.
        down (`torch.Tensor`): (r, d).
        up (`torch.Tensor`): (d, r).
        scaling (`float`): Factor on the update.
        activation (`Callable`, *optional*): Elementwise function on the bottleneck. `None` is the identity.
        dropout (`float`, defaults to `0.0`): Dropout probability; pass 0 in evaluation mode.
        residual (`torch.Tensor`, *optional*):
            (..., d), what the update is added to, if several adapters get the same `h`. Always uses the plain
            implementation.

    Returns:
        `torch.Tensor`: (..., d), dtype and device of `h`, a new tensor.
    """
    if h.device.type in triton_update.DEVICES and operator_for(h, down, up, activation, residual) == "triton":
        return triton_update.update(h, down, up, scaling, activation, dropout, compute_dtype(h, down))
    # Not while tracing: a comparison would specialize symbolic sizes.
    if (
        not torch.is_grad_enabled()
        and not dropout
        and not torch.compiler.is_compiling()
        and h.numel() <= _FEW_ELEMENTS
    ):
        dtype = h.dtype if h.dtype == down.dtype else torch.promote_types(h.dtype, down.dtype)
        # A separate multiplication by the scaling could overflow in float16, including autocast's.
        if dtype != torch.float16 and (scaling == 1.0 or not autocast_enabled(h)):
            return _few_tokens(h, down, up, scaling, activation, residual, dtype)
    if autocast_enabled(h):
        dtype = compute_dtype(h, down)
        with torch.autocast(h.device.type, enabled=False):
            return _low_rank_update(h, down, up, scaling, activation, dropout, residual, dtype)
    return _low_rank_update(h, down, up, scaling, activation, dropout, residual, compute_dtype(h, down))


def operator_for(
    h: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    residual: torch.Tensor | None = None,
) -> str:
    """The implementation that [`low_rank_update`] uses for these arguments, given the one that is selected."""
    compiling = torch.compiler.is_compiling()
    selected = current_operator() if compiling else steering_operator.current()
    if selected == "plain" or residual is not None:
        return "plain"
    chosen = selected == "triton" or (selected == "auto" and h.is_cuda)
    if chosen and triton_update.serves(h, down, up, activation):
        return "triton"
    return "memory_efficient" if torch.is_grad_enabled() and not compiling else "plain"


def _low_rank_update(h, down, up, scaling, activation, dropout, residual, dtype):
    if operator_for(h, down, up, activation, residual) == "memory_efficient":
        return _MemoryEfficientUpdate.apply(h, down, up, scaling, activation, dropout, dtype)
    tokens = _flat(h)
    z = F.linear(cast(tokens, dtype), cast(down, dtype))
    a = _bottleneck(z, activation, _dropout_mask(z, dropout))
    return _add_update(tokens if residual is None else _flat(residual), a, cast(up, dtype), scaling).view_as(h)


def _few_tokens(h, down, up, scaling, activation, residual, dtype):
    """The update with as few calls as possible. It does not check for autocast, which rounds in the same places and
    would add a third to the time."""
    a = F.linear(cast(h, dtype), cast(down, dtype))
    if activation is not None:
        a = activation(a)
    if scaling != 1.0:
        a = scaling * a
    return cast(F.linear(a, cast(up, dtype)), h.dtype).add_(h if residual is None else residual)


class _MemoryEfficientUpdate(torch.autograd.Function):
    """Saves the output and `z` for the backward pass. Matrices are (tokens, features)."""

    @staticmethod
    def forward(ctx, h, down, up, scaling, activation, dropout, dtype):
        tokens = _flat(h)
        z = F.linear(cast(tokens, dtype), cast(down, dtype))
        mask = _dropout_mask(z, dropout)
        output = _add_update(tokens, _bottleneck(z, activation, mask), cast(up, dtype), scaling).view_as(h)
        ctx.save_for_backward(output if ctx.needs_input_grad[1] else None, z, mask, down, up)
        ctx.scaling, ctx.activation = scaling, activation
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        if not autocast_enabled(grad_output):
            return _backward(ctx, grad_output)
        # Autocast would round the products whose difference is the gradient.
        with torch.autocast(grad_output.device.type, enabled=False):
            return _backward(ctx, grad_output)


def _backward(ctx, grad_output):
    output, z, mask, down, up = ctx.saved_tensors
    needs_h, needs_down, needs_up = ctx.needs_input_grad[:3]
    dtype, scaling = z.dtype, ctx.scaling
    up_ = cast(up, dtype)
    grad_tokens = _flat(grad_output)
    grad = cast(grad_tokens, dtype)
    grad_a = scaling * (grad @ up_)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        a = _bottleneck(z, ctx.activation, mask)
    grad_z = grad_a if a is z else torch.autograd.grad(a, z, grad_a)[0]
    a = a.detach()

    grad_h = grad_down = grad_up = None
    if needs_up:
        grad_up = cast(scaling * (a.T @ grad), up.dtype).T  # three times as fast as grad.T @ a on a CPU
    if needs_down:
        grad_down = cast(_grad_down(cast(_flat(output), dtype), a, grad_z, up_, scaling), down.dtype)
    if needs_h:
        grad_h = _add_update(grad_tokens, grad_z, cast(down, dtype).T, 1.0).view_as(grad_output)
    return grad_h, grad_down, grad_up, None, None, None, None


def _grad_down(output, a, grad_z, up, scaling):
    """`dz^T h` with `h = output - scaling * a up^T`."""
    if output.dtype == torch.float16:  # products with the output, which may be far larger than `h`, could overflow
        return grad_z.T @ torch.addmm(output, a, up.T, alpha=-scaling)
    return torch.addmm(grad_z.T @ output, grad_z.T @ a, up.T, alpha=-scaling)


def _flat(h: torch.Tensor) -> torch.Tensor:
    """(tokens, d), a view where possible."""
    return h.reshape(-1, h.shape[-1])


def _bottleneck(z, activation, mask):
    a = z if activation is None else activation(z)
    return a if mask is None else a * mask


def _dropout_mask(z: torch.Tensor, p: float) -> torch.Tensor | None:
    return None if p == 0.0 else F.dropout(torch.ones_like(z), p)


def _add_update(tokens: torch.Tensor, a: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    """`tokens + scaling * a @ up.T`, in one call if the dtypes allow it."""
    if tokens.dtype == a.dtype:
        return torch.addmm(tokens, a, up.T, alpha=scaling)
    return tokens + cast(scaling * F.linear(a, up), tokens.dtype)
