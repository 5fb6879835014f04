"""The share of the MLP equals a direct computation."""

import numpy as np
import pytest
from analysis_cases import BATCHINGS, EVERY_FAMILY, batches, double_model, sublayer_outputs

from trl_steer.analysis import mlp_share


@pytest.mark.parametrize("name", BATCHINGS)
def test_share_is_the_mean_of_ratios_of_norms(name):
    model = double_model()
    direct = sublayer_outputs(model)
    rows = mlp_share(model, batches(name))
    for block, row in enumerate(rows):
        mlp, attention, output = (
            np.linalg.norm(direct[part][block], axis=1) for part in ("mlp", "attention", "output")
        )
        assert row["block"] == block
        assert row["of_sublayers"] == pytest.approx((mlp / (mlp + attention)).mean(), abs=1e-10)
        assert row["of_output"] == pytest.approx((mlp / output).mean(), abs=1e-10)
        assert row["output"] == pytest.approx(output.mean(), abs=1e-10)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_every_family_has_a_share_that_no_batching_changes(family):
    model = double_model(family)
    first, second = (mlp_share(model, batches(name)) for name in ("left", "reordered"))
    for row, other in zip(first, second, strict=True):
        assert row == pytest.approx(other, abs=1e-10)
        assert 0 < row["of_sublayers"] < 1


def test_a_model_of_one_block_has_one_row():
    assert len(mlp_share(double_model(num_hidden_layers=1), batches())) == 1


def test_no_batches_are_an_error():
    with pytest.raises(ValueError, match="no prompts"):
        mlp_share(double_model(), [])
