"""The error of the best linear map equals that of least squares, and lies between the bounds."""

import numpy as np
import pytest
from analysis_cases import BATCHINGS, EVERY_FAMILY, TEXTS, adapted_model, batches, double_model, sublayer_outputs

from trl_steer.analysis import theorem_3_1


def direct_error(R, F, H):
    """`min_S ||R F - S H|| / ||R F||` by least squares, for columns of tokens."""
    target = R @ F
    S = np.linalg.lstsq(H.T, target.T, rcond=None)[0].T
    return np.linalg.norm(target - S @ H) / np.linalg.norm(target)


def direct_bounds(R, F, H):
    V_F, V_H = (np.linalg.svd(X, full_matrices=False)[2].T for X in (F, H))
    sines = 1 - np.clip(np.linalg.svd(V_F.T @ V_H, compute_uv=False), 0, 1) ** 2
    s2 = np.linalg.svd(R @ F, compute_uv=False) ** 2
    return [np.sqrt((s2 * order).sum() / s2.sum()) for order in (sines, sines[::-1])]


@pytest.mark.parametrize("name", BATCHINGS)
def test_error_is_that_of_least_squares(name):
    direct = sublayer_outputs(double_model())
    for row in theorem_3_1(double_model(), batches(name)):
        F, H = direct["mlp"][row["block"]].T, direct["output"][row["block"]].T
        assert row["error"] == pytest.approx(direct_error(np.eye(32), F, H), abs=1e-6)
        assert [row["lower"], row["upper"]] == pytest.approx(direct_bounds(np.eye(32), F, H), abs=1e-6)
        assert row["lower"] <= row["error"] <= row["upper"]
        assert len(row["angles"]) == 32
        assert row["angles"] == sorted(row["angles"])


def test_steering_of_the_mlp_is_the_map_to_replace():
    model = adapted_model("post_mlp-low_rank", scaling=0.3)
    direct = sublayer_outputs(double_model())
    for row in theorem_3_1(model, batches()):
        block = model.get_base_model().model.layers[row["block"]]
        (leaf,) = block.sublayer_steering.adapters.values()
        R = 0.3 * (leaf.up @ leaf.down).detach().numpy()
        F, H = direct["mlp"][row["block"]].T, direct["output"][row["block"]].T
        assert row["error"] == pytest.approx(direct_error(R, F, H), abs=1e-6)
        assert row["lower"] <= row["error"] <= row["upper"]


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_bounds_hold_for_every_family(family):
    for row in theorem_3_1(double_model(family), batches("left"), blocks=[0, 2]):
        assert 0 <= row["lower"] <= row["error"] <= row["upper"] <= 1 + 1e-9


def test_few_tokens_and_nonlinear_steering_are_errors():
    with pytest.raises(ValueError, match=r"There are 17 tokens of prompts, expected more than the hidden size 32"):
        theorem_3_1(double_model(), batches()[:1])
    with pytest.raises(ValueError, match="activation"):
        theorem_3_1(adapted_model("post_mlp-silu"), batches())
    assert sum(map(len, TEXTS)) > 32
