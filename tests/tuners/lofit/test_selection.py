"""`top_heads` ranks heads by the norm of what the first phase has trained."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_model
from peft import get_peft_model, inject_adapter_in_model
from steering_cases import adapters_of, steer

from trl_steer import LofitConfig, top_heads


def with_norms(model, norms: dict[tuple[int, int], float]):
    for block, adapter in enumerate(adapters_of(model)):
        for row, head in enumerate(range(4) if adapter.index is None else adapter.index.tolist()):
            adapter.scale.data[row] = torch.tensor([0.0, 0, 0, 0, 0, 0, -3, 4]) / 5 * norms.get((block, head), 0.1)
    return model


def test_heads_come_in_the_order_of_their_norms():
    model = with_norms(steer(tiny_model(), "lofit-scale"), {(2, 1): 3.0, (0, 3): 5.0, (1, 0): 4.0})
    assert top_heads(model, "default", 3) == [(0, 3), (1, 0), (2, 1)]
    assert top_heads(model) == [(0, 3)]  # a tenth of twelve
    assert len(top_heads(model, k=12)) == 12
    second = get_peft_model(tiny_model(), LofitConfig(heads=top_heads(model, k=3)))
    assert second.peft_config["default"].heads == {0: [3], 1: [0], 2: [1]}
    assert second.get_nb_trainable_parameters()[0] == 3 * 8


def test_only_heads_with_parameters_are_ranked():
    model = with_norms(steer(tiny_model(), "lofit-scale", heads={1: [2, 3], 2: [0]}), {})
    assert sorted(top_heads(model, k=3)) == [(1, 2), (1, 3), (2, 0)]
    with pytest.raises(ValueError, match="1 to 3"):
        top_heads(model, k=4)


def test_injected_adapters_are_ranked_too():
    base = tiny_model()
    inject_adapter_in_model(LofitConfig(phase="scale"), base, "mine")
    assert len(top_heads(base, "mine", 5)) == 5


@pytest.mark.parametrize("row", ["lofit", "jola", "vector"])
def test_other_adapter_types_have_no_ranking(row):
    with pytest.raises(ValueError, match="'default' with phase='scale'"):
        top_heads(steer(tiny_model(), row))


@pytest.mark.parametrize("k", [0, -1, 13, 2.5, True])
def test_a_number_of_heads_that_there_is_not_is_refused(k):
    with pytest.raises(ValueError, match="from 1 to 12"):
        top_heads(steer(tiny_model(), "lofit-scale"), k=k)
