"""What the tests of the low-rank operator share: inputs, a float64 reference, and how to run a form."""

import pytest
import torch
import torch.nn.functional as F

from trl_steer.tuners.steering.ops.low_rank import low_rank_update
from trl_steer.tuners.steering.ops.switch import steering_operator

# The forms in PyTorch; the kernels have tests of their own.
FORMS = ("memory_efficient", "plain")
D, R, SCALING = 24, 3, 0.7
ACTIVATIONS = {"identity": None, "silu": F.silu, "tanh": torch.tanh}
both_forms = pytest.mark.parametrize("form", FORMS)


def tensors(*shape, dtype=torch.float32, factors=None, r=R, seed=0):
    """`h` of `shape`, and factors for it whose update is about as large as `h`."""
    generator = torch.Generator().manual_seed(seed)
    d = shape[-1]
    h, down, up = (torch.randn(*size, generator=generator) for size in (shape, (r, d), (d, r)))
    factors = factors or dtype
    return [h.to(dtype), (down / d**0.5).to(factors), (up / r**0.5).to(factors)]


def reference(h, down, up, scaling=SCALING, activation=None, residual=None):
    """The formula, word for word, in float64."""
    h, down, up, residual = (t if t is None else t.double() for t in (h, down, up, residual))
    z = torch.einsum("...d,rd->...r", h, down)
    a = z if activation is None else activation(z)
    return (h if residual is None else residual) + scaling * torch.einsum("...r,dr->...d", a, up)


def run(form, inputs, needs_grad=(True, True, True), grad_output=None, **kwargs):
    """Output and gradients of fresh leaves. The same seed everywhere, so that dropout draws the same mask."""
    leaves = [t.clone().requires_grad_(needed) for t, needed in zip(inputs, needs_grad, strict=True)]
    torch.manual_seed(7)
    with steering_operator(form):
        output = low_rank_update(*leaves, SCALING, **kwargs)
    if any(needs_grad):
        output.backward(torch.ones_like(output).cumsum(-1) / 10 if grad_output is None else grad_output)
    return output.detach(), [leaf.grad for leaf in leaves]


def error(tensor, exact):
    return ((tensor.double() - exact.double()).norm() / exact.double().norm()).item()
