"""The orthogonality constraint as something that any training loop can call."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from .pairing import find_pairs
from .projection import ProjectionReport, project_

logger = logging.getLogger(__name__)

# How orthogonal weights can be once they are rounded: `max |Q^T W| <= BOUND ||W||`.
BOUND, HALF_PRECISION_BOUND = 1e-5, 1e-2


class OrthogonalityConstraint:
    """
    Keeps the steering half of a joint adapter orthogonal to what its LoRA half writes into the residual stream.

    Reference: "Weight Updates as Activation Shifts" (arXiv 2603.00425), section 5.2.

    Args:
        model (`nn.Module`): A model with a joint adapter, before it is sharded.
        adapter_name (`str`): The adapter.
        side (`str`, defaults to `"output"`): `"output"` projects `W_up`, `"input"` projects `W_down`.
        modules (`list[str]`, *optional*): See [`JointOrthSFTConfig`].
        norms (`bool`, defaults to `True`): See [`find_pairs`].

    Raises:
        ValueError: The constraint would be empty, or cannot hold; see [`find_pairs`].
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        side: str = "output",
        modules: list[str] | None = None,
        norms: bool = True,
    ):
        if side not in ("output", "input"):
            raise ValueError(f"side must be 'output' or 'input', got {side!r}.")
        self.model, self.adapter_name, self.side = model, adapter_name, side
        self.pairs = find_pairs(model, adapter_name, modules, norms)
        if side == "input" and any(not hasattr(pair.steering.adapters[adapter_name], "down") for pair in self.pairs):
            raise ValueError("orthogonal_side='input' projects W_down, which steering_type='vector' does not have.")

    def log_bound(self) -> None:
        """Says how orthogonal the weights will be, which depends on their dtype. TRL keeps those of QLoRA in bf16."""
        dtype = max((weight.dtype for _, weight in self._matrices()), key=lambda dtype: torch.finfo(dtype).eps)
        level, bound = logging.INFO, BOUND
        if torch.finfo(dtype).bits < 32:
            level, bound = logging.WARNING, HALF_PRECISION_BOUND
        logger.log(
            level,
            f"Steering is kept orthogonal to LoRA up to max |Q^T W| <= {bound:g} ||W||, as its weights are in "
            f"{str(dtype).removeprefix('torch.')}.",
        )

    def project(self) -> ProjectionReport:
        """Projects the weights, in place."""
        return project_(self._matrices(), transposed=self.side == "input")

    @contextmanager
    def projected(self) -> Iterator[None]:
        """Inside the block the weights satisfy the constraint, whenever they were projected last; afterwards they are
        the very weights of before."""
        weights = [weight for _, weight in self._matrices()]
        before = [weight.detach().clone() for weight in weights]
        self.project()
        try:
            yield
        finally:
            with torch.no_grad():
                # Parameters that were sharded again meanwhile are other objects with the same place.
                for (_, weight), value in zip(self._matrices(), before, strict=True):
                    weight.copy_(value)

    def measure(self) -> ProjectionReport:
        """What projecting the weights would do."""
        return project_(self._matrices(), transposed=self.side == "input", write=False)

    def project_gradients(self) -> None:
        """Projects the gradients, so that the optimizer's momentum does not keep pushing out."""
        pairs = [(matrices, weight.grad) for matrices, weight in self._matrices() if weight.grad is not None]
        project_(pairs, transposed=self.side == "input")

    def _matrices(self) -> list[tuple[list[torch.Tensor], nn.Parameter]]:
        # FSDP2 replaces the parameters when it shards them, so they are read anew each time. After a forward pass
        # without a backward one it may have left gathered copies in their place, which it would throw away.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        name = self.adapter_name
        matrices = [(pair.output_matrices(name), pair.steering_matrix(name, self.side)) for pair in self.pairs]
        for pair, (_, weight) in zip(self.pairs, matrices, strict=True):
            if not isinstance(weight, nn.Parameter):
                raise ValueError(
                    f"The steering weight of {pair.name} is computed from others (pruning or a parametrization), so "
                    "projecting it would change nothing. Remove these, or set orthogonal=False."
                )
        return matrices
