"""The projection against a float64 SVD, on matrices of every kind that training can produce."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_in_world
from sharded_projection import project_sharded_and_whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trl_steer.tuners.joint_steering.projection import RANK_TOLERANCE, project_

D = 48
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-10}


def basis(B):
    """The reference: left singular vectors in float64, those below the rank tolerance dropped."""
    U, S, _ = torch.linalg.svd(B.double(), full_matrices=False)
    return U[:, RANK_TOLERANCE * S[0] < S] if S[0] > 0 else U[:, :0]


def overlap(B, W):
    Q, W = basis(B), W.double()
    if not Q.numel() or not W.norm():
        return 0.0
    return float((Q.T @ W).abs().max() / W.norm())


def matrix(kind, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(D, r, generator=generator)
    if kind == "zero":
        return torch.zeros(D, r)
    if kind == "rank 3":
        return torch.randn(D, 3, generator=generator) @ torch.randn(3, r, generator=generator)
    if kind == "duplicate columns":
        return B[:, :1].repeat(1, r)
    if kind == "tiny":
        return B * 1e-8
    if kind == "huge":
        return B * 1e4
    if kind == "ill-conditioned":
        return B * torch.logspace(0, -6, r)
    if kind.endswith("decades"):
        turned = torch.linalg.qr(torch.randn(r, r, generator=generator)).Q
        return torch.linalg.qr(B).Q * torch.logspace(0, -float(kind.split()[0]), r) @ turned
    return B


KINDS = ["ordinary", "zero", "rank 3", "duplicate columns", "tiny", "huge", "ill-conditioned"]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("r", [1, 8, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_projection_removes_the_column_space_and_nothing_else(kind, r, dtype):
    B, W = matrix(kind, r), torch.randn(D, 4).to(dtype)
    Q, before = basis(B), W.double()

    project_([([B], W)])

    assert overlap(B, W) <= BOUNDS[dtype]
    expected = before - Q @ (Q.T @ before)
    assert (W.double() - expected).norm() <= BOUNDS[dtype] * before.norm()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_remainder_of_an_update_inside_the_column_space_is_orthogonal_too(kind, dtype):
    B = matrix(kind, 8)
    W = (B.double() @ torch.randn(8, 4).double()).to(dtype)
    project_([([B], W)])
    assert overlap(B, W) <= BOUNDS[dtype]


@pytest.mark.parametrize("inside", [False, True], ids=["anywhere", "inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decades", [6.9, 7.4])
def test_singular_values_around_the_rank_tolerance_are_told_apart(decades, dtype, inside):
    r = 40
    left, right = (torch.linalg.qr(torch.randn(n, r).double()).Q for n in (D, r))
    B = left * torch.logspace(0, -decades, r, dtype=torch.float64) @ right.T
    W = (B @ torch.randn(r, 4).double() if inside else torch.randn(D, 4)).to(dtype)
    project_([([B], W)])
    assert overlap(B, W) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "2 decades", "3.9 decades"])
def test_projecting_again_changes_no_bit(kind, dtype):
    B, W = matrix(kind, 8), torch.randn(D, 4).to(dtype)
    project_([([B], W)])
    once = W.clone()
    report = project_([([B], W)])
    assert torch.equal(W, once)
    assert report.max_overlap <= max(torch.finfo(dtype).eps, 1e-13)  # float64 cannot look more closely
    assert report.kept_norm == 1.0


def test_zero_b_leaves_the_update_bit_for_bit():
    W = torch.randn(D, 4)
    before = W.clone()
    report = project_([([torch.zeros(D, 8)], W)])
    assert torch.equal(W, before)
    assert report == (0.0, 1.0)


@settings(max_examples=150, deadline=None)
@given(
    r=st.integers(1, 12),
    rank=st.integers(0, 12),
    decades=st.floats(0, 6),
    scale=st.floats(-8, 6),
    seed=st.integers(0, 2**16),
)
def test_projection_agrees_with_a_float64_svd_on_any_matrix(r, rank, decades, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, r)
    left = torch.randn(D, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, r, generator=generator, dtype=torch.float64)
    B = left * torch.logspace(0, -decades, rank, dtype=torch.float64) @ right * 10**scale
    W = torch.randn(D, 3, generator=generator)
    Q, before = basis(B), W.double()
    project_([([B], W)])
    assert overlap(B, W) <= 1e-5
    assert (W.double() - (before - Q @ (Q.T @ before))).norm() <= 1e-5 * before.norm()


def test_blocks_of_different_shapes_are_projected_each_with_its_own_matrix():
    ranks = [(8, 4), (8, 4), (2, 4)]
    pairs = [([matrix("ordinary", r, seed)], torch.randn(D, s)) for seed, (r, s) in enumerate(ranks)]
    pairs.append(([torch.randn(20, 3)], torch.randn(20, 1)))
    project_(pairs)
    for (B,), W in pairs:
        assert overlap(B, W) <= 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matrices_of_a_diverged_run_are_refused_and_nothing_is_written(value):
    pairs = [([torch.randn(d, 4)], torch.randn(d, 2)) for d in (D, 2 * D, 3 * D)]
    before = [W.clone() for _, W in pairs]
    pairs[1][0][0][3, 1] = value
    with pytest.raises(FloatingPointError, match="diverged"):
        project_(pairs)
    for (_, W), unchanged in zip(pairs, before, strict=True):
        assert torch.equal(W, unchanged)


def test_blocks_too_many_for_a_cpu_cache_are_each_projected():
    d = 8192
    pairs = [([torch.randn(d, 2)], torch.randn(d, 8)) for _ in range(5)]
    expected = [
        W - torch.linalg.qr(B.double())[0].float() @ (torch.linalg.qr(B.double())[0].T @ W.double()).float()
        for (B,), W in pairs
    ]
    assert project_(pairs).kept_norm < 1
    for (_, W), projected in zip(pairs, expected, strict=True):
        torch.testing.assert_close(W, projected, atol=1e-5, rtol=0)


def test_several_matrices_of_a_block_are_removed_together():
    first, second, W = torch.randn(D, 3), torch.randn(D, 5), torch.randn(D, 4)
    project_([([first, second], W)])
    assert overlap(torch.cat([first, second], dim=1), W) <= 1e-5


def test_a_vector_counts_as_one_column():
    B, v = torch.randn(D, 8), torch.randn(D)
    project_([([B], v)])
    assert v.shape == (D,)
    assert overlap(B, v[:, None]) <= 1e-5


def test_the_transposed_form_projects_from_the_right():
    B, W = torch.randn(D, 8), torch.randn(4, D)
    expected = W.double() @ (torch.eye(D, dtype=torch.float64) - basis(B) @ basis(B).T)
    project_([([B], W)], transposed=True)
    torch.testing.assert_close(W.double(), expected, atol=1e-5, rtol=0)


def test_projection_reports_the_overlap_before_and_the_norm_left():
    B = torch.eye(D)[:, :1]
    W = torch.zeros(D, 1)
    W[0], W[1] = 3.0, 4.0
    report = project_([([B], W)])
    assert report.max_overlap == pytest.approx(0.6)
    assert report.kept_norm == pytest.approx(0.8)


def test_rows_sharded_over_two_processes_give_the_same_projection(tmp_path):
    run_in_world(project_sharded_and_whole, 2, tmp_path)
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    assert len(results) == 4
    for sharded, whole, report, whole_report in results.values():
        torch.testing.assert_close(sharded, whole, atol=1e-7, rtol=0)
        assert report == pytest.approx(whole_report, rel=1e-6)


def test_matrices_of_which_only_one_is_sharded_are_refused(unused_tcp_port):
    address = f"tcp://127.0.0.1:{unused_tcp_port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(torch.randn(D, 8), mesh, [Shard(0)])
        with pytest.raises(ValueError, match="Shard both or neither"):
            project_([([sharded], torch.randn(D, 4))])
        with pytest.raises(ValueError, match="same device mesh"):
            project_([([torch.randn(D, 8)], sharded)])
        columns = distribute_tensor(torch.randn(D, 8), mesh, [Shard(1)])
        with pytest.raises(ValueError, match="whose rows are sharded"):
            project_([([columns], sharded)])
    finally:
        torch.distributed.destroy_process_group()
