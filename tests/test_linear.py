"""The linear layer, its fp32 weight gradient, and the compute-dtype shadows of parameters: `kernels.linear`."""

import pytest
import torch
import torch.nn.functional as F

from kernels.linear import linear, linear_ref, mm_fp32, shadow
from tests.helpers import DEVICE, DTYPES, assert_as_accurate, dtype_id, strided


def make(M, K, N, dtype, bias=True):
    x, dy = torch.randn(M, K, device=DEVICE).to(dtype), torch.randn(M, N, device=DEVICE).to(dtype)
    return [x, torch.randn(N, K, device=DEVICE), torch.randn(N, device=DEVICE) if bias else None], dy


def run(fn, inputs, dy):
    """y and the gradients of all inputs."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = fn(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def cast(inputs, dtype):
    return [None if t is None else t.to(dtype) for t in inputs]


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 16, 24), (37, 48, 96), (129, 64, 8)], ids=str)
@pytest.mark.parametrize("fn", [linear, linear_ref], ids=["linear", "ref"])
def test_linear(fn, M, K, N, bias, dtype):
    inputs, dy = make(M, K, N, dtype, bias)
    ours = run(fn, inputs, dy)
    assert ours[1].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in ours[2:])
    same, exact = (run(F.linear, cast(inputs, t), dy) for t in (dtype, torch.float64))
    for i, (a, b, c) in enumerate(zip(ours, same, exact)):
        assert_as_accurate(a, b, c, factor=3 if i else 2)


@pytest.mark.triton
def test_weight_gradient_is_not_rounded():
    """fp16 would lose the + 1 of 4096 + 1, and overflow at 65536."""
    x, dy = torch.ones(4097, 8, dtype=torch.float16, device=DEVICE), torch.ones(4097, 8, dtype=torch.float16, device=DEVICE)
    weight, bias = torch.zeros(8, 8, device=DEVICE), torch.zeros(8, device=DEVICE)
    _, _, dw, db = run(linear, [x, weight, bias], dy)
    assert torch.equal(dw, torch.full_like(dw, 4097))
    assert torch.equal(db, torch.full_like(db, 4097))
    assert mm_fp32(x.t() * 16, dy)[0, 0] == 4097 * 16


@pytest.mark.triton
def test_batched_noncontiguous_and_expanded():
    (x, weight, bias), dy = make(24, 16, 32, torch.float32)
    want = run(linear, [x, weight, bias], dy)
    got = run(lambda x, w, b: linear(x.view(4, 6, 16), w, b), [x, weight, bias], dy.view(4, 6, 32))
    assert all(torch.equal(a, b.view(a.shape)) for a, b in zip(want, got))
    got = run(lambda x, w, b: linear(x.t().contiguous().t(), w, b), [x, weight, bias], dy.t().contiguous().t())
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    got = run(lambda *a: linear(*map(strided, a)), [x, weight, bias], strided(dy))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    leaf = weight.clone().requires_grad_()
    linear(x, leaf).sum().backward()  # a stride-0 gradient
    torch.testing.assert_close(leaf.grad, x.sum(0).expand(32, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.triton
def test_frozen_inputs():
    (x, weight, bias), dy = make(5, 16, 32, torch.float16)
    want = run(linear, [x, weight, bias], dy)[1:]
    for i in range(3):
        inputs = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, weight, bias))]
        linear(*inputs).backward(dy)
        assert torch.equal(inputs[i].grad, want[i])
        assert all(t.grad is None for j, t in enumerate(inputs) if j != i)


@pytest.mark.triton
def test_gradients_accumulate_in_fp32():
    """Over micro-steps as well: the sum of two backward passes is the fp32 sum of their gradients."""
    (x, weight, _), dy = make(5, 16, 32, torch.float16, bias=False)
    leaf = weight.clone().requires_grad_()
    for scale in (1.0, 2.0**-12):
        linear(x, leaf).backward(dy * scale)
    parts = [run(linear, [x, weight, None], dy * scale)[2] for scale in (1.0, 2.0**-12)]
    assert torch.equal(leaf.grad, parts[0] + parts[1])


@pytest.mark.triton
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compile(backend):
    inputs, dy = make(6, 16, 32, torch.float16)
    parameters = [torch.nn.Parameter(t) for t in inputs[1:]]
    want = linear(inputs[0], *parameters)  # makes the shadows

    @torch.compile(fullgraph=True, backend=backend)
    def f(x, w, b):
        return linear(x, w, b)

    y = f(inputs[0], *parameters)
    torch.testing.assert_close(y, want)
    y.backward(dy)
    for parameter, gradient in zip(parameters, run(linear, inputs, dy)[2:]):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.triton
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled_for_another_dtype_than_the_shadow_has(backend):
    (x, weight, _), dy = make(6, 16, 32, torch.float16)
    parameter = torch.nn.Parameter(weight)
    f = torch.compile(linear, fullgraph=True, backend=backend)
    for dtype in (torch.float16, torch.bfloat16, torch.float16):
        y = f(x.to(dtype), parameter)
        assert torch.equal(y, linear_ref(x.to(dtype), weight))
        parameter.grad = None
        y.backward(dy.to(dtype))
        torch.testing.assert_close(parameter.grad, run(linear, [x.to(dtype), weight], dy.to(dtype))[2])


def test_shadow_follows_the_parameter():
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    assert shadow(parameter, torch.float32).data_ptr() == parameter.data_ptr()
    copy = shadow(parameter, torch.bfloat16)
    assert shadow(parameter, torch.bfloat16) is copy  # made once
    assert not copy.requires_grad
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones_like(parameter)
    changes = [
        optimizer.step,
        lambda: torch.nn.init.normal_(parameter),
        lambda: torch.nn.ParameterList([parameter]).load_state_dict({"0": torch.zeros(3, 4)}),
    ]
    for change in changes:
        before = parameter.detach().clone()
        change()
        assert not torch.equal(parameter, before)
        assert shadow(parameter, torch.bfloat16) is copy  # in place: a captured CUDA graph reads this address
        assert torch.equal(copy, parameter.detach().bfloat16())


def test_shadow_in_another_dtype():
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    shadow(parameter, torch.bfloat16)
    assert torch.equal(shadow(parameter, torch.float16), parameter.detach().half())


def test_shadow_made_in_inference_mode_serves_training():
    parameter = torch.nn.Parameter(torch.randn(3, 4))
    with torch.inference_mode():
        shadow(parameter, torch.float16)
    x = torch.randn(2, 4, dtype=torch.float16, requires_grad=True)
    F.linear(x, shadow(parameter, torch.float16)).sum().backward()
    assert x.grad is not None


def test_shadow_of_a_parameter_made_in_inference_mode():
    """It has no version counter by which a change would show."""
    with torch.inference_mode():
        parameter = torch.nn.Parameter(torch.randn(3, 4))
        for _ in range(2):
            assert torch.equal(shadow(parameter, torch.bfloat16), parameter.bfloat16())
            parameter.add_(1.0)


def test_mm_fp32():
    a, b = torch.randn(5, 300).half(), torch.randn(300, 7).half()
    assert mm_fp32(a, b).dtype == torch.float32
    torch.testing.assert_close(mm_fp32(a, b).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_a_step_of_any_optimizer_renews_the_shadow(fused, compiled):
    p = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.AdamW([p], lr=0.5, fused=fused)
    read = torch.compile(lambda: shadow(p, torch.bfloat16) * 1, backend="eager", disable=not compiled)
    for _ in range(3):
        before = read()
        p.grad = torch.randn(4, 4)
        optimizer.step()
        assert torch.equal(read(), p.detach().bfloat16())
        assert not torch.equal(read(), before)
