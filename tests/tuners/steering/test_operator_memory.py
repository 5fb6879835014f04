"""What the low-rank operator keeps for the backward pass."""

import pytest
import torch
from operator_cases import ACTIVATIONS, SCALING, D, R, both_forms, tensors
from torch.autograd.graph import saved_tensors_hooks

from trl_steer.tuners.steering.ops.low_rank import low_rank_update
from trl_steer.tuners.steering.ops.switch import steering_operator

pytestmark = pytest.mark.usefixtures("default_operator")


def kept_by_autograd(form, inputs, needs_grad=(True, True, True), **kwargs):
    """The output, and what autograd keeps of it and of the inputs."""
    leaves = [t.clone().requires_grad_(needed) for t, needed in zip(inputs, needs_grad, strict=True)]
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), steering_operator(form):
        output = low_rank_update(*leaves, SCALING, **kwargs)
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves[1:]}
    return output, leaves[0], [t for t in saved if t.untyped_storage().data_ptr() not in own]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_memory_efficient_form_keeps_its_output_and_the_bottleneck_only(dtype, factors, activation, dropout):
    inputs = tensors(2, 50, D, dtype=dtype, factors=factors)
    output, h, saved = kept_by_autograd(
        "memory_efficient", inputs, activation=ACTIVATIONS[activation], dropout=dropout
    )
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    wide = {pointer for pointer, size in storages.items() if size >= h.untyped_storage().nbytes()}
    assert wide == {output.untyped_storage().data_ptr()}
    bottleneck = 2 * 50 * R * torch.promote_types(dtype, factors).itemsize
    masks = 1 if dropout else 0
    assert sum(storages.values()) == output.nbytes + (1 + masks) * bottleneck


def test_plain_form_keeps_the_hidden_state():
    """What the other form is there to avoid; should this fail, it has become pointless."""
    output, h, saved = kept_by_autograd("plain", tensors(2, 50, D))
    storages = {t.untyped_storage().data_ptr() for t in saved}
    assert h.untyped_storage().data_ptr() in storages
    assert output.untyped_storage().data_ptr() not in storages


def test_nothing_wide_is_kept_where_down_is_frozen():
    _, h, saved = kept_by_autograd("memory_efficient", tensors(2, 50, D), needs_grad=(True, False, True))
    assert all(t.untyped_storage().nbytes() < h.untyped_storage().nbytes() for t in saved)


@both_forms
def test_nothing_is_kept_without_gradients(form):
    with torch.no_grad():
        output, _, saved = kept_by_autograd(form, tensors(2, 50, D))
    assert saved == []
    assert not output.requires_grad


def test_writing_into_the_output_is_an_error_and_never_a_wrong_gradient():
    leaves = [t.requires_grad_() for t in tensors(2, 5, D)]
    output = low_rank_update(*leaves, SCALING)
    with pytest.raises(RuntimeError, match=r"modified inplace|modified by an inplace operation"):  # noqa: PT012
        output.mul_(2)
        output.sum().backward()
    with steering_operator("plain"):
        low_rank_update(*leaves, SCALING).mul_(2).sum().backward()
