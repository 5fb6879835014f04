"""The norms of an adapter's updates (arXiv 2603.00425, appendix G.1 and Figure 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..tuners.steering.folder import AdapterFolder
from .updates import Update, read_updates


def adapter_norms(folder: str | Path | AdapterFolder) -> list[dict[str, Any]]:
    """
    The norms of each update of an adapter. Needs no model.

    Args:
        folder (`str`, `Path` or [`AdapterFolder`]): Folder or Hub id of an adapter, ours or LoRA.

    Returns:
        `list[dict]`: For each update `block`; `module`, the module with LoRA or the site of steering; `is_steering`;
        `norm`, the 2-norm of the update's matrix times its scaling (of the offset if there is no matrix), without the
        activation; `frobenius`, its Frobenius norm; `offset`, the norm of the offset; and `tensors`, the 2-norm of
        each tensor by its name, as for `up` in the paper's Figure 6. Norms are `None` where they cannot be computed.

    Raises:
        ValueError: There is no adapter, it cannot be read, or it is of another type.
    """
    return [norms_of(update) for update in read_updates(folder)]


def norms_of(update: Update) -> dict[str, Any]:
    """The row of [`adapter_norms`] for one update."""
    spectrum = update.spectrum
    return {
        "block": update.block,
        "module": update.module,
        "is_steering": update.is_steering,
        "norm": spectrum[0].item() if len(spectrum) else None,
        "frobenius": spectrum.norm().item() if len(spectrum) else None,
        "offset": update.offset,
        "tensors": {name: _norm(tensor) for name, tensor in update.tensors.items()},
    }


def _norm(tensor: torch.Tensor) -> float | None:
    """The 2-norm of a vector, or of a matrix (the largest of several)."""
    if not tensor.isfinite().all():
        return None
    return torch.linalg.matrix_norm(tensor, 2).max().item() if tensor.dim() > 1 else tensor.norm().item()
