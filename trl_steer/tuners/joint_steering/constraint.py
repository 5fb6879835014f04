"""The orthogonality constraint, for use in any training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..steering.config import check_choice
from .pairing import find_pairs
from .projection import ProjectionReport, project_

logger = logging.getLogger(__name__)

# What rounding to the weights' dtype allows: `max |Q^T W| <= BOUND ||W||`.
BOUND, HALF_PRECISION_BOUND = 1e-5, 1e-2


class OrthogonalityConstraint:
    """
    Keeps steering orthogonal to the output of LoRA in a joint adapter.

    In each block, `W_up <- (I - Q Q^T) W_up`, with `W_up` (d, r) the steering weight and `Q` an orthonormal basis of
    the column space of LoRA's `B` (d, r_lora) in the module that writes to the residual stream.

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 5.2.

    Args:
        model (`nn.Module`): A model with a joint adapter, before it is sharded.
        adapter_name (`str`): The name of the adapter.
        side (`str`, defaults to `"output"`):
            `"output"` projects `W_up` (d, r) or the vector (d,), `"input"` projects `W_down` (r, d).
        modules (`list[str]`, *optional*):
            Names, or ends of names, of LoRA's target modules in a block to be orthogonal to. Default: the last linear
            layer of the MLP.
        norms (`bool`, defaults to `True`):
            If there is a norm between LoRA and the residual addition (Gemma 2 and 3, OLMo 2), use `diag(gamma) B`,
            with the norm's weight `gamma`, instead of `B`.

    Raises:
        ValueError: `side` is invalid; there is nothing to be orthogonal to; or the ranks are too large. See
            [`find_pairs`].
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        side: str = "output",
        modules: list[str] | None = None,
        norms: bool = True,
    ):
        check_choice("side", side, ("output", "input"))
        self.model, self.adapter_name, self.side = model, adapter_name, side
        self.pairs = find_pairs(model, adapter_name, modules, norms)
        if side == "input" and any(not hasattr(pair.steering.adapters[adapter_name], "down") for pair in self.pairs):
            raise ValueError(
                "orthogonal_side='input' projects W_down, which steering_type='vector' does not have. Use "
                "orthogonal_side='output'."
            )

    def log_bound(self) -> None:
        """Logs how orthogonal the weights will be, which depends on their dtype (TRL uses bf16 with QLoRA)."""
        dtype = max((weight.dtype for _, weight in self._matrices()), key=lambda dtype: torch.finfo(dtype).eps)
        level, bound = logging.INFO, BOUND
        if torch.finfo(dtype).bits < 32:
            level, bound = logging.WARNING, HALF_PRECISION_BOUND
        logger.log(
            level,
            f"Steering will be orthogonal to LoRA up to max |Q^T W| <= {bound:g} ||W||, because its weights are in "
            f"{str(dtype).removeprefix('torch.')}.",
        )

    def project(self) -> ProjectionReport:
        """Projects the weights in place.

        Raises:
            ValueError: A weight is computed by pruning or a parametrization, or is sharded other than by FSDP2.
            FloatingPointError: LoRA's matrices have NaN or infinite values.
        """
        return project_(self._matrices(), transposed=self.side == "input")

    @contextmanager
    def projected(self) -> Iterator[None]:
        """Context manager in which the weights are projected. Restores them afterwards."""
        weights = [weight for _, weight in self._matrices()]
        before = [weight.detach().clone() for weight in weights]
        self.project()
        try:
            yield
        finally:
            with torch.no_grad():
                # FSDP2 may have replaced the parameters in the meantime.
                for (_, weight), value in zip(self._matrices(), before, strict=True):
                    weight.copy_(value)

    def measure(self) -> ProjectionReport:
        """Returns what [`project`] would do, without changing the weights."""
        return project_(self._matrices(), transposed=self.side == "input", write=False)

    def project_gradients(self) -> None:
        """Projects the gradients in place, so that the optimizer's momentum stays in the orthogonal complement."""
        pairs = [(matrices, weight.grad) for matrices, weight in self._matrices() if weight.grad is not None]
        project_(pairs, transposed=self.side == "input")

    def _matrices(self) -> list[tuple[list[torch.Tensor], nn.Parameter]]:
        # FSDP2 replaces the parameters when it shards them, so they must not be cached. After a forward pass without a
        # backward pass, they may be gathered copies, which FSDP2 discards.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        name = self.adapter_name
        matrices = [(pair.output_matrices(name), pair.steering_matrix(name, self.side)) for pair in self.pairs]
        for pair, (_, weight) in zip(self.pairs, matrices, strict=True):
            if not isinstance(weight, nn.Parameter):
                raise ValueError(
                    f"The steering weight of {pair.name} is computed by pruning or a parametrization, so it cannot be "
                    "projected. Remove the pruning or parametrization, or set orthogonal=False."
                )
        return matrices
