"""The projection of matrices whose rows two processes share, beside that of the whole matrices."""

from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trl_steer.tuners.joint_steering.projection import project_

# 47 rows do not divide by two: one process holds one row more.
ROWS = 47
CASES = {
    "output": (False, (ROWS, 4), 0),
    "input": (True, (4, ROWS), 0),
    "vector": (False, (ROWS,), 0),
    "ill-conditioned": (False, (ROWS, 4), 6),
}


def project_sharded_and_whole(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for name, (transposed, shape, decades) in CASES.items():
        torch.manual_seed(0)
        B, W = torch.randn(ROWS, 8) * torch.logspace(0, -decades, 8), torch.randn(shape)
        sharded = distribute_tensor(W.clone(), mesh, [Shard(0)])
        report = project_([([distribute_tensor(B, mesh, [Shard(0)])], sharded)], transposed=transposed)
        whole_report = project_([([B], W)], transposed=transposed)
        results[name] = (sharded.full_tensor(), W, report, whole_report)
    if rank == 0:
        torch.save(results, folder / "results.pt")
