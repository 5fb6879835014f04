"""The Triton kernels of the low-rank update: on a GPU if there is one, else in Triton's interpreter."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_zoo import tiny_inputs, tiny_model
from operator_cases import SCALING, D, R, error, reference, run, tensors
from steering_cases import steer
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from trl_steer.tuners.steering.ops import triton_update
from trl_steer.tuners.steering.ops.low_rank import low_rank_update, operator_for
from trl_steer.tuners.steering.ops.switch import steering_operator

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {name: name and ACT2FN[name] for name in (None, "relu", "silu", "gelu", "gelu_pytorch_tanh", "gelu_new")}


def on_device(inputs):
    return [t.to(DEVICE) for t in inputs]


def fused(inputs, **kwargs):
    """Output and gradients of the kernels, which are not replaced by another operator."""
    with steering_operator("triton"):
        assert operator_for(*inputs, kwargs.get("activation")) == "triton"
    return run("triton", inputs, **kwargs)


def exact(inputs, grad_output, activation=None):
    """Output and gradients of the formula in float64."""
    leaves = [t.double().requires_grad_() for t in inputs]
    output = reference(*leaves, activation=activation)
    output.backward(grad_output.double())
    return output.detach(), [leaf.grad for leaf in leaves]


# Values


@settings(max_examples=30, deadline=None)
@given(
    lead=st.lists(st.integers(0, 6), max_size=3),
    d=st.integers(1, 150),
    r=st.integers(1, 64),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    dtypes=st.sampled_from(list(product(DTYPES, DTYPES))),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 1000),
)
@example([140], 70, 8, "contiguous", (torch.bfloat16, torch.bfloat16), "silu", 0)
def test_no_less_accurate_than_the_plain_form(lead, d, r, layout, dtypes, activation, seed):
    dtype, factors = dtypes
    inputs = on_device(tensors(*lead, d, r=r, dtype=dtype, factors=factors, seed=seed))
    inputs[2] = inputs[2] / 8
    h = inputs[0]
    if layout == "transposed":
        h = h.mT.contiguous().mT if h.dim() > 1 else h
    elif layout == "strided":
        h = torch.stack([h, h + 1], -1)[..., 1]
    elif layout == "expanded":
        h = h[..., :1].expand(*lead, d)
    inputs[0] = h
    grad_output = torch.randn(*lead, d).to(h)
    activation = ACTIVATIONS[activation]
    output, grads = fused(inputs, grad_output=grad_output, activation=activation)
    plain, plain_grads = run("plain", inputs, grad_output=grad_output, activation=activation)
    expected, expected_grads = exact(inputs, grad_output, activation)
    assert (output.dtype, output.shape) == (dtype, h.shape)
    assert [g.dtype for g in grads] == [t.dtype for t in inputs]
    results = zip([output, *grads], [plain, *plain_grads], [expected, *expected_grads], strict=True)
    # The order of a sum decides about the error of a few values that nearly cancel.
    size, sizes = exact([t.abs() for t in inputs], grad_output.abs())
    are_few = h[..., 0].numel() * r < 64
    for index, (ours, theirs, truth) in enumerate(results):
        if not truth.any():
            assert not ours.any()
            continue
        cancelled = ([size, *sizes][index].norm() / truth.norm()).item() if are_few else 1.0
        allowed = max(1.5 * error(theirs, truth), 2 * torch.finfo(ours.dtype).eps * max(1.0, cancelled))
        if index == 2:  # `h` is recovered from the output, and some of its values lose their last bit
            allowed = max(allowed, torch.finfo(dtype).eps / 2 * max(1.0, cancelled))
        assert error(ours, truth) <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hidden_states_of_16_bits_are_recovered_where_the_update_leaves_the_binade(dtype):
    """All but a few in a million, where the rounding of the output was a tie."""
    h, down, up = on_device(tensors(200, D, dtype=dtype, factors=torch.float32))
    h = (1.5 + h.float().tanh() / 4).to(dtype)
    inputs = [h, down, up / 100]
    grad_output = torch.randn(200, D).to(h)
    _, grads = fused(inputs, grad_output=grad_output)
    _, expected = exact(inputs, grad_output)
    assert error(grads[1], expected[1]) <= torch.finfo(dtype).eps / 64


@pytest.mark.parametrize("scaling", [0.0, -3.0, 100.0])
def test_scaling_of_any_sign_and_size(scaling):
    h, down, up = on_device(tensors(70, D, dtype=torch.float16))
    with steering_operator("triton"), torch.no_grad():
        output = low_rank_update(h, down * 30, up / 100, scaling)
    assert error(output, reference(h, down * 30, up / 100, scaling)) <= 2**-9


@pytest.mark.parametrize("rows", [3, 70], ids=["each token by a program", "tiles"])
# In the backward pass, transformers' gelu_new subtracts infinities.
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "gelu_new"])
def test_what_is_not_finite_stays_in_its_row_as_in_the_plain_form(rows, activation):
    inputs = on_device(tensors(rows, 20, r=5))
    for row, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        inputs[0][row, row] = value
    grad_output = torch.ones_like(inputs[0])
    grad_output[-1, 0] = float("inf")
    output, (grad_h, *_) = fused(inputs, grad_output=grad_output, activation=ACTIVATIONS[activation])
    plain, (plain_grad_h, *_) = run("plain", inputs, grad_output=grad_output, activation=ACTIVATIONS[activation])
    torch.testing.assert_close(output, plain, equal_nan=True)
    torch.testing.assert_close(grad_h, plain_grad_h, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 37, D), (140, 70), (1, 7), (0, D)], ids=str)
@pytest.mark.parametrize("needs_grad", [(True, True, True), (True, False, False), (False, True, False)])
def test_every_element_is_written_and_twice_the_same(shape, needs_grad):
    inputs = on_device(tensors(*shape, dtype=torch.bfloat16, factors=torch.float32))
    expected, expected_grads = fused(inputs, needs_grad=needs_grad, activation=F.silu)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        output, grads = fused(inputs, needs_grad=needs_grad, activation=F.silu)
    finally:
        torch.use_deterministic_algorithms(False)
    assert output.isfinite().all()
    assert torch.equal(output, expected)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert (grad is None and other is None) or torch.equal(grad, other)


def test_autocast_computes_in_its_dtype():
    inputs = on_device(tensors(2, 40, D, dtype=torch.bfloat16, factors=torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        output, grads = fused(inputs)
    expected, expected_grads = fused([inputs[0], *(t.bfloat16() for t in inputs[1:])])
    assert torch.equal(output, expected)
    assert [grad.dtype for grad in grads] == [t.dtype for t in inputs]
    assert all(error(grad, other) <= 2**-7 for grad, other in zip(grads, expected_grads, strict=True))


# Dropout


def test_dropout_keeps_its_share_scales_it_and_has_the_gradients_of_what_it_kept():
    h, _, _ = on_device(tensors(140, 8))
    h = h.abs() + 1
    inputs, p = [h, torch.eye(8, device=DEVICE), torch.eye(8, device=DEVICE)], 0.4
    output, (grad_h, grad_down, _) = fused(inputs, dropout=p, grad_output=torch.ones_like(h))
    kept = (output - h) / (SCALING * h)  # 0 or 1 / (1 - p)
    mask = kept > 0.5
    torch.testing.assert_close(kept, mask / (1 - p))
    assert abs(mask.float().mean().item() - (1 - p)) < 0.05
    torch.testing.assert_close(grad_h, 1 + SCALING * mask / (1 - p))
    torch.testing.assert_close(grad_down, SCALING / (1 - p) * mask.float().T @ h, rtol=1e-4, atol=1e-3)
    assert torch.equal(fused(inputs, dropout=p)[0], output)  # the seed is PyTorch's
    torch.manual_seed(8)
    with steering_operator("triton"):
        assert not torch.equal(low_rank_update(*inputs, SCALING, dropout=p), output)


# Selection


def test_kernels_run_on_a_gpu_by_themselves_and_on_a_cpu_on_request():
    inputs = on_device(tensors(2, 9, D))
    with steering_operator("auto"):
        assert operator_for(*inputs) == ("triton" if DEVICE == "cuda" else "memory_efficient")
    with steering_operator("triton"):
        assert operator_for(*inputs) == "triton"
    with steering_operator("memory_efficient"):
        assert operator_for(*inputs) == "memory_efficient"


@pytest.mark.parametrize(
    ("change", "operator"),
    [
        ({}, "triton"),
        ({"r": 64}, "triton"),
        ({"r": 65}, "memory_efficient"),
        ({"dtype": torch.float64}, "memory_efficient"),
        ({"factors": torch.float64}, "memory_efficient"),
        ({"activation": torch.tanh}, "memory_efficient"),
        ({"activation": ACT2FN["quick_gelu"]}, "memory_efficient"),
        ({"with_residual": True}, "plain"),
    ],
    ids=["any", "rank 64", "rank 65", "float64", "float64 factors", "tanh", "quick_gelu", "residual"],
)
def test_what_the_kernels_do_not_serve_takes_another_operator(change, operator):
    change = dict(change)
    activation, with_residual = change.pop("activation", None), change.pop("with_residual", False)
    inputs = on_device(tensors(2, 9, D, **change))
    residual = torch.zeros_like(inputs[0]) if with_residual else None
    with steering_operator("triton"):
        assert operator_for(*inputs, activation, residual) == operator
    output, _ = run("triton", inputs, activation=activation, residual=residual)
    assert error(output, reference(*inputs, activation=activation, residual=residual)) <= 1e-6


def test_without_triton_or_on_another_device_the_kernels_are_not_used(monkeypatch):
    inputs = on_device(tensors(2, 9, D))
    with steering_operator("triton"):
        assert operator_for(*(t.to("meta") for t in inputs)) == "memory_efficient"
        monkeypatch.setattr(triton_update, "_runs_kernels", lambda device: False)
        assert operator_for(*inputs) == "memory_efficient"


# Autograd


def test_output_and_bottleneck_are_all_that_is_kept():
    saved, leaves = [], [t.requires_grad_() for t in on_device(tensors(2, 50, D, factors=torch.float32))]
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), steering_operator("triton"):
        output = low_rank_update(*leaves, SCALING, F.silu, 0.4)
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves[1:]}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    kept = {pointer: size for pointer, size in storages.items() if pointer not in own}
    assert output.untyped_storage().data_ptr() in kept
    assert sum(kept.values()) == output.nbytes + 2 * 50 * R * 4 + 4  # and the seed of dropout


def test_writing_into_the_output_and_second_derivatives_are_errors():
    leaves = [t.requires_grad_() for t in on_device(tensors(2, 5, D))]
    with steering_operator("triton"):
        output = low_rank_update(*leaves, SCALING)
        with pytest.raises(RuntimeError, match=r"modified inplace|modified by an inplace operation"):  # noqa: PT012
            output.mul_(2)
            output.sum().backward()
        output = low_rank_update(*leaves, SCALING)
    (grad,) = torch.autograd.grad(output.square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_with_the_same_dropout(use_reentrant):
    inputs = on_device(tensors(2, 9, D))
    expected, expected_grads = fused(inputs, activation=F.silu, dropout=0.4)
    leaves = [t.clone().requires_grad_() for t in inputs]
    torch.manual_seed(7)
    with steering_operator("triton"):
        output = checkpoint(low_rank_update, *leaves, SCALING, F.silu, 0.4, use_reentrant=use_reentrant)
        output.backward(torch.ones_like(output).cumsum(-1) / 10)
    assert torch.equal(output, expected)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected_grads, strict=True))


# torch.compile


@pytest.mark.parametrize("dropout", [None, 0.4])
def test_operators_follow_the_rules_of_custom_operators(dropout):
    h, down, up = (t.requires_grad_() for t in on_device(tensors(2, 5, D)))
    seed = None if dropout is None else torch.tensor([3], dtype=torch.int32, device=DEVICE)
    forward = (h, down, up, SCALING, "silu", dropout or 0.0, seed)
    torch.library.opcheck(torch.ops.trl_steer.low_rank_update.default, (*forward, torch.float32))
    steered, z = (t.detach() for t in torch.ops.trl_steer.low_rank_update(*forward, torch.float32))
    for needs in ((True, True, True), (True, False, False)):
        backward = (torch.ones_like(h), steered, z, down.detach(), up.detach(), *forward[3:], *needs)
        torch.library.opcheck(torch.ops.trl_steer.low_rank_update_backward.default, backward)


def test_compiled_forward_and_backward_have_one_node_each_and_equal_eager():
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "trl_steer" in str(node.target)])
        return graph.forward

    inputs = on_device(tensors(2, 5, D))
    expected, expected_grads = fused(inputs, activation=ACT2FN["silu"])
    compiled = torch.compile(
        lambda h, d, u: low_rank_update(h, d, u, SCALING, ACT2FN["silu"]),
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
        fullgraph=True,
    )
    leaves = [t.clone().requires_grad_() for t in inputs]
    with steering_operator("triton"):
        output = compiled(*leaves)
    output.backward(torch.ones_like(output).cumsum(-1) / 10)
    assert torch.equal(output, expected)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, expected_grads, strict=True))
    assert graphs == [["trl_steer.low_rank_update.default"], ["trl_steer.low_rank_update_backward.default"]]


def test_exported_program_has_the_operator_and_takes_any_length():
    class Update(torch.nn.Module):
        def forward(self, h, down, up):
            return low_rank_update(h, down, up, SCALING)

    length = torch.export.Dim("length", min=2, max=10_000)
    with torch.no_grad(), steering_operator("triton"):
        inputs = tuple(on_device(tensors(2, 5, D)))
        program = torch.export.export(Update(), inputs, dynamic_shapes=({1: length}, None, None))
    assert "trl_steer.low_rank_update.default" in str(program.graph)
    for tokens in (3, 100):
        inputs = on_device(tensors(2, tokens, D))
        torch.testing.assert_close(program.module()(*inputs), reference(*inputs).float(), rtol=1e-5, atol=1e-5)


# In a model


def test_training_a_model_gives_the_losses_and_gradients_of_the_plain_form():
    results = {}
    for form in ("triton", "plain"):
        model = steer(tiny_model(), "low_rank", r=4, activation="silu", init_weights=False).to(DEVICE)
        inputs = {name: tensor.to(DEVICE) for name, tensor in tiny_inputs().items()}
        with steering_operator(form):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
        results[form] = loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(results["triton"], results["plain"], rtol=1e-4, atol=1e-6)


def test_compiled_model_equals_eager_without_graph_breaks():
    model = steer(tiny_model(), "low_rank", r=4, activation="silu").to(DEVICE).eval()
    inputs = {name: tensor.to(DEVICE) for name, tensor in tiny_inputs().items()}
    with torch.no_grad(), steering_operator("triton"):
        expected = model(**inputs).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs).logits, expected)
