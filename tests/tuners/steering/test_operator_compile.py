"""The low-rank operator compiled, exported and on meta tensors."""

import pytest
import torch
import torch.nn.functional as F
from operator_cases import ACTIVATIONS, SCALING, D, both_forms, reference, run, tensors

from trl_steer.tuners.steering.ops.low_rank import low_rank_update
from trl_steer.tuners.steering.ops.switch import steering_operator

pytestmark = pytest.mark.usefixtures("default_operator")


@both_forms
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_equals_eager_without_graph_breaks_and_takes_the_plain_form(form, activation):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph.graph)
        return graph.forward

    inputs = tensors(2, 5, D)
    compiled = torch.compile(
        lambda h, d, u: low_rank_update(h, d, u, SCALING, ACTIVATIONS[activation]), backend=backend, fullgraph=True
    )
    expected, expected_grads = run("plain", inputs, activation=ACTIVATIONS[activation])
    leaves = [t.clone().requires_grad_() for t in inputs]
    with steering_operator(form):
        output = compiled(*leaves)
    output.backward(torch.ones_like(output).cumsum(-1) / 10)
    assert torch.equal(output.detach(), expected)
    for leaf, grad in zip(leaves, expected_grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad)
    assert len(graphs) == 1
    assert not any("autograd_function" in str(node.target) for node in graphs[0].nodes)


def test_export_equals_eager():
    class Update(torch.nn.Module):
        def forward(self, h, down, up):
            return low_rank_update(h, down, up, SCALING, F.silu)

    inputs = tuple(tensors(2, 5, D))
    assert torch.equal(torch.export.export(Update(), inputs).module()(*inputs), Update()(*inputs))


def test_exported_without_gradients_takes_any_length():
    class Update(torch.nn.Module):
        def forward(self, h, down, up):
            return low_rank_update(h, down, up, SCALING)

    h, down, up = tensors(2, 5, D)
    length = torch.export.Dim("length", min=2, max=10_000)
    with torch.no_grad():
        program = torch.export.export(Update(), (h, down, up), dynamic_shapes=({1: length}, None, None)).module()
    for tokens in (3, 1000):
        inputs = tensors(2, tokens, D)
        torch.testing.assert_close(program(*inputs), reference(*inputs).float(), rtol=1e-5, atol=1e-5)


@both_forms
def test_meta_tensors_give_shape_and_dtype(form):
    inputs = [t.to("meta").requires_grad_() for t in tensors(2, 5, D, dtype=torch.bfloat16)]
    with steering_operator(form):
        output = low_rank_update(*inputs, SCALING)
    output.sum().backward()
    assert (output.shape, output.dtype, output.device.type) == (inputs[0].shape, torch.bfloat16, "meta")
    assert all(t.grad.shape == t.shape for t in inputs)
