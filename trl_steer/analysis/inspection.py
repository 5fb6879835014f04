"""What is in an adapter folder, without its model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..tuners.joint_steering.projection import project_
from ..tuners.steering.folder import AdapterFolder
from .norms import norms_of
from .updates import Update, read_updates


def inspect_adapter(folder: str | Path | AdapterFolder, base_parameters: int | None = None) -> dict[str, Any]:
    """
    The contents and the state of an adapter.

    Args:
        folder (`str`, `Path` or [`AdapterFolder`]): Folder or Hub id of an adapter, ours or LoRA.
        base_parameters (`int`, *optional*): Number of parameters of the base model, for the share.

    Returns:
        `dict`:
            - `type`, `base_model`, `rank` (`None` for a vector), `dtypes`, `parameters` and `share` (of the base
              model's parameters, `None` if not known);
            - `updates`, a list with the rows of [`adapter_norms`] and, for each, `spectrum`, the singular values of
              the update's matrix, and `effective_rank`, the exponential of the entropy of the normalized spectrum
              (Roy and Vetterli, 2007), `None` for an offset;
            - `overlap`, for a joint adapter: by name of a module with LoRA as wide as the residual stream, the largest
              `max |Q^T W_up| / ||W_up||` over the blocks, with `Q` a basis of the columns of LoRA's `B`. It is at most
              1e-5 for the module that steering was trained to be orthogonal to (the MLP's last layer, in fp32). Where
              a norm follows that module (Gemma 2 and 3, OLMo-2), the constraint is on `diag(gamma) B`, which needs the
              model;
            - `problems`, a list of sentences, empty for a healthy adapter.

    Raises:
        ValueError: There is no adapter, it cannot be read, or it is of another type.
    """
    folder = folder if isinstance(folder, AdapterFolder) else AdapterFolder.open(folder)
    config, header, updates = folder.config, folder.header(), read_updates(folder)
    parameters = sum(tensor.numel() for tensor in header.values())
    return {
        "type": getattr(config.peft_type, "value", config.peft_type),
        "base_model": config.base_model_name_or_path,
        "rank": _rank(updates),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in header.values()}),
        "parameters": parameters,
        "share": None if base_parameters is None else parameters / base_parameters,
        "updates": [{**norms_of(update), **_shape_of(update)} for update in updates],
        "overlap": _overlaps(updates),
        "problems": _problems(updates),
    }


def effective_rank(spectrum: torch.Tensor) -> float | None:
    """The exponential of the entropy of singular values (n,), normalized to sum 1. `None` if all are zero."""
    total = spectrum.sum()
    if not total > 0:
        return None
    p = spectrum[spectrum > 0] / total
    return (-(p * p.log()).sum()).exp().item()


def _shape_of(update: Update) -> dict[str, Any]:
    is_matrix = update.affine is not None and not update.affine.is_offset
    spectrum = update.spectrum
    return {
        "spectrum": spectrum.tolist() if is_matrix else [],
        "effective_rank": effective_rank(spectrum) if is_matrix else None,
    }


def _rank(updates: Sequence[Update]) -> int | list[int] | None:
    ranks = {u.affine.left.shape[-1] for u in updates if u.affine is not None and u.affine.left is not None}
    return sorted(ranks) if len(ranks) > 1 else next(iter(ranks), None)


def _overlaps(updates: Sequence[Update]) -> dict[str, float]:
    steering = {u.block: u.tensors for u in updates if u.is_steering and u.affine is not None}
    matrices = {block: named.get("up", named.get("vector")) for block, named in steering.items()}
    found: dict[str, float] = defaultdict(float)
    for update in updates:
        W = matrices.get(update.block)
        if update.is_steering or update.affine is None or W is None or len(update.tensors["B"]) != len(W):
            continue
        overlap = project_([([update.tensors["B"]], W)], write=False).max_overlap
        found[update.module] = max(found[update.module], overlap)
    return dict(found)


def _problems(updates: Sequence[Update]) -> list[str]:
    problems = [] if updates else ["There are no tensors of the adapter."]
    for update in updates:
        where = update.module if update.block is None else f"Block {update.block}, {update.module}"
        if update.problem is not None:
            problems.append(f"{where}: {update.problem}.")
        elif not update.spectrum.any() and not update.offset:
            problems.append(f"{where}: the update is zero, as before training.")
    return problems
