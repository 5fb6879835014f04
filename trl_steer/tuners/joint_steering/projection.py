r"""Projection of steering weights onto the orthogonal complement of the column space of LoRA's output matrix.

For each block, let `B` (d, r_lora) be LoRA's output matrix in the module that writes to the residual stream, and `Q`
an orthonormal basis of its column space. Then `W_up <- (I - Q Q^T) W_up` (arXiv 2603.00425, section 5.2).

No d x d matrix is computed. With `G = B^T B = V L V^T` and `Q = B V L^{-1/2}`, we have
`Q^T W = L^{-1/2} V^T (B^T W)`, which does not need `Q`. All of this is done in float64, and repeated until `W` is
orthogonal relative to its norm, by a bound on the rounding error or by a measurement. The Gram matrix `G` only has
half of the digits of `B`, so that small singular values are computed in a second step, from the remainder of `B` after
the first one. If the rows of `B` and `W` are sharded (FSDP2), only r x r matrices are communicated.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard

# Singular values of B below this fraction of the largest one are rounding errors.
RANK_TOLERANCE = 1e-7
# Singular values above this fraction of the largest one, and their vectors, are accurate to eight digits if computed
# from the Gram matrix of B.
_GRAM_TOLERANCE = 1e-4
_FLOAT64_EPS = torch.finfo(torch.float64).eps
# Two are enough for float32. In float64, the loop might not end.
_MAX_PASSES = 4
# Size of the float64 buffer on a CPU, chosen with `eval/benchmarks/projection.py`.
_CPU_BYTES = 2**24

Reduce = Callable[[torch.Tensor], torch.Tensor]


class ProjectionReport(NamedTuple):
    """The effect of a projection.

    Attributes:
        max_overlap (`float`): Largest `max |Q^T W| / ||W||` over the blocks, before the projection, from 0 to 1.
        kept_norm (`float`): Norm of all `W` together after the projection divided by that before, from 0 to 1. 1 if
            all `W` are zero.
    """

    max_overlap: float
    kept_norm: float


def project_out_(
    W: torch.Tensor, B: torch.Tensor, eps: float, reduce: Reduce | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`W <- (I - Q Q^T) W` in place, with `Q` an orthonormal basis of the column space of `B`.

    Singular values of `B` up to `RANK_TOLERANCE` times the largest one are taken as zero, so `B = 0` does not change
    `W`. A `W` that is orthogonal up to rounding is not changed, so projecting twice is bitwise the same as once.

    Args:
        W (`torch.Tensor`): (blocks, d, r), float64. With `reduce`, its local rows.
        B (`torch.Tensor`): (blocks, d, s), float64. With `reduce`, its local rows.
        eps (`float`): `torch.finfo(dtype).eps` of the dtype in which the result is stored.
        reduce (`Callable`, *optional*): Sums a tensor over the processes with the other rows.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`:
            `max |Q^T W| / ||W||` before the projection, and `||W||` before and after it, each (blocks,).
    """
    B, to_basis, condition = _basis(B, reduce)
    # Bound on the rounding error of `Q^T W` relative to `W`, from products, sums and the non-orthonormality of `Q`.
    rounding = 1024 * _FLOAT64_EPS * condition.square()
    coefficients, overlap, before = _overlap(W, B, to_basis, reduce)
    # Smaller overlaps are within the error of measuring (which is the larger one in float64) or of storing.
    to_remove = overlap > (4 * _FLOAT64_EPS * torch.where(condition.isfinite(), condition, 1.0)).clamp(min=eps)
    left, after = overlap * to_remove, before
    for _ in range(_MAX_PASSES):
        if (left <= eps / 64).all():
            break
        removed = coefficients * to_remove[:, None, None]
        W.baddbmm_(B, to_basis @ removed, alpha=-1)
        norm, after = after, (after.square() - removed.square().sum((-2, -1))).clamp(min=0).sqrt()
        if (rounding * norm <= eps / 64 * after).all():
            break  # the bound makes another measurement unnecessary
        coefficients, left, after = _overlap(W, B, to_basis, reduce)
        left = left * to_remove
    return overlap, before, after


def _overlap(W: torch.Tensor, B: torch.Tensor, to_basis: torch.Tensor, reduce: Reduce | None):
    """`Q^T W`, (blocks, n, r), and for each block its largest entry relative to `||W||`, and `||W||`."""
    norm = _norm(W, reduce)
    coefficients = to_basis.mT @ _sum(B.mT @ W, reduce)
    return coefficients, coefficients.abs().amax((-2, -1)) / torch.where(norm > 0, norm, 1.0), norm


