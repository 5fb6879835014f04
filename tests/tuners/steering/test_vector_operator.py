"""The update by a vector, also of another dtype than the hidden state."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from trl_steer.tuners.steering.ops.vector import vector_update

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def inputs(dtype, vector_dtype, shape=(3, 5, 8)):
    return torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape[-1]).to(vector_dtype).requires_grad_()


@pytest.mark.parametrize("dtypes", list(product(DTYPES, DTYPES)), ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 8), (8,), (0, 8)])
def test_sum_is_rounded_once_and_gradients_have_the_dtypes_of_their_tensors(dtypes, shape):
    h, vector = inputs(*dtypes, shape)
    output = vector_update(h, vector, 0.7)
    promoted = torch.promote_types(*dtypes)
    assert torch.equal(output, torch.add(h.to(promoted), vector.to(promoted), alpha=0.7).to(h.dtype))
    grad_output = torch.randn(shape).to(h)
    output.backward(grad_output)
    assert torch.equal(h.grad, grad_output)
    assert vector.grad.dtype == vector.dtype
    exact = 0.7 * grad_output.double().reshape(-1, 8).sum(0)
    torch.testing.assert_close(vector.grad.double(), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("shape", [(3, 1, 8), (1, 5, 1), (3, 5, 8)])
def test_vectors_of_rows_broadcast(shape):
    h, _ = inputs(torch.bfloat16, torch.float32)
    vector = torch.randn(shape, requires_grad=True)
    grad_output = torch.randn(3, 5, 8).bfloat16()
    output = vector_update(h, vector, 0.7)
    assert torch.equal(output, torch.add(h, vector, alpha=0.7).bfloat16())
    output.backward(grad_output)
    torch.testing.assert_close(vector.grad, 0.7 * grad_output.float().sum_to_size(shape))


def test_second_derivatives_exist():
    h, vector = inputs(torch.float64, torch.float64, (2, 3))
    assert gradcheck(lambda h, v: vector_update(h, v, 0.7), (h, vector))
    h, vector = inputs(torch.bfloat16, torch.float32)
    (grad,) = torch.autograd.grad(vector_update(h, vector, 0.7).float().square().sum(), vector, create_graph=True)
    grad.sum().backward()
    torch.testing.assert_close(vector.grad, torch.full_like(vector, 2 * 0.7 * 0.7 * 15), rtol=2**-7, atol=0)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 0)])
def test_vmap_equals_a_loop(in_dims):
    h, vectors = torch.randn(4, 4, 8).bfloat16(), torch.randn(4, 8)
    vector = vectors if in_dims[1] == 0 else vectors[0]
    mapped = torch.func.vmap(lambda h, v: vector_update(h, v, 0.7), in_dims)(h, vector)
    for index in range(4):
        row = h if in_dims[0] is None else h.select(in_dims[0], index)
        assert torch.equal(mapped[index], vector_update(row, vectors[index] if in_dims[1] == 0 else vectors[0], 0.7))


def test_compiled_equals_eager():
    h, vector = inputs(torch.bfloat16, torch.float32)
    compiled = torch.compile(vector_update, fullgraph=True, backend="eager")
    assert torch.equal(compiled(h, vector, 0.7), vector_update(h, vector, 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_call_reads_and_writes_the_hidden_state(dtype):
    calls = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.overloadpacket)
            return function(*args, **(kwargs or {}))

    h, vector = inputs(dtype, torch.float32)
    with torch.no_grad(), Recorder():
        vector_update(h, vector, 0.7)
    assert [call for call in calls if call is not torch.ops.aten.empty_like] == [torch.ops.aten.add]
