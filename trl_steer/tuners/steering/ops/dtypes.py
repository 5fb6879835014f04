"""The dtypes in which operators compute."""

from __future__ import annotations

import torch


def compute_dtype(h: torch.Tensor, factor: torch.Tensor) -> torch.dtype:
    """The dtype in which an update of `h` is computed: that of autocast, or else the promoted one."""
    if autocast_enabled(h):
        return torch.get_autocast_dtype(h.device.type)
    return h.dtype if h.dtype == factor.dtype else torch.promote_types(h.dtype, factor.dtype)


def autocast_enabled(tensor: torch.Tensor) -> bool:
    """Whether autocast is enabled for the device of a tensor. PyTorch raises an error for the meta device."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
