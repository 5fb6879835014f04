r"""The orthogonality constraint: steering learns outside of the column space of LoRA's output matrix.

For each block, with `B` (d, r_lora) LoRA's output matrix of the module that writes into the residual stream and `Q` an
orthonormal basis of its column space, `W_up <- (I - Q Q^T) W_up` (arXiv 2603.00425, section 5.2).

No d x d matrix is formed. With `G = B^T B = V L V^T`, `Q = B V L^{-1/2}` is never formed either:
`Q^T W = L^{-1/2} V^T (B^T W)`. All of this is in float64, and is repeated until what is left of `W` is orthogonal
relative to its own size, because rounding cannot have left more or because a look says so. Squaring `B` loses half of
the digits, so small singular values are found in a second round, in what the first one leaves of `B`. Where the rows
of `B` and `W` are sharded (FSDP2), only r x r sums cross the wire.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard

# Singular values of B below this fraction of the largest are no directions of its column space, only rounding.
RANK_TOLERANCE = 1e-7
# Above this fraction of the largest, the Gram matrix of B gives them, and their directions, to eight digits.
_SURE = 1e-4
_FLOAT64_EPS = torch.finfo(torch.float64).eps
# Two do; float64 would go on for ever.
_MAX_PASSES = 4
# Float64 bytes that a CPU works on at a time; `eval/benchmarks/projection.py` says why.
_CPU_BYTES = 2**24

Reduce = Callable[[torch.Tensor], torch.Tensor]


class ProjectionReport(NamedTuple):
    """What a projection did.

    Attributes:
        max_overlap (`float`): Largest `max |Q^T W| / ||W||` over the blocks, before projecting.
        kept_norm (`float`): Norm of all `W` together after projecting, as a share of that before. 1 if all were zero.
    """

    max_overlap: float
    kept_norm: float


def project_out_(
    W: torch.Tensor, B: torch.Tensor, eps: float, reduce: Reduce | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`W <- (I - Q Q^T) W` in place, with `Q` an orthonormal basis of the column space of `B`.

    Singular values of `B` up to `RANK_TOLERANCE` times the largest do not count, so `B = 0` removes nothing. A `W`
    that is already orthogonal to rounding is left as it is: projecting again changes no bit.

    Args:
        W (`torch.Tensor`): (blocks, d, r), float64; with `reduce`, the local rows of it.
        B (`torch.Tensor`): (blocks, d, s), likewise.
        eps (`float`): Rounding of the dtype that the result will be stored in, `torch.finfo(dtype).eps`.
        reduce (`Callable`, *optional*): Sums a tensor over the processes that hold the other rows.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`:
            Each (blocks,): `max |Q^T W| / ||W||` as it was before, and `||W||` before and after.
    """
    B, to_basis, condition = _basis(B, reduce)
    # What may be left of `Q^T W`, relative to `W`: products and sums over the rows err, and `Q` is not orthonormal.
    rounding = 1024 * _FLOAT64_EPS * condition.square()
    coefficients, overlap, before = _overlap(W, B, to_basis, reduce)
    # What is less cannot be told from what looking errs by, which in float64 is more than what storing does.
    to_remove = overlap > (4 * _FLOAT64_EPS * torch.where(condition.isfinite(), condition, 1.0)).clamp(min=eps)
    left, after = overlap * to_remove, before
    for _ in range(_MAX_PASSES):
        if (left <= eps / 64).all():
            break
        removed = coefficients * to_remove[:, None, None]
        W.baddbmm_(B, to_basis @ removed, alpha=-1)
        norm, after = after, (after.square() - removed.square().sum((-2, -1))).clamp(min=0).sqrt()
        if (rounding * norm <= eps / 64 * after).all():
            break  # that is all that can be left; no need to look
        coefficients, left, after = _overlap(W, B, to_basis, reduce)
        left = left * to_remove
    return overlap, before, after


def _overlap(W: torch.Tensor, B: torch.Tensor, to_basis: torch.Tensor, reduce: Reduce | None):
    """`Q^T W`, per block its largest entry relative to the norm of `W`, and that norm."""
    norm = _norm(W, reduce)
    coefficients = to_basis.mT @ _sum(B.mT @ W, reduce)
    return coefficients, coefficients.abs().amax((-2, -1)) / torch.where(norm > 0, norm, 1.0), norm


