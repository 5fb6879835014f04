"""The low-rank update by Triton kernels, as custom operators of PyTorch.

`trl_steer::low_rank_update` is one node for `torch.compile`, `torch.export` and CUDA graphs. Like the memory-efficient
implementation, it saves its output and `z` for the backward pass, and recovers `h` from the output. For hidden states
of 16 bits, this is exact for values that the update does not lift into the next power of two; others lose their last
bit, which only affects the gradient of `down`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.activations import GELUActivation, GELUTanh, NewGELUActivation, SiLUActivation

# Triton can also interpret the kernels, slowly, on a CPU.
DEVICES = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
MAX_RANK = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACTIVATIONS: dict[Any, str] = {
    type(None): "identity",
    nn.ReLU: "relu",
    F.relu: "relu",
    nn.SiLU: "silu",
    SiLUActivation: "silu",
    F.silu: "silu",
    GELUActivation: "gelu",
    F.gelu: "gelu",
    GELUTanh: "gelu_tanh",
    NewGELUActivation: "gelu_tanh",
}
# Up to this number of tokens, as in decoding, a program computes one.
_FEW_TOKENS = 64
# From this number of tokens on, smaller tiles would not occupy more of a GPU.
_MANY_TOKENS = 4096
# For how many programs the sums over tokens are divided into parts.
_SUM_PROGRAMS = 512


def serves(h: torch.Tensor, down: torch.Tensor, up: torch.Tensor, activation: Callable | None) -> bool:
    """Whether the kernels can compute this update."""
    return (
        h.device.type in DEVICES
        and h.device == down.device == up.device
        and h.dtype in _DTYPES
        and down.dtype in _DTYPES
        and up.dtype in _DTYPES
        and len(down) <= MAX_RANK
        and kernel_activation(activation) is not None
        and _runs_kernels(h.device)
    )


def kernel_activation(activation: Callable | None) -> str | None:
    """The kernels' name of an activation, `None` if they do not have it."""
    return _ACTIVATIONS.get(type(activation)) or _ACTIVATIONS.get(activation)


@torch.compiler.assume_constant_result
def _runs_kernels(device: torch.device) -> bool:
    return _compiles_kernels(device) if device.type == "cuda" else _has_triton()


