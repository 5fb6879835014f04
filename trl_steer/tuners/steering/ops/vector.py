"""The update by a vector, as an operator on tensors."""

from __future__ import annotations

import torch


def vector_update(h: torch.Tensor, vector: torch.Tensor, scaling: float) -> torch.Tensor:
    """`h + scaling * vector` in a single call, computed in the promoted dtype and rounded once to that of `h`.

    Args:
        h (`torch.Tensor`): (..., d).
        vector (`torch.Tensor`): (d,), or another shape that broadcasts to that of `h`.
        scaling (`float`): Factor on the vector.

    Returns:
        `torch.Tensor`: (..., d), dtype and device of `h`, a new tensor.
    """
    if vector.dtype == h.dtype:
        return torch.add(h, vector, alpha=scaling)
    if torch.compiler.is_compiling():  # which fuses this, and cannot trace the function
        return torch.add(h, vector, alpha=scaling).to(h.dtype)
    return _MixedUpdate.apply(h, vector, scaling)


class _MixedUpdate(torch.autograd.Function):
    """Adds a vector of another dtype without a copy of `h` in the promoted dtype, which only `out` can avoid."""

    @staticmethod
    def forward(h, vector, scaling):
        return torch.add(h, vector, alpha=scaling, out=torch.empty_like(h))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, vector, ctx.scaling = inputs
        ctx.dtype, ctx.shape = vector.dtype, vector.shape

    @staticmethod
    def backward(ctx, grad):
        grad_vector = None
        if ctx.needs_input_grad[1]:
            shape = (1,) * (grad.dim() - len(ctx.shape)) + tuple(ctx.shape)
            summed = [axis for axis, size in enumerate(shape) if size != grad.shape[axis]]
            promoted = torch.promote_types(grad.dtype, ctx.dtype)  # in which the sum does not copy the gradient
            grad_vector = grad.sum(summed, dtype=promoted) if summed else grad.to(promoted)
            grad_vector = (ctx.scaling * grad_vector).reshape(ctx.shape).to(ctx.dtype)
        return grad if ctx.needs_input_grad[0] else None, grad_vector, None

    @staticmethod
    def vmap(info, in_dims, h, vector, scaling):
        h = h.expand(info.batch_size, *h.shape) if in_dims[0] is None else h.movedim(in_dims[0], 0)
        if in_dims[1] is not None:
            vector = vector.movedim(in_dims[1], 0)
            vector = vector.reshape(len(vector), *[1] * (h.dim() - vector.dim()), *vector.shape[1:])
        return torch.add(h, vector, alpha=scaling).to(h.dtype), 0