def _basis(B: torch.Tensor, reduce: Reduce | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`Q` in two factors, (blocks, d, n) and (blocks, n, n), the first of which is `B` itself if that will do.

    Where a singular value does not count, `Q` has a column of zeros. Third, (blocks,), the condition number of `B` if
    it is the first factor, else infinity.
    """
    gram = _sum(B.mT @ B, reduce)
    eigenvalues, vectors = torch.linalg.eigh(gram)
    largest = eigenvalues[..., -1:]
    sure = (eigenvalues > _SURE**2 * largest) & (largest > 0)
    to_basis = _whitening(eigenvalues, vectors, sure)
    if (sure | (largest <= 0)).all():
        return B, to_basis, (largest.squeeze(-1) / torch.where(sure, eigenvalues, torch.inf).amin(-1)).sqrt()
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
    """Projects many matrices in place, those of equal shape in one batch.

    Args:
        pairs (`Sequence`):
            For each block the matrices `B` (d, r_lora), whose column spaces together are removed, and `W` (d, r).
            A vector (d,) counts as one column. Plain tensors, or `DTensor`s sharded by rows over one mesh dimension.
        transposed (`bool`, defaults to `False`): `W` is (r, d), and is multiplied from the right instead.
        write (`bool`, defaults to `True`): `False` leaves the matrices alone, and says what projecting would do.

    Raises:
        ValueError: A `DTensor` is laid out in a way that would need gathering.
        FloatingPointError: A `B` holds NaN or infinite values.
    """
    batches: dict[tuple, list[tuple[torch.Tensor, _Local]]] = defaultdict(list)
    for matrices, weight in pairs:
        local = _Local.of(weight, transposed)
        parts = [_local_rows(matrix, local.mesh) for matrix in matrices]
        columns = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        batches[(columns.shape, local.tensor.shape, local.tensor.dtype, columns.device)].append((columns, local))
    for whole in batches.values():  # all of them before the first is written
        _check_finite([columns for columns, _ in whole], whole[0][1].reduce())
    measured = []
    for whole in batches.values():
        (columns, first), size = whole[0], _blocks_at_a_time(whole)
        reduce, eps = first.reduce(), torch.finfo(first.tensor.dtype).eps
        shapes = [(size, *columns.shape), (size, *first.tensor.shape)]
        lengths = [math.prod(shape) for shape in shapes]
        buffer = columns.new_empty(sum(lengths), dtype=torch.float64)
        B, W = (part.view(shape) for part, shape in zip(buffer.split(lengths), shapes, strict=True))
        for part in (whole[start : start + size] for start in range(0, len(whole), size)):
            for i, (matrix, local) in enumerate(part):
                B[i].copy_(matrix)
                W[i].copy_(local.tensor)
            measured.append(project_out_(W[: len(part)], B[: len(part)], eps, reduce))
            if write:
                for (_, local), result in zip(part, W, strict=False):
                    local.write(result)
    if not measured:
        return ProjectionReport(0.0, 1.0)
    device = measured[0][0].device  # blocks may be spread over several
    overlap, before, after = (torch.cat([v.to(device) for v in values]) for values in zip(*measured, strict=True))
    norm_before, norm_after = float(before.norm()), float(after.norm())
    return ProjectionReport(float(overlap.max()), norm_after / norm_before if norm_before > 0 else 1.0)


class _Local(NamedTuple):
    """The rows of a weight that this process holds, as (rows, r), and the way back."""

    tensor: torch.Tensor
    weight: Any
    mesh: Any
    transposed: bool

    @classmethod
    def of(cls, weight: torch.Tensor, transposed: bool) -> _Local:
        if not isinstance(weight, DTensor):
            return cls(_as_columns(weight, transposed), weight, None, transposed)
        # An all-to-all, not a gather: each process keeps 1/n of the matrix.
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


def _blocks_at_a_time(batch: list[tuple[torch.Tensor, _Local]]) -> int:
    """All, but on a CPU no more than `_CPU_BYTES`. With several processes, one sum serves all blocks."""
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
            raise ValueError("LoRA's matrices are sharded but the steering factors are not; shard both or neither.")
        return matrix
    if not isinstance(matrix, DTensor) or matrix.device_mesh != mesh:
        raise ValueError("The steering factors and LoRA's matrices must be sharded over the same device mesh.")
    _check_layout(matrix, Shard(0))
    return matrix.to_local()


def _check_layout(tensor: DTensor, wanted: Shard) -> None:
    if tensor.device_mesh.ndim != 1 or tensor.placements[0] != wanted:
        raise ValueError(
            f"Cannot project a matrix laid out as {tensor.placements} over a mesh of {tensor.device_mesh.ndim} "
            "dimensions without gathering it; FSDP2 over one mesh dimension (rows sharded) is supported."
        )


def _check_finite(matrices: Sequence[torch.Tensor], reduce: Reduce | None) -> None:
    """By a sum of their extremes, which all processes share, so that none is left waiting for one that has raised."""
    extremes = [value for matrix in matrices if matrix.numel() for value in torch.aminmax(matrix)]
    total = torch.stack([matrices[0].new_zeros(()), *extremes]).double().sum()
    if not torch.isfinite(_sum(total, reduce)):
        raise FloatingPointError(
            "LoRA's matrices hold NaN or infinite values: training has diverged. Lower the learning rates, or add a "
            "warm-up."
        )


def _norm(W: torch.Tensor, reduce: Reduce | None) -> torch.Tensor:
    norm = torch.linalg.vector_norm(W, dim=(-2, -1))
    return norm if reduce is None else reduce(norm.square()).sqrt()


def _sum(tensor: torch.Tensor, reduce: Reduce | None) -> torch.Tensor:
    return tensor if reduce is None else reduce(tensor)
