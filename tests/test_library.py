"""What all ops of `kernels` have in common: gradients, once."""

import pytest
import torch

from kernels import dispatch
from kernels.attention import causal_attention, decode_attention
from kernels.cross_entropy import cross_entropy, linear_cross_entropy
from kernels.layernorm import layer_norm, layer_norm_residual
from kernels.linear import linear
from kernels.mlp import gelu_mlp
from tests.helpers import DEVICE

C = 32


def tensor(*shape):
    return torch.randn(shape, device=DEVICE)


OPS = {
    "attention": lambda x: causal_attention(x.repeat(1, 1, 3), 2),
    "cross_entropy": lambda x: cross_entropy(x * 1.0, torch.zeros(x.shape[:2], dtype=torch.int64, device=DEVICE)),
    "layer_norm": lambda x: layer_norm(x, tensor(C)),
    "layer_norm_residual": lambda x: layer_norm_residual(x, x, tensor(C))[0],
    "linear": lambda x: linear(x, tensor(C, C)),
    "linear_cross_entropy": lambda x: linear_cross_entropy(
        x, tensor(8, C), torch.zeros(x.shape[:2], dtype=torch.int64, device=DEVICE)
    ),
    "mlp": lambda x: gelu_mlp(x, tensor(4 * C, C), None, tensor(C, 4 * C), None),
}


@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items()])
@pytest.mark.parametrize("kernels", [pytest.param("auto", marks=pytest.mark.triton), "cpp"])
def test_second_derivatives_are_refused(op, kernels):
    """A gradient penalty would otherwise lack what depends on the input through what was saved."""
    if kernels == "cpp" and dispatch.explain(DEVICE)["linear"][0] != "cpp":
        pytest.skip("the compiled kernels are not what runs here")
    x = tensor(2, 8, C).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    (first,) = torch.autograd.grad(op(x).square().sum(), x)
    assert first.isfinite().all()


def test_the_references_have_second_derivatives():
    dispatch.use("torch")
    x = tensor(2, 8, C).requires_grad_()
    for name in OPS.keys() - {"attention"}:  # not PyTorch's own either
        (first,) = torch.autograd.grad(OPS[name](x).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), x)[0].abs().sum() > 0


@pytest.mark.triton
def test_decoding_has_no_gradient():
    q, cache = tensor(2, C).requires_grad_(), tensor(2, 2, 2, 8, C // 2)
    out = decode_attention(q, *cache, torch.full((2,), 8, dtype=torch.int32, device=DEVICE))
    with pytest.raises(RuntimeError, match="for inference"):
        out.sum().backward()


@pytest.mark.triton
def test_results_may_be_changed_in_place():
    x = tensor(2, 8, C).requires_grad_()
    for name in ("layer_norm", "linear", "mlp"):
        y = OPS[name](x)
        y.add_(1.0)
        y.sum().backward()
