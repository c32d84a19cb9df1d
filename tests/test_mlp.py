"""kernels.mlp: every path (TMA, pointers, cuBLAS + elementwise) against fp32, by the error rule of tests.helpers."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kernels import configs, dispatch
from tests.helpers import DEVICE, DTYPES, INTERPRET, assert_as_accurate, dtype_id, strided

triton = pytest.importorskip("triton")

from kernels import gelu, mlp  # noqa: E402  they need Triton

pytestmark = pytest.mark.triton

HAS_TMA = INTERPRET or (DEVICE == "cuda" and torch.cuda.get_device_capability()[0] >= 9)
COMMON = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 2, "per_sm": 1}
PATHS = {
    "tma": {"fused": 1, "TMA": 1, "FLATTEN": 1, "PARTS": 2, **COMMON},
    "tma-4-parts": {"fused": 1, "TMA": 1, "FLATTEN": 0, "PARTS": 4, **COMMON},
    "pointers": {"fused": 1, "TMA": 0, "FLATTEN": 0, "PARTS": 1, **COMMON},
    "unfused": {"fused": 0},
}


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Every path on every machine: the table's entry replaced by small tiles, so that a small shape has several."""
    if PATHS[request.param].get("TMA") and not HAS_TMA:
        pytest.skip("needs TMA: sm_90, or TRITON_INTERPRET=1")
    monkeypatch.setattr(configs, "lookup", lambda op, bucket, arch: dict(PATHS[request.param]))
    return request.param


def make(M, C, N, dtype, bias):
    """x, the four parameters (fp32, or None), dy; the pre-activation has a standard deviation of about 2."""
    weights = torch.randn(N, C, device=DEVICE) * 2 / C**0.5, torch.randn(C, N, device=DEVICE) / N**0.5
    biases = (torch.randn(N, device=DEVICE), torch.randn(C, device=DEVICE)) if bias else (None, None)
    x, dy = torch.randn(2, M, C, device=DEVICE).to(dtype)
    return x, (weights[0], biases[0], weights[1], biases[1]), dy


def step(op, x, parameters, dy, approximate):
    """y, dx and the gradients of the parameters that are there."""
    x = x.detach().requires_grad_()  # not a clone: strides and alignment are part of the tests
    parameters = [None if p is None else p.detach().requires_grad_() for p in parameters]
    y = op(x, *parameters, approximate)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in parameters if p is not None)]


def check(x, parameters, dy, approximate, results=None):
    ours = step(mlp.gelu_mlp, x, parameters, dy, approximate) if results is None else results
    same_dtype = step(mlp.gelu_mlp_ref, x, parameters, dy, approximate)
    doubles = [None if p is None else p.double() for p in parameters]
    exact = step(mlp.gelu_mlp_ref, x.double(), doubles, dy.double(), approximate)
    for i, (a, b, c) in enumerate(zip(ours, same_dtype, exact, strict=True)):
        assert a.dtype == (x.dtype if i < 2 else torch.float32)
        # A sum in another order differs by a rounding of the largest term, which cuBLAS may happen not to show.
        assert_as_accurate(a, b, c, factor=2 if i == 0 else 3, atol=4 * torch.finfo(torch.float32).eps * c.abs().max().item())


