"""The low-rank operator: both forms against float64 references and against each other."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import ACTIVATIONS, FORMS, SCALING, D, both_forms, error, reference, run, tensors
from torch.autograd import gradcheck, gradgradcheck

from trl_steer.tuners.steering.ops.low_rank import low_rank_update
from trl_steer.tuners.steering.ops.switch import steering_operator

pytestmark = pytest.mark.usefixtures("default_operator")


# Gradients


@both_forms
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients_match_finite_differences(form, activation, dropout, with_residual):
    inputs = [t.requires_grad_() for t in tensors(2, 3, 6, dtype=torch.float64)]
    if with_residual:
        inputs.append(torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True))

    def update(h, down, up, residual=None):
        torch.manual_seed(7)
        return low_rank_update(h, down, up, SCALING, ACTIVATIONS[activation], dropout, residual)

    with steering_operator(form):
        assert gradcheck(update, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_plain_form_can_be_differentiated_twice(activation):
    inputs = [t.requires_grad_() for t in tensors(4, 6, dtype=torch.float64)]
    with steering_operator("plain"):
        assert gradgradcheck(lambda h, d, u: low_rank_update(h, d, u, SCALING, ACTIVATIONS[activation]), inputs)


def test_memory_efficient_form_refuses_to_be_differentiated_twice():
    h, down, up = (t.requires_grad_() for t in tensors(4, D))
    output = low_rank_update(h, down, up, SCALING)
    (grad,) = torch.autograd.grad(output.square().sum(), down, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("needs_grad", [flags for flags in product([False, True], repeat=3) if any(flags)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_frozen_inputs_get_no_gradient_and_change_no_other(needs_grad, activation):
    inputs = tensors(2, 5, D)
    _, everything = run("plain", inputs, activation=ACTIVATIONS[activation])
    for form in FORMS:
        _, grads = run(form, inputs, needs_grad, activation=ACTIVATIONS[activation])
        for grad, needed, expected in zip(grads, needs_grad, everything, strict=True):
            assert (grad is not None) == needed
            if needed:
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


# Values, and the two forms against each other


@both_forms
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_is_the_formula(form, activation):
    inputs = tensors(2, 5, D)
    output, _ = run(form, inputs, activation=ACTIVATIONS[activation])
    assert error(output, reference(*inputs, activation=ACTIVATIONS[activation])) <= 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("dtype", "factors", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float64, torch.float32, 1e-7),
        # rounding is 2**-9 in bfloat16 and 2**-12 in float16; a gradient gathers a few, that of `down` most
        (torch.bfloat16, torch.bfloat16, 2**-7),
        (torch.bfloat16, torch.float32, 2**-7),
        (torch.float16, torch.float16, 2**-9),
        (torch.float16, torch.float32, 2**-9),
        (torch.float32, torch.bfloat16, 2**-7),
    ],
    ids=str,
)
def test_both_forms_agree(dtype, factors, tolerance, activation, dropout):
    inputs = tensors(3, 40, D, dtype=dtype, factors=factors)
    kwargs = {"activation": ACTIVATIONS[activation], "dropout": dropout}
    plain, plain_grads = run("plain", inputs, **kwargs)
    output, grads = run("memory_efficient", inputs, **kwargs)
    assert torch.equal(output, plain)
    assert output.dtype == dtype
    for grad, expected, tensor in zip(grads, plain_grads, inputs, strict=True):
        assert grad.dtype == tensor.dtype
        assert error(grad, expected) <= tolerance


@both_forms
@settings(max_examples=60, deadline=None)
@given(
    lead=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    d=st.integers(1, 9),
    r=st.integers(1, 5),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_layout(form, lead, d, r, layout, seed):
    """One to four dimensions, no tokens at all, and tensors that are views of others."""
    h, down, up = tensors(*lead, d, r=r, seed=seed)
    if layout == "transposed":
        h = h.mT.contiguous().mT if h.dim() > 1 else h
    elif layout == "strided":
        h = torch.stack([h, h + 1], -1)[..., 1]
    elif layout == "expanded":
        h = h[..., :1].expand(*lead, d)
    leaves = [h.detach().requires_grad_(), down.requires_grad_(), up.requires_grad_()]
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    grad_output = torch.randn(*lead, d)
    with steering_operator(form):
        output = low_rank_update(*leaves, SCALING, F.silu)
    output.backward(grad_output)
    exact = reference(*exact_leaves, activation=F.silu)
    exact.backward(grad_output.double())
    assert output.shape == h.shape
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
    for leaf, expected in zip(leaves, exact_leaves, strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("factors", [None, torch.float32], ids=["same dtype", "float32 factors"])
@pytest.mark.parametrize("grad", [False, True])
def test_zero_up_is_the_identity_bit_for_bit(form, dtype, factors, grad):
    h, down, up = tensors(2, 37, D, dtype=dtype, factors=factors)
    h[0, 0] *= 1000  # outlier tokens, as real models have
    with torch.set_grad_enabled(grad):
        output, _ = run(form, [h, down, torch.zeros_like(up)], (grad,) * 3)
    assert torch.equal(output, h)


# A decoded token is computed in other calls than a prompt.
any_length = pytest.mark.parametrize("length", [1, 5, 4096 // D, 4096 // D + 1, 500])


@any_length
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(
    ("dtype", "factors", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float64, torch.float32, 1e-14),
        (torch.bfloat16, torch.bfloat16, 2**-7),
        (torch.bfloat16, torch.float32, 2**-7),
        (torch.float32, torch.bfloat16, 2**-7),
    ],
    ids=str,
)
def test_without_gradients_few_and_many_tokens_are_the_formula(
    length, autocast, with_residual, dtype, factors, tolerance
):
    inputs = tensors(1, length, D, dtype=dtype, factors=factors)
    residual = torch.full_like(inputs[0], 0.5) if with_residual else None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = low_rank_update(*inputs, SCALING, residual=residual)
    assert output.dtype == dtype
    assert output.shape == inputs[0].shape
    assert error(output, reference(*inputs, residual=residual)) <= (2**-7 if autocast else tolerance)


@both_forms
@any_length
def test_inputs_are_neither_returned_nor_written_to(form, length):
    inputs = tensors(1, length, D)
    before = [t.clone() for t in inputs]
    with torch.no_grad(), steering_operator(form):
        output = low_rank_update(*inputs, 0.0)
    assert output.untyped_storage().data_ptr() != inputs[0].untyped_storage().data_ptr()
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))


@both_forms
def test_several_adapters_add_their_updates_to_the_same_hidden_state(form):
    h, down, up = tensors(2, 5, D)
    _, other_down, other_up = tensors(2, 5, D, r=7, seed=1)
    leaves = [t.requires_grad_() for t in (h, down, up, other_down, other_up)]
    with steering_operator(form):
        first = low_rank_update(h, down, up, SCALING, F.silu)
        output = low_rank_update(h, other_down, other_up, -0.3, None, 0.0, first)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact_h, exact_down, exact_up, exact_other_down, exact_other_up = exact_leaves
    exact = reference(exact_h, exact_down, exact_up, activation=F.silu)
    exact = reference(exact_h, exact_other_down, exact_other_up, scaling=-0.3, residual=exact)
    torch.testing.assert_close(output.double(), exact, rtol=1e-5, atol=1e-5)
    output.square().sum().backward()
    exact.square().sum().backward()
    for leaf, expected in zip(leaves, exact_leaves, strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [0.01, 0.3, 1.0])
def test_bfloat16_gradient_of_down_is_as_good_as_plain_within_3x(size):
    """While the update is no larger than `h`, which is recovered from the output by subtraction."""
    h, down, up = tensors(512, 64, r=8, dtype=torch.bfloat16)
    unit = reference(h, down, up, scaling=1.0) - h.double()
    up = (up * (size / SCALING * h.double().norm() / unit.norm()).item()).bfloat16()
    grad_output = torch.randn(512, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact_leaves = [t.double().requires_grad_() for t in (h, down, up)]
    reference(*exact_leaves).backward(grad_output.double())
    exact = exact_leaves[1].grad
    plain, ours = (error(run(form, [h, down, up], grad_output=grad_output)[1][1], exact) for form in reversed(FORMS))
    assert ours <= 3 * plain


# Autocast


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_computes_in_its_dtype_and_keeps_that_of_the_hidden_state(form, dtype):
    inputs = tensors(2, 40, D, dtype=dtype, factors=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, grads = run(form, inputs)
    assert output.dtype == dtype
    assert [grad.dtype for grad in grads] == [t.dtype for t in inputs]
    rounded = [inputs[0], *(t.bfloat16() for t in inputs[1:])]
    assert 0 < error(output, reference(*inputs)) <= 2**-7
    assert error(output, reference(*rounded)) <= 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_forms_agree_under_autocast(dtype):
    inputs = tensors(2, 40, D, dtype=dtype, factors=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (plain, plain_grads), (output, grads) = (run(form, inputs, activation=F.silu) for form in reversed(FORMS))
    assert torch.equal(output, plain)
    assert all(error(grad, expected) <= 2**-7 for grad, expected in zip(grads, plain_grads, strict=True))


def test_backward_of_memory_efficient_form_rounds_no_more_under_autocast_than_outside():
    """It recovers `h` from a difference of products, where rounding would tell."""
    leaves = [t.requires_grad_() for t in tensors(6, D)]
    grads = []
    for enabled in (False, True):
        output = low_rank_update(*leaves, SCALING)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            grads.append(torch.autograd.grad(output, leaves, torch.ones_like(output)))
    assert all(torch.equal(outside, inside) for outside, inside in zip(*grads, strict=True))


# float16, where large scalings overflow first


@pytest.mark.parametrize("factors", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float16_decoding_agrees_with_prefill_at_a_scaling_of_100(activation, factors):
    h, down, up = tensors(1, 128, D, dtype=torch.float16, factors=factors)
    down = down * 300  # the scaling times the bottleneck is beyond float16, their product with `up` is not
    up = up / 1000
    with torch.no_grad():
        prefill = low_rank_update(h, down, up, 100.0, ACTIVATIONS[activation])
        tokens = [low_rank_update(h[:, i : i + 1], down, up, 100.0, ACTIVATIONS[activation]) for i in range(128)]
    exact = reference(h, down, up, 100.0, ACTIVATIONS[activation])
    assert exact.abs().max() < torch.finfo(torch.float16).max
    assert torch.cat(tokens, dim=1).isfinite().all()
    torch.testing.assert_close(torch.cat(tokens, dim=1), prefill, rtol=2**-9, atol=2**-9)
    assert error(prefill, exact) <= 2**-7


@settings(max_examples=80, deadline=None)
@given(
    size=st.floats(-2, 4),
    grad=st.floats(-4, 4),
    scaling=st.sampled_from([0.1, 1.0, 30.0, 100.0]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 1000),
)
def test_float16_gradient_of_down_is_finite_where_plain_ones_is(size, grad, scaling, activation, seed):
    h, down, up = tensors(32, D, dtype=torch.float16, seed=seed)
    h = (h * 10**size).clamp(-6e4, 6e4)
    grad_output = (
        (torch.randn(32, D, generator=torch.Generator().manual_seed(seed)) * 10**grad).half().clamp(-6e4, 6e4)
    )
    gradients = {}
    for form in FORMS:
        leaves = [t.clone().requires_grad_() for t in (h, down, up)]
        with steering_operator(form):
            output = low_rank_update(*leaves, scaling, ACTIVATIONS[activation])
        output.backward(grad_output)
        gradients[form] = leaves[1].grad
    # an output that overflows has no gradient that means anything
    if output.isfinite().all() and gradients["plain"].isfinite().all():
        assert gradients["memory_efficient"].isfinite().all()
