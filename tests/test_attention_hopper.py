"""The Gluon attention against PyTorch, on a Hopper GPU; `test_aot.py` compiles it anywhere. Gluon has no interpreter."""

import pytest
import torch

from tests.helpers import assert_as_accurate, dtype_id

pytest.importorskip("triton")
from kernels import attention_hopper
from kernels.attention import causal_attention, causal_attention_ref

H, D = 3, attention_hopper.HEAD_SIZE
hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (sm_90)"
    ),
]


def run(attention, qkv, dout, scale=None):
    qkv = qkv.detach().clone().requires_grad_()
    out = attention(qkv, H, scale=scale)
    out.backward(dout.to(out.dtype))
    return out.detach(), qkv.grad


def inputs(B, T, dtype):
    qkv = torch.randn(B, T, 3 * H * D, device="cuda", dtype=dtype)
    return qkv, torch.randn(B, T, H * D, device="cuda", dtype=dtype)


class TestOnGpu:
    pytestmark = hopper

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
    @pytest.mark.parametrize(("B", "T"), [(1, 64), (2, 128), (3, 448), (1, 1024), (2, 2048)])
    @pytest.mark.parametrize("scale", [None, 0.5])
    def test_forward_and_backward(self, B, T, dtype, scale):
        qkv, dout = inputs(B, T, dtype)
        assert attention_hopper.supports(qkv, H, 0.0)
        out, grad = run(causal_attention, qkv, dout, scale)
        same_out, same_grad = run(causal_attention_ref, qkv, dout, scale)
        exact_out, exact_grad = run(causal_attention_ref, qkv.double(), dout.double(), scale)
        assert_as_accurate(out, same_out, exact_out)
        for ours, same, exact in zip(*(g.chunk(3, dim=2) for g in (grad, same_grad, exact_grad))):
            assert_as_accurate(ours, same, exact, factor=3)

    def test_large_logits(self):
        qkv, dout = inputs(1, 256, torch.bfloat16)
        out, grad = run(causal_attention, 30 * qkv, dout)
        assert torch.isfinite(out).all()
        assert torch.isfinite(grad).all()

    def test_repeats_bit_for_bit(self):
        qkv, dout = inputs(4, 1024, torch.bfloat16)
        first = run(causal_attention, qkv, dout)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, run(causal_attention, qkv, dout)))

    def test_every_element_is_written(self):
        qkv, dout = inputs(2, 192, torch.bfloat16)
        out = torch.full_like(dout, float("nan"))
        lse = torch.full((2, H, 192), float("nan"), device="cuda")
        attention_hopper.forward(qkv, out, lse, H, 0.125)
        dqkv, delta = torch.full_like(qkv, float("nan")), torch.full_like(lse, float("nan"))
        attention_hopper.backward(dout, qkv, out, lse, delta, dqkv, H, 0.125)
        for x in (out, lse, dqkv, delta):
            assert not x.isnan().any()

    def test_cuda_graph(self):
        qkv, dout = inputs(2, 256, torch.bfloat16)
        eager = run(causal_attention, qkv, dout)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run(causal_attention, qkv, dout)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(causal_attention, qkv, dout)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(eager, captured))

    def test_64_bit_offsets(self):
        B, T = 256, 4096  # 2.4e9 elements
        qkv = torch.randn(B, T, 3 * 12 * D, device="cuda", dtype=torch.bfloat16)
        out = causal_attention(qkv, 12)
        assert torch.equal(out[-1:], causal_attention(qkv[-1:].contiguous(), 12))

    def test_what_it_leaves_to_the_other_kernels(self):
        qkv, _ = inputs(1, 128, torch.bfloat16)
        assert not attention_hopper.supports(qkv, H, 0.1)
        assert not attention_hopper.supports(qkv[:, :100], H, 0.0)
        assert not attention_hopper.supports(qkv.float(), H, 0.0)
        assert not attention_hopper.supports(qkv, 2 * H, 0.0)


def test_cpu_tensors_are_left_to_the_other_kernels():
    assert not attention_hopper.supports(torch.empty(1, 128, 3 * H * D, dtype=torch.bfloat16), H, 0.0)