@functools.cache
def _compiles_kernels(device: torch.device) -> bool:
    return _has_triton() and (torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def update(
    h: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    scaling: float,
    activation: Callable | None,
    dropout: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`h + scaling * dropout(activation(h @ down.T)) @ up.T`, with `z` and `a` in `dtype`, if [`serves`] is true."""
    # The seed of dropout is a tensor, because a number would be a constant in a CUDA graph.
    seed = torch.randint(2**31 - 1, (1,), device=h.device, dtype=torch.int32) if dropout else None
    arguments = (h, down, up, float(scaling), kernel_activation(activation), float(dropout), seed, dtype)
    if torch.compiler.is_compiling() or type(h) is not torch.Tensor:
        return torch.ops.trl_steer.low_rank_update(*arguments)[0]
    return _EagerUpdate.apply(*arguments)[0]  # the dispatch of custom operators takes longer than the kernels


def _update(h, down, up, scaling, activation, dropout, seed, dtype):
    tokens, down, up = _flat(h), down.contiguous(), up.contiguous()
    (n, d), r = tokens.shape, len(down)
    output, z = _outputs(h, down, dtype)
    if n:
        kernel, tile = "forward", _tile(r, 32 if n >= _MANY_TOKENS else 16)
        if n <= _FEW_TOKENS:
            kernel, tile = "forward_token", {**_tile(r, 1), "D": 8192 // tile["R"]}
        _launch(
            kernel, (-(-n // tile["T"]),), tokens, down, up, seed, output, z, n, d, r, *tokens.stride(), scaling,
            dropout, ACTIVATION=activation, DROPOUT=dropout > 0, **tile,
        )  # fmt: skip
    return output, z


def _outputs(h, down, *rest):
    dtype = rest[-1]
    output = torch.empty_like(h, memory_format=torch.contiguous_format)
    return output, down.new_empty(h.numel() // h.shape[-1], down.shape[0], dtype=dtype)


def _backward(grad, output, z, down, up, scaling, activation, dropout, seed, needs_h, needs_down, needs_up):
    down, up, gradients = down.contiguous(), up.contiguous(), _flat(grad)
    (n, d), r = gradients.shape, len(down)
    grad_h = torch.empty_like(grad, memory_format=torch.contiguous_format) if needs_h else grad.new_empty(0)
    grad_z = torch.empty_like(z, dtype=torch.float32)
    constants = {"ACTIVATION": activation, "DROPOUT": dropout > 0}
    if n:
        tile = _tile(r, 32 if n >= _MANY_TOKENS else 16)
        _launch(
            "backward_rows", (-(-n // tile["T"]),), gradients, down, up, z, seed, grad_h, grad_z, n, d, r,
            *gradients.stride(), scaling, dropout, NEEDS_H=needs_h, **constants, **tile,
        )  # fmt: skip
    parts, rows_per_part = _parts(n, d)  # none without tokens
    partial_down = z.new_empty(parts if needs_down else 0, r, d, dtype=torch.float32)
    partial_up = z.new_empty(parts if needs_up else 0, d, r, dtype=torch.float32)
    if n and (needs_down or needs_up):
        tile = _tile(r)
        _launch(
            "backward_columns", (-(-d // tile["D"]), parts), gradients, output, up, z, grad_z, seed,
            partial_down, partial_up, n, d, r, rows_per_part, *gradients.stride(), scaling, dropout,
            NEEDS_DOWN=needs_down, NEEDS_UP=needs_up, **constants, **tile,
        )  # fmt: skip
    grad_down = partial_down.sum(0).to(down.dtype) if needs_down else down.new_empty(0)
    grad_up = partial_up.sum(0).to(up.dtype) if needs_up else up.new_empty(0)
    return grad_h, grad_down, grad_up


def _backward_outputs(grad, output, z, down, up, scaling, activation, dropout, seed, *needs):
    outputs = zip((grad, down, up), needs, strict=True)
    return tuple(torch.empty_like(t).contiguous() if needed else t.new_empty(0) for t, needed in outputs)


def _save_for_backward(ctx, inputs, output):
    _, down, up, ctx.scaling, ctx.activation, ctx.dropout, seed, _ = inputs
    steered, z = output
    ctx.mark_non_differentiable(z)
    ctx.save_for_backward(steered if ctx.needs_input_grad[1] else None, z, down, up, seed)


def _gradients(ctx, grad, implementation):
    steered, z, down, up, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = implementation(grad, steered, z, down, up, ctx.scaling, ctx.activation, ctx.dropout, seed, *needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *[None] * 5


class _EagerUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # not with `setup_context`, for which PyTorch would inspect a signature in each call
        output = _update(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        return _gradients(ctx, grad, _backward)


def _register_operators() -> None:
    """Defines the custom operators."""
    settings = "float scaling, str activation, float dropout, Tensor? seed"
    forward = torch.library.custom_op(
        "trl_steer::low_rank_update",
        _update,
        mutates_args=(),
        schema=f"(Tensor h, Tensor down, Tensor up, {settings}, ScalarType dtype) -> (Tensor, Tensor)",
    )
    forward.register_fake(_outputs)
    backward = torch.library.custom_op(
        "trl_steer::low_rank_update_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor grad, Tensor? output, Tensor z, Tensor down, Tensor up, {settings}, "
        "bool needs_h, bool needs_down, bool needs_up) -> (Tensor, Tensor, Tensor)",
    )
    backward.register_fake(_backward_outputs)
    forward.register_autograd(
        lambda ctx, grad, _: _gradients(ctx, grad, torch.ops.trl_steer.low_rank_update_backward),
        setup_context=_save_for_backward,
    )


_register_operators()


def _flat(h: torch.Tensor) -> torch.Tensor:
    return h.reshape(-1, h.shape[-1])


def _tile(r: int, tokens: int = 32) -> dict[str, int]:
    """Constants of the kernels with which they need neither more registers nor more shared memory than there are."""
    width = max(16, 1 << (r - 1).bit_length())
    return {"T": tokens, "D": 64, "R": width, "num_warps": 4 if width == 16 else 8, "num_stages": 2}


def _parts(n: int, d: int) -> tuple[int, int]:
    """Into how many parts the tokens are divided for sums over them, and how many are in each."""
    blocks = -(-n // 128)
    most = max(1, _SUM_PROGRAMS // -(-d // 64))
    blocks_per_part = max(1, -(-blocks // most))
    return -(-blocks // blocks_per_part), blocks_per_part * 128


def _launch(kernel: str, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Runs a kernel on the device of its first argument."""
    from . import kernels  # here, because it needs Triton

    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        getattr(kernels, kernel)[grid](*arguments, PRECISION=_precision(device.type), **constants)


@functools.cache
def _precision(device_type: str) -> str:
    """Three products of tensor cores are as accurate as float32."""
    return "tf32x3" if device_type == "cuda" and torch.version.hip is None else "ieee"