SHAPES = [(1, 16, 16), (37, 48, 80), (129, 64, 144), (37, 48, 35)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("approximate", mlp.APPROXIMATE)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-C{}-N{}".format(*s))
def test_gelu_mlp(path, shape, bias, approximate, dtype):
    check(*make(*shape, dtype, bias), approximate)


def test_output_width_may_differ_from_input_width(path):
    x, (w_fc, b_fc, _, _), _ = make(37, 48, 80, torch.float16, True)
    w_proj, b_proj = torch.randn(32, 80, device=DEVICE), torch.randn(32, device=DEVICE)
    check(x, (w_fc, b_fc, w_proj, b_proj), torch.randn(37, 32, device=DEVICE).half(), "none")


class Spy:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize(("C", "fused"), [(48, True), (21, False)])
def test_table_and_alignment_choose_the_path(path, monkeypatch, C, fused):
    kernels = (mlp, "_fwd_kernel"), (mlp, "_bwd_kernel"), (gelu, "_gelu_kernel"), (gelu, "_dgelu_kernel")
    spies = [Spy(getattr(*kernel)) for kernel in kernels]
    for (module, name), spy in zip(kernels, spies, strict=True):
        monkeypatch.setattr(module, name, spy)
    step(mlp.gelu_mlp, *make(37, C, 64, torch.float16, True), "none")
    counts = [spy.launches for spy in spies]
    assert counts == ([1, 1, 0, 0] if fused and path != "unfused" else [0, 0, 1, 1])


def test_parameter_gradients_are_never_rounded_to_16_bits(path):
    _, _, *grads = step(mlp.gelu_mlp, *make(37, 48, 80, torch.float16, True), "none")
    assert all((g != g.half().float()).any() for g in grads)


def test_unaligned_storage_is_not_given_to_tma(path):
    def unaligned(t):
        shifted = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
        assert shifted.data_ptr() % 16
        return shifted

    x, parameters, dy = make(37, 48, 80, torch.float16, True)
    check(unaligned(x), parameters, dy, "none")
    check(x, parameters, unaligned(dy), "none")


def test_empty_batch(path):
    x, parameters, dy = make(0, 48, 80, torch.float16, True)
    y, dx, *grads = step(mlp.gelu_mlp, x, parameters, dy, "none")
    assert y.shape == dx.shape == (0, 48)
    assert all(g.eq(0).all() for g in grads)


def test_no_output_is_left_unwritten(path):
    torch.use_deterministic_algorithms(True, warn_only=True)  # makes torch.empty give NaN
    try:
        assert torch.empty(1, device=DEVICE).isnan().item()
        results = step(mlp.gelu_mlp, *make(65, 48, 80, torch.float16, True), "none")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(r.isfinite().all() for r in results)


def test_non_contiguous_inputs(path):
    x, parameters, dy = make(37, 48, 80, torch.float16, True)
    x, dy = x.t().contiguous().t(), dy.t().contiguous().t()
    parameters = [p.t().contiguous().t() if p.dim() == 2 else p for p in parameters]
    assert not x.is_contiguous()
    check(x, parameters, dy, "none")
    check(x[:1].expand(37, 48), parameters, dy[:1].expand(37, 48), "none")
    check(strided(x), [strided(p) for p in parameters], strided(dy), "none")


def test_leading_dimensions(path):
    x, parameters, dy = make(30, 48, 80, torch.float16, True)
    flat = step(mlp.gelu_mlp, x, parameters, dy, "none")
    cube = step(mlp.gelu_mlp, x.view(5, 6, 48), parameters, dy.view(5, 6, 48), "none")
    assert cube[0].shape == cube[1].shape == (5, 6, 48)
    assert all(torch.equal(a, b.view(a.shape)) for a, b in zip(flat, cube, strict=True))


def test_repeats_bitwise(path):
    inputs = make(129, 80, 144, torch.float16, True)
    first, second = step(mlp.gelu_mlp, *inputs, "none"), step(mlp.gelu_mlp, *inputs, "none")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_checkpointing(path):
    def checkpointed(*args):
        return checkpoint(mlp.gelu_mlp, *args, use_reentrant=False)

    inputs = make(37, 48, 80, torch.float16, True)
    plain, recomputed = step(mlp.gelu_mlp, *inputs, "tanh"), step(checkpointed, *inputs, "tanh")
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_without_gradients(path):
    x, parameters, _ = make(37, 48, 80, torch.float16, True)
    with_slope = mlp.gelu_mlp(x, *(p.requires_grad_() for p in parameters))
    with torch.no_grad():
        assert torch.equal(mlp.gelu_mlp(x, *parameters), with_slope)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_opcheck(path, bias):
    x, parameters, dy = make(37, 48, 80, torch.float32, bias)
    torch.library.opcheck(mlp._mlp_fwd, (x, *parameters, False, True, False))
    post, slope = torch.randn(2, 37, 80, device=DEVICE)
    torch.library.opcheck(mlp._mlp_bwd, (dy, x, post, slope, parameters[0], parameters[2], bias, bias, False))


def test_compile(path):
    backend = "aot_eager" if INTERPRET else "inductor"
    inputs = make(37, 48, 80, torch.float16, True)
    compiled = torch.compile(mlp.gelu_mlp, fullgraph=True, backend=backend)
    assert all(
        torch.equal(a, b) for a, b in zip(step(mlp.gelu_mlp, *inputs, "none"), step(compiled, *inputs, "none"), strict=True)
    )


def gelu_kernels(x, approximate):
    """gelu(x) without and with its slope, and the slope, from fp32 x."""
    slope = x.clone()
    again = gelu.gelu_(slope, approximate == "tanh", with_slope=True)
    return gelu.gelu_(x, approximate == "tanh", with_slope=False), again, slope


@pytest.mark.parametrize("approximate", mlp.APPROXIMATE)
def test_gelu_to_fp32_rounding(approximate):
    x = torch.linspace(-8, 8, 1 << 14, device=DEVICE).view(128, 128)
    post, again, slope = gelu_kernels(x, approximate)
    exact_x = x.double().requires_grad_()
    exact = torch.nn.functional.gelu(exact_x, approximate=approximate)
    exact.sum().backward()
    # 1.2e-7 is what the polynomial is made for, 5e-7 one rounding at 8; slopes are at most 1.13.
    for ours, reference, bound in ((post, exact, 5e-7), (again, exact, 5e-7), (slope, exact_x.grad, 5e-7)):
        assert (ours - reference).abs().max().item() < bound
    assert ((post - exact).abs() - 2e-7)[x.abs() < 1].max().item() < 0


@pytest.mark.parametrize("approximate", mlp.APPROXIMATE)
def test_gelu_far_out(approximate):
    x = torch.tensor([0.0, 12, 30, 1e3, 6e4, 1e10, -12, -30, -1e3, -6e4, -1e10, float("nan")], device=DEVICE).view(1, -1)
    post, again, slope = gelu_kernels(x, approximate)
    finite = x[0, :-1]
    for ours, expected in ((post, finite.clamp(min=0)), (again, finite.clamp(min=0)), (slope, (finite > 0).float())):
        expected[0] = ours[0, 0] if ours is slope else 0.0  # gelu'(0) = 1/2 is checked above
        # Beyond 10 the tail is e-23 of |x|.
        assert torch.allclose(ours[0, :-1], expected, rtol=0, atol=1e-12)
        assert ours[0, -1].isnan()


HUGE = 1 << 30  # rows 2 and further of a matrix with this stride lie beyond 2^31 elements


def test_offsets_beyond_int32():
    """Three rows of one 4 GiB buffer, of which only the pages in use are ever touched, as the matrices of both GEMMs."""
    rows, K, N = 3, 32, 64
    buffer = torch.empty(2 * HUGE + 8 * N, dtype=torch.float16, device=DEVICE)
    dense = [torch.randn(rows, width, device=DEVICE).half() for width in (K, N)]
    w_fc, w_proj = torch.randn(N, K, device=DEVICE).half(), torch.randn(K, N, device=DEVICE).half()
    config = {k: v for k, v in PATHS["pointers"].items() if k not in ("fused", "per_sm")}

    def run(stride):
        def matrix(slot, width):
            if stride == N:
                return torch.empty(rows, N, dtype=torch.float16, device=DEVICE)[:, :width]
            return buffer.as_strided((rows, width), (stride, 1), slot * N)

        x, slope, post, dpre, grad = (matrix(i, K if i == 0 else N) for i in range(5))
        x.copy_(dense[0])
        slope.copy_(dense[1])
        partial = torch.empty(1, N, device=DEVICE)
        mlp._bwd_kernel[(1,)](x, w_proj, slope, dpre, partial, rows, N, K, stride, stride, HAS_BIAS=True, **config)
        grad.copy_(dense[0] @ w_proj)
        tile = {"BLOCK_M": 64, "BLOCK_N": 64}
        gelu._dgelu_kernel[(1, 1)](grad, slope, partial, rows, N, stride, HAS_BIAS=False, **tile)
        flags = {"HAS_BIAS": False, "WITH_SLOPE": True, "TANH": False}
        mlp._fwd_kernel[(1,)](x, w_fc, w_fc, slope, post, rows, N, K, stride, stride, **flags, **config)
        return [t.clone() for t in (slope, post, dpre, grad, partial)]

    for far, near in zip(run(HUGE), run(N), strict=True):
        assert torch.equal(far, near)


def test_bad_arguments():
    x, parameters, _ = make(4, 16, 32, torch.float32, True)
    with pytest.raises(ValueError, match="approximate='erf'"):
        mlp.gelu_mlp(x, *parameters, "erf")
    with pytest.raises(ValueError, match=r"x \(4, 8\), w_fc \(32, 16\)"):
        mlp.gelu_mlp(x[:, :8], *parameters)
    w_fc, b_fc, w_proj, b_proj = parameters
    with pytest.raises(ValueError, match=r"b_fc of shape \(31,\) for weights of shape \(32, 16\)"):
        mlp.gelu_mlp(x, w_fc, b_fc[1:], w_proj, b_proj)
    with pytest.raises(ValueError, match=r"b_proj of shape \(1,\) for weights of shape \(16, 32\)"):
        mlp.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj[:1])


