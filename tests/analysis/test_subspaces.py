"""The alignment of subspaces equals one that is computed from all tokens at once."""

import numpy as np
import pytest
import torch
from analysis_cases import BATCHINGS, adapted_model, batches, double_model, sublayer_outputs
from tuner_cases import FOUR_FAMILIES

from trl_steer.analysis import subspace_alignment


def tuned_model():
    model = double_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("target", ["output", "shift"])
@pytest.mark.parametrize("name", BATCHINGS)
def test_inner_products_are_those_of_singular_vectors_over_all_tokens(name, target):
    base, tuned = double_model(), tuned_model()
    before, after = sublayer_outputs(base), sublayer_outputs(tuned)
    rows = subspace_alignment(base, tuned, batches(name), k=5, target=target)
    assert [row["block"] for row in rows] == [0, 1, 2]
    for row in rows:
        H, F, Y = before["output"][row["block"]].T, before["mlp"][row["block"]].T, after["output"][row["block"]].T
        Y = Y - H if target == "shift" else Y
        left = [np.linalg.svd(Y @ X.T)[0][:, :5] for X in (F, H)]
        inner = np.abs(left[0].T @ left[1])
        np.testing.assert_allclose(row["inner_products"], inner, atol=1e-6)
        assert row["diagonal"] == pytest.approx(np.diag(inner).mean(), abs=1e-6)
        assert row["overlap"] == pytest.approx((inner**2).sum() / 5, abs=1e-6)
        assert row["chance"] == 5 / 32


@pytest.mark.parametrize("family", FOUR_FAMILIES)
def test_an_adapter_is_compared_with_its_own_base(family):
    model = adapted_model("low_rank", family)
    first, second = (subspace_alignment(None, model, batches(name), [1], k=4) for name in ("left", "reordered"))
    assert first[0]["overlap"] == pytest.approx(second[0]["overlap"], abs=1e-6)


def test_more_vectors_than_the_rank_are_as_many_as_the_rank():
    (row,) = subspace_alignment(double_model(), tuned_model(), batches("reordered"), [0], k=50)
    assert row["k"] == 32
    assert row["overlap"] == pytest.approx(1, abs=1e-6)


def test_invalid_arguments_and_equal_models_are_errors():
    model = double_model()
    with pytest.raises(ValueError, match="the two models have the same states"):
        subspace_alignment(model, model, batches(), target="shift")
    with pytest.raises(ValueError, match="Expected k >= 1 and target one of"):
        subspace_alignment(model, model, batches(), target="other")
    with pytest.raises(ValueError, match="no prompts"):
        subspace_alignment(model, model, [])