def _basis(B: torch.Tensor, reduce: Reduce | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`Q` as a product of two factors, (blocks, d, n) and (blocks, n, n), of which the first is `B` if that is
    accurate enough, and the condition number of `B`, (blocks,), or infinity if the first factor is not `B`.

    For a singular value that is taken as zero, `Q` has a column of zeros.
    """
    gram = _sum(B.mT @ B, reduce)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    largest = eigenvalues[..., -1:]
    accurate = (eigenvalues > _GRAM_TOLERANCE**2 * largest) & (largest > 0)
    to_basis = _whitening(eigenvalues, vectors, accurate)
    if (accurate | (largest <= 0)).all():
        return B, to_basis, (largest.squeeze(-1) / torch.where(accurate, eigenvalues, torch.inf).amin(-1)).sqrt()
    Q, rest = B @ to_basis, B
    for _ in range(2):
        rest = rest - Q @ _sum(Q.mT @ rest, reduce)
    eigenvalues, vectors = torch.linalg.eigh(_sum(rest.mT @ rest, reduce))
    of_rest = rest @ _whitening(eigenvalues, vectors, eigenvalues > RANK_TOLERANCE**2 * largest)
    Q = torch.cat([Q, of_rest], dim=-1)
    return Q, torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device), torch.full_like(largest.squeeze(-1), torch.inf)


def _whitening(eigenvalues: torch.Tensor, vectors: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return vectors * (torch.where(kept, eigenvalues, 1.0).rsqrt() * kept).unsqueeze(-2)


@torch.no_grad()
def project_(
    pairs: Sequence[tuple[Sequence[torch.Tensor], torch.Tensor]], transposed: bool = False, write: bool = True
) -> ProjectionReport:
    """Projects matrices in place, `W <- (I - Q Q^T) W`. Matrices of the same shape are projected in one batch.

    Args:
        pairs (`Sequence`):
            For each block, the matrices `B` (d, r_lora), with `Q` a basis of the column space of all of them, and `W`
            (d, r) or a vector (d,). Any floating point dtype; either plain tensors, or `DTensor`s whose rows are
            sharded over one mesh dimension.
        transposed (`bool`, defaults to `False`): `W` is (r, d), and `W <- W (I - Q Q^T)`.
        write (`bool`, defaults to `True`): `False` does not change the matrices, and only returns the report.

    Returns:
        [`ProjectionReport`]: The effect of the projection.

    Raises:
        ValueError: A `DTensor` has a layout that would require gathering it.
        FloatingPointError: A matrix `B` has NaN or infinite values.
    """
    batches: dict[tuple, list[tuple[torch.Tensor, _LocalShard]]] = defaultdict(list)
    for matrices, weight in pairs:
        local = _LocalShard.of(weight, transposed)
        parts = [_local_rows(matrix, local.mesh) for matrix in matrices]
        columns = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        batches[(columns.shape, local.tensor.shape, local.tensor.dtype, columns.device)].append((columns, local))
    for batch in batches.values():  # all of them before the first one is written
        _check_finite([columns for columns, _ in batch], batch[0][1].reduce())
    measured = []
    for batch in batches.values():
        (columns, first), size = batch[0], _blocks_at_a_time(batch)
        reduce, eps = first.reduce(), torch.finfo(first.tensor.dtype).eps
        shapes = [(size, *columns.shape), (size, *first.tensor.shape)]
        lengths = [math.prod(shape) for shape in shapes]
        buffer = columns.new_empty(sum(lengths), dtype=torch.float64)
        B, W = (part.view(shape) for part, shape in zip(buffer.split(lengths), shapes, strict=True))
        for part in (batch[start : start + size] for start in range(0, len(batch), size)):
            for i, (matrix, local) in enumerate(part):
                B[i].copy_(matrix)
                W[i].copy_(local.tensor)
            measured.append(project_out_(W[: len(part)], B[: len(part)], eps, reduce))
            if write:
                for (_, local), result in zip(part, W, strict=False):
                    local.write(result)
    if not measured:
        return ProjectionReport(0.0, 1.0)
    device = measured[0][0].device  # blocks may be on different devices
    overlap, before, after = (torch.cat([v.to(device) for v in values]) for values in zip(*measured, strict=True))
    norm_before, norm_after = float(before.norm()), float(after.norm())
    return ProjectionReport(float(overlap.max()), norm_after / norm_before if norm_before > 0 else 1.0)


class _LocalShard(NamedTuple):
    """The rows of a weight on this process, (rows, r), and the weight to write them to."""

    tensor: torch.Tensor
    weight: Any
    mesh: Any
    transposed: bool

    @classmethod
    def of(cls, weight: torch.Tensor, transposed: bool) -> _LocalShard:
        if not isinstance(weight, DTensor):
            return cls(_as_columns(weight, transposed), weight, None, transposed)
        # An all-to-all rather than a gather: each process has 1/n of the matrix.
        rows = weight.redistribute(placements=[Shard(1)]) if transposed else weight
        _check_layout(rows, Shard(1 if transposed else 0))
        return cls(_as_columns(rows.to_local(), transposed), weight, weight.device_mesh, transposed)

    def reduce(self) -> Reduce | None:
        if self.mesh is None:
            return None
        group = self.mesh.get_group()

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.contiguous()
            torch.distributed.all_reduce(tensor, group=group)
            return tensor

        return all_reduce

    def write(self, rows: torch.Tensor) -> None:
        rows = rows.mT if self.transposed else rows.view(-1) if self.weight.dim() == 1 else rows
        if self.mesh is None:
            self.weight.copy_(rows)
        elif self.transposed:
            sharded = DTensor.from_local(
                rows.contiguous(), self.mesh, [Shard(1)], shape=self.weight.shape, stride=self.weight.stride()
            )
            self.weight.to_local().copy_(sharded.redistribute(placements=self.weight.placements).to_local())
        else:
            self.weight.to_local().copy_(rows)


def _blocks_at_a_time(batch: list[tuple[torch.Tensor, _LocalShard]]) -> int:
    """The number of blocks to project at a time: on a CPU, as many as fit in `_CPU_BYTES`, otherwise all of them.
    Shards are also projected all at once, to communicate only once."""
    columns, local = batch[0]
    if local.mesh is not None or local.tensor.device.type != "cpu":
        return len(batch)
    block = (columns.numel() + local.tensor.numel()) * torch.float64.itemsize
    return min(len(batch), max(1, _CPU_BYTES // max(1, block)))


def _as_columns(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    if transposed:
        return weight.mT
    return weight.unsqueeze(1) if weight.dim() == 1 else weight


def _local_rows(matrix: torch.Tensor, mesh) -> torch.Tensor:
    if mesh is None:
        if isinstance(matrix, DTensor):
            raise ValueError("LoRA's matrices are sharded, but the steering weights are not. Shard both or neither.")
        return matrix
    if not isinstance(matrix, DTensor) or matrix.device_mesh != mesh:
        raise ValueError("The steering weights and LoRA's matrices must be sharded over the same device mesh.")
    _check_layout(matrix, Shard(0))
    return matrix.to_local()


def _check_layout(tensor: DTensor, wanted: Shard) -> None:
    if tensor.device_mesh.ndim != 1 or tensor.placements[0] != wanted:
        raise ValueError(
            f"Expected a matrix whose rows are sharded over one mesh dimension, as by FSDP2, got {tensor.placements} "
            f"over {tensor.device_mesh.ndim} mesh dimensions, which would have to be gathered. Use FSDP2 with one "
            "mesh dimension."
        )


def _check_finite(matrices: Sequence[torch.Tensor], reduce: Reduce | None) -> None:
    """Checks that matrices are finite. All processes share the result, so that either all or none of them raise."""
    extremes = [value for matrix in matrices if matrix.numel() for value in torch.aminmax(matrix)]
    total = torch.stack([matrices[0].new_zeros(()), *extremes]).double().sum()
    if not torch.isfinite(_sum(total, reduce)):
        raise FloatingPointError(
            "LoRA's matrices have NaN or infinite values, so training has diverged. Use lower learning rates or a "
            "warm-up."
        )


def _norm(W: torch.Tensor, reduce: Reduce | None) -> torch.Tensor:
    norm = torch.linalg.vector_norm(W, dim=(-2, -1))
    return norm if reduce is None else reduce(norm.square()).sqrt()


def _sum(tensor: torch.Tensor, reduce: Reduce | None) -> torch.Tensor:
    return tensor if reduce is None else reduce(tensor)