def test_reference_backend_on_request():
    dispatch.use("torch")
    x, parameters, _ = make(4, 16, 32, torch.float32, True)
    assert torch.equal(mlp.gelu_mlp(x, *parameters), mlp.gelu_mlp_ref(x, *parameters))


@pytest.mark.parametrize("arch", [80, 86, 89, 90])
def test_every_architecture_has_entries_the_launchers_understand(arch):
    for op, candidates in (("gelu_mlp_fwd", mlp.fwd_candidates), ("gelu_mlp_bwd", mlp.bwd_candidates)):
        config = configs.lookup(op, "default", arch)
        assert config["fused"] == 0 or config.keys() == {"fused", *mlp.KEYS}
        assert all(c["fused"] == 0 or c.keys() == {"fused", *mlp.KEYS} for c in candidates(arch))
        if arch < 90:
            assert not config.get("TMA")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("C", [768, 1024, 1280, 1600])
def test_shipped_configuration(C, dtype, bias):
    check(*make(1000, C, 4 * C, dtype, bias), "none")


@pytest.mark.gpu
def test_every_candidate():
    x, parameters, dy = make(300, 256, 1024, torch.bfloat16, True)
    w_fc, b_fc, w_proj, _ = (p.bfloat16() for p in parameters)
    arch = configs.arch()
    expected = None
    for op, candidates, run in (
        ("fwd", mlp.fwd_candidates, lambda: mlp._gelu_fwd(x, w_fc, b_fc, False, True)),
        ("bwd", mlp.bwd_candidates, lambda: mlp._gelu_bwd(dy, w_proj, x @ w_fc.t(), True)),
    ):
        expected = None
        for config in candidates(arch):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(configs, "lookup", lambda *_, config=config: dict(config))
                results = run()
            expected = expected or results  # the first is cuBLAS + elementwise
            for ours, other in zip(results, expected, strict=True):
                error = (ours.float() - other.float()).abs().max()
                # Both round the same fp32 sums, added in another order, twice: to bf16 once before GELU, and after it.
                assert error <= 4 * torch.finfo(torch.bfloat16).eps * other.abs().max(), (op, config)


@pytest.mark.gpu
def test_cuda_graph_capture():
    x, parameters, dy = make(256, 768, 3072, torch.bfloat16, True)
    x.requires_grad_()
    parameters = [p.requires_grad_() for p in parameters]

    def run():
        return torch.autograd.grad(mlp.gelu_mlp(x, *parameters), (x, *parameters), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


@pytest.mark.gpu
def test_elementwise_beyond_int32():
    size = (1 << 31) + 1024
    pre = torch.ones(1, size, dtype=torch.float16, device="cuda")
    assert torch.equal(gelu.gelu_(pre, False, with_slope=False)[0, -1024:], torch.nn.functional.gelu(pre[0, -1024:]))
