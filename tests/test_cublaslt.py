"""cuBLASLt's GELU epilogues: csrc/linear_gelu.cpp on a library for CPUs, the MLP around it on an emulation, all on a GPU."""

import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import setuptools
import torch
import torch.nn.functional as F

from kernels import cublaslt, dispatch, extension, mlp
from tests.helpers import assert_as_accurate, dtype_id

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++")
DTYPES = [torch.bfloat16, torch.float16]


def exact_mlp(x, w, bias, dy, w_proj):
    """fp64: gelu's argument and value, and for gradient dy of value @ w_proj^T that of the argument and its column sums."""
    pre = (x.double() @ w.double().t() + (0 if bias is None else bias.double())).requires_grad_()
    post = F.gelu(pre, approximate="tanh")
    post.backward(dy.double() @ w_proj.double())
    return pre.detach(), post.detach(), pre.grad, pre.grad.sum(0)


# csrc/linear_gelu.cpp, on tests/cublaslt_mock.cpp ------------------------------------------------------------------------

# Runs in a process without PyTorch, whose CUDA builds load the real library. Arrays in place; results beside the input.
CHILD = """
import ctypes, sys
import numpy as np

folder, file, library, release = sys.argv[1:]
library = ctypes.CDLL(library) if library else None
run = ctypes.CDLL(f"{folder}/driver.so").run
loaded = np.load(file)

def placed(name, x):  # at a multiple of 256 bytes, or 16 behind one
    buffer = np.empty(x.nbytes + 512, np.uint8)
    begin = -buffer.ctypes.data % 256 + 16 * name.startswith("shifted")
    out = buffer[begin : begin + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out

cases = {name: placed(name, loaded[name]) for name in loaded}
for case in dict.fromkeys(name.partition(".")[0] for name in loaded):
    a, w, d, bias, aux = (cases.get(f"{case}.{name}") for name in ("a", "w", "d", "bias", "aux"))
    sizes = [ctypes.c_long(size) for size in (*d.shape, a.shape[1])]
    pointers = [None if x is None else ctypes.c_void_p(x.ctypes.data) for x in (a, w, d, bias, aux)]
    message = ctypes.create_string_buffer(256)
    cases[f"{case}.code"] = run(int(release), int("backward" in case), *sizes, *pointers, message)
    cases[f"{case}.message"] = message.value.decode()
cases["heuristics"] = ctypes.c_int.in_dll(library, "heuristics").value if hasattr(library, "heuristics") else 0
np.savez(file + ".out", **cases)
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """The stand-in for cuBLASLt and a C function around linear_gelu.cpp."""
    if not COMPILER or sys.platform != "linux":
        pytest.skip("needs a C++ compiler on Linux")
    folder = tmp_path_factory.mktemp("cublaslt")
    command = [
        COMPILER,
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        ROOT / "tests/cublaslt_mock.cpp",
    ]
    soname = "-Wl,-soname,libcublasLt.so.13"
    subprocess.run([*command, soname, "-o", folder / "libcublasLt.so.13"], check=True)
    subprocess.run([*command, "-DDRIVER", ROOT / "csrc/linear_gelu.cpp", "-ldl", "-o", folder / "driver.so"], check=True)
    return folder


def run(libraries, tmp_path, cases, library=None, release=13):
    """{case: {name: bf16 tensor}} -> "case.name": what the C++ left there; "case.code": 1 is no algorithm; "case.message"."""
    file = tmp_path / "cases.npz"
    flat = {f"{case}.{name}": x for case, tensors in cases.items() for name, x in tensors.items() if x is not None}
    np.savez(file, **{name: x.contiguous().view(torch.int16).numpy() for name, x in flat.items()})
    library = libraries / "libcublasLt.so.13" if library is None else library
    subprocess.run([sys.executable, "-c", CHILD, libraries, file, library, str(release)], check=True)
    out = np.load(f"{file}.out.npz")
    return {k: torch.from_numpy(out[k]).view(torch.bfloat16) if k in flat else out[k].item() for k in out}


def problem(M, N, K, bias):
    x, w, b = torch.randn(M, K), torch.randn(N, K) * 2 / K**0.5, torch.randn(N)
    dy, w_proj = torch.randn(M, K), torch.randn(K, N) / K**0.5
    x, w, b, dy, w_proj = (t.bfloat16() for t in (x, w, b, dy, w_proj))
    return x, w, b if bias else None, dy, w_proj


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(("M", "N", "K"), [(5, 24, 16), (1, 8, 8), (24, 16, 40)])
def test_products(libraries, tmp_path, M, N, K, bias):
    """Operands, transposes and epilogues are those of our row-major matrices."""
    x, w, b, dy, w_proj = problem(M, N, K, bias)
    pre, post, dpre, dbias = exact_mlp(x, w, b, dy, w_proj)
    nan = torch.full((M, N), float("nan")).bfloat16()
    cases = {
        "forward": {"a": x, "w": w, "d": nan, "bias": b, "aux": nan},
        "inference": {"a": x, "w": w, "d": nan, "bias": b},
        "backward": {"a": dy, "w": w_proj, "d": nan, "bias": nan[0] if bias else None, "aux": pre.bfloat16()},
    }
    out = run(libraries, tmp_path, cases)
    assert [out[f"{case}.message"] for case in cases] == [""] * 3
    # One rounding to bf16 of fp64 sums; gelu' of the rounded argument backward.
    one = {"rtol": 2**-8, "atol": 1e-6}
    two = {"rtol": 2**-7, "atol": 2**-7 * dpre.abs().max().item()}
    torch.testing.assert_close(out["forward.d"].double(), post, **one)
    torch.testing.assert_close(out["forward.aux"].double(), pre, **one)
    torch.testing.assert_close(out["inference.d"].double(), post, **one)
    torch.testing.assert_close(out["backward.d"].double(), dpre, **two)
    if bias:
        torch.testing.assert_close(out["backward.bias"].double(), dbias, rtol=2**-7, atol=two["atol"] * M**0.5)
    assert out["heuristics"] == 3


def test_an_algorithm_is_chosen_once_per_shape_and_alignment(libraries, tmp_path):
    x, w, b, _, _ = problem(16, 16, 16, True)
    one = {"a": x, "w": w, "d": torch.empty_like(x), "bias": b}
    other = {"a": x[:8], "w": w, "d": torch.empty_like(x[:8]), "bias": b}
    out = run(
        libraries, tmp_path, {"first": one, "again": one, "other": other, "shifted": one, "shifted-again": one, "last": one}
    )
    assert out["heuristics"] == 3
    assert all(out[f"{case}.code"] == 0 for case in ("first", "again", "other", "shifted", "last"))


def test_no_algorithm_is_reported(libraries, tmp_path):
    x, w, b, _, _ = problem(77, 16, 16, True)  # the stand-in has none for 77 rows
    out = run(libraries, tmp_path, {"case": {"a": x, "w": w, "d": torch.empty_like(x), "bias": b}})
    assert out["case.code"] == 1
    assert out["case.message"] == "cuBLASLt has no algorithm for this shape (status 15)"


def test_no_library_is_reported(libraries, tmp_path):
    x, w, b, _, _ = problem(16, 16, 16, True)
    out = run(libraries, tmp_path, {"case": {"a": x, "w": w, "d": torch.empty_like(x), "bias": b}}, library="")
    assert out["case.code"] == 1
    assert out["case.message"] == "PyTorch has loaded no libcublasLt.so.13"


def test_another_release_than_pytorchs_is_not_taken(libraries, tmp_path):
    x, w, b, _, _ = problem(16, 16, 16, True)
    out = run(libraries, tmp_path, {"case": {"a": x, "w": w, "d": torch.empty_like(x), "bias": b}}, release=12)
    assert out["case.message"] == "PyTorch has loaded no libcublasLt.so.12"


def test_a_copy_that_pytorch_has_not_loaded_is_not_taken(libraries, tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(libraries))
    x, w, b, _, _ = problem(16, 16, 16, True)
    out = run(libraries, tmp_path, {"case": {"a": x, "w": w, "d": torch.empty_like(x), "bias": b}}, library="")
    assert out["case.message"] == "PyTorch has loaded no libcublasLt.so.13"


def test_the_real_library_takes_the_descriptions(libraries, tmp_path):
    """Every call up to the heuristic, which refuses the null handle (status 1, not initialized): no GPU is needed so far."""
    found = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/lib/libcublasLt.so.1[23]"))
    if not found:
        pytest.skip("no libcublasLt of pip's")
    x, w, b, dy, w_proj = problem(32, 64, 16, True)
    d, aux = torch.empty(2, 32, 64).bfloat16()
    cases = {
        "forward": {"a": x, "w": w, "d": d, "bias": b, "aux": aux},
        "forward-bare": {"a": x, "w": w, "d": d},
        "backward": {"a": dy, "w": w_proj, "d": d, "bias": torch.empty_like(d[0]), "aux": aux},
        "backward-nobias": {"a": dy, "w": w_proj, "d": d, "aux": aux},
    }
    out = run(libraries, tmp_path, cases, library=found[-1], release=found[-1].suffix[1:])
    message = "cuBLASLt has no algorithm for this shape (status 1)"
    assert {case: out[f"{case}.message"] for case in cases} == dict.fromkeys(cases, message)


def test_declarations_are_those_of_the_header():
    """Where pip's nvidia-cublas or the toolkit brings cublasLt.h."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: None)
        found = runpy.run_path(str(ROOT / "setup.py"))["find_cuda"]()
    folders = [found[0] / "include"] if found else []
    folders += sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/include"))
    if not COMPILER or not any((folder / "cublasLt.h").exists() for folder in folders):
        pytest.skip("no cublasLt.h, or no compiler")
    includes = [option for folder in folders for option in ("-isystem", folder)]
    subprocess.run([COMPILER, "-std=c++17", "-fsyntax-only", *includes, ROOT / "tests/cublaslt_header.cpp"], check=True)


# The MLP around it ---------------------------------------------------------------------------------------------------------


class Emulation:
    """The extension's two ops on CPU tensors, with what their C++ checks, and the arithmetic of the library."""

    def __init__(self, missing=""):
        self.missing, self.calls = missing, []

    def check(self, *tensors):
        for t in tensors:
            assert t is None or (t.is_contiguous() and t.dtype == tensors[0].dtype and t.data_ptr() % 16 == 0)

    def linear_gelu_(self, x, w, bias, post, pre):
        self.calls.append("forward")
        self.check(x, w, bias, post, pre)
        assert post.shape == (x.shape[0], w.shape[0])
        if not self.missing:
            argument = x.float() @ w.float().t() + (0 if bias is None else bias.float())
            post.copy_(F.gelu(argument, approximate="tanh"))
            if pre is not None:
                pre.copy_(argument)
        return self.missing

    def linear_dgelu_(self, dy, w, pre, dpre, dbias):
        self.calls.append("backward")
        self.check(dy, w, pre, dpre, dbias)
        assert dpre.shape == pre.shape == (dy.shape[0], w.shape[1])
        if not self.missing:
            gradient = torch.ops.aten.gelu_backward(dy.float() @ w.float(), pre.float(), approximate="tanh")
            dpre.copy_(gradient)
            if dbias is not None:
                dbias.copy_(gradient.sum(0))
        return self.missing


@pytest.fixture
def emulation(monkeypatch):
    """The cuda backend, asked for, on CPU tensors."""
    emulation = Emulation()
    monkeypatch.setattr(cublaslt, "_ops", emulation)
    monkeypatch.setattr(dispatch, "choose", lambda op, device_type: "cuda")
    dispatch._fallbacks.clear()
    yield emulation
    dispatch._fallbacks.clear()


def make(M, C, N, dtype, bias, device="cpu"):
    parameters = torch.randn(N, C) * 2 / C**0.5, torch.randn(N), torch.randn(C, N) / N**0.5, torch.randn(C)
    parameters = [p.to(device) if bias or p.dim() == 2 else None for p in parameters]
    x, dy = torch.randn(2, M, C, device=device).to(dtype)
    return x, parameters, dy


def step(op, x, parameters, dy, approximate="tanh"):
    x = x.detach().requires_grad_()
    parameters = [None if p is None else p.detach().requires_grad_() for p in parameters]
    y = op(x, *parameters, approximate)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in parameters if p is not None)]


def check(x, parameters, dy, results=None):
    ours = step(mlp.gelu_mlp, x, parameters, dy) if results is None else results
    same_dtype = step(mlp.gelu_mlp_ref, x, parameters, dy)
    doubles = [None if p is None else p.double() for p in parameters]
    exact = step(mlp.gelu_mlp_ref, x.double(), doubles, dy.double())
    for i, (a, b, c) in enumerate(zip(ours, same_dtype, exact, strict=True)):
        assert a.dtype == (x.dtype if i < 2 else torch.float32)
        assert_as_accurate(a, b, c, factor=2 if i == 0 else 3, atol=4 * torch.finfo(torch.float32).eps * c.abs().max().item())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_mlp(emulation, bias, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(*make(37, 48, 80, dtype, bias))
    assert emulation.calls == ["forward", "backward"]


def test_without_gradients_nothing_is_kept(emulation):
    x, parameters, _ = make(5, 16, 32, torch.bfloat16, True)
    with torch.no_grad():
        y = mlp.gelu_mlp(x, *parameters, "tanh")
    _, post, pre = mlp._mlp_fwd(x, *(p.bfloat16() for p in parameters), True, False, True)
    assert pre.shape == (0, 32)
    assert torch.equal(y, F.linear(post, parameters[2].bfloat16(), parameters[3].bfloat16()))


def test_empty_batch(emulation):
    y, dx, *grads = step(mlp.gelu_mlp, *make(0, 16, 32, torch.bfloat16, True))
    assert y.shape == dx.shape == (0, 16)
    assert all(g.eq(0).all() for g in grads)
    assert emulation.calls == []


def test_empty_weights_give_defined_results(emulation):
    x, w, bias = (torch.randn(*shape).bfloat16() for shape in ((5, 0), (32, 0), (32,)))
    with pytest.warns(RuntimeWarning, match="linear_gelu of 5 x 32 x 0: empty weights"):
        post, pre = cublaslt.linear_gelu(x, w, bias, True)
    assert torch.equal(pre, bias.expand(5, 32))
    assert torch.equal(post, F.gelu(pre, approximate="tanh"))
    with pytest.warns(RuntimeWarning, match="linear_dgelu of 5 x 32 x 0: empty weights"):
        dpre, dbias = cublaslt.linear_dgelu(x, w.t(), pre, True)
    assert torch.equal(dpre, torch.zeros(5, 32).bfloat16())
    assert torch.equal(dbias, torch.zeros(32))
    assert emulation.calls == []


def test_bias_gradient_in_fp16_does_not_overflow(emulation):
    dy, w, pre = torch.full((64, 8), 100.0).half(), torch.full((8, 16), 8.0).half(), torch.full((64, 16), 4.0).half()
    dpre, dbias = cublaslt.linear_dgelu(dy, w, pre, True)  # 64 values of 6,400: more than fp16's 65,504
    assert torch.equal(dbias, dpre.float().sum(0))
    assert dbias.min() > 4e5


def test_strided_and_expanded_inputs(emulation):
    x, parameters, dy = make(40, 48, 80, torch.bfloat16, True)
    parameters = [p.t().contiguous().t() if p.dim() == 2 else p for p in parameters]
    check(x.t().contiguous().t(), parameters, dy[:1].expand(40, 48))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_opcheck(emulation, bias):
    x, parameters, dy = make(37, 48, 80, torch.bfloat16, bias)
    shadows = [None if p is None else p.bfloat16() for p in parameters]
    torch.library.opcheck(mlp._mlp_fwd, (x, *shadows, True, True, True))
    post, pre = torch.randn(2, 37, 80).bfloat16()
    torch.library.opcheck(mlp._mlp_bwd, (dy, x, post, pre, shadows[0], shadows[2], bias, bias, True))


def test_compiles_into_a_graph(emulation):
    inputs = make(37, 48, 80, torch.bfloat16, True)
    compiled = torch.compile(mlp.gelu_mlp, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(step(mlp.gelu_mlp, *inputs), step(compiled, *inputs), strict=True))


def test_without_an_algorithm_the_results_stand_and_it_is_said_once(emulation):
    emulation.missing = "cuBLASLt has no algorithm for this shape (status 15)"
    inputs = make(37, 48, 80, torch.bfloat16, True)
    with pytest.warns(
        RuntimeWarning, match="gelu_mlp: torch instead of cuda for linear_d?gelu of 37 x 80 x 48: cuBLASLt has no alg"
    ):
        check(*inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(*inputs)
    assert "torch instead of cuda for linear_gelu of 37 x 80 x 48" in dispatch.explain("cpu")["gelu_mlp"][1]


def test_widths_and_addresses_that_do_not_fit_are_not_asked_for(emulation):
    with pytest.warns(RuntimeWarning, match=r"\((35, 48|48, 35)\) weights: no multiples of 8"):
        check(*make(37, 48, 35, torch.bfloat16, True))
    x, parameters, dy = make(37, 48, 80, torch.bfloat16, True)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    with pytest.warns(RuntimeWarning, match="matrices that do not begin at a multiple of 16 bytes"):
        check(shifted, parameters, dy)
    assert emulation.calls == ["backward"]


@pytest.mark.parametrize(
    ("dtype", "approximate", "reason"),
    [
        (torch.bfloat16, "none", "cuBLASLt's GELU is the tanh form, the model's is erf"),
        (torch.float32, "tanh", "for bf16 and fp16, not float32"),
    ],
    ids=["erf", "fp32"],
)
def test_what_it_does_not_cover_runs_elsewhere_and_is_said(emulation, monkeypatch, dtype, approximate, reason):
    monkeypatch.setattr(dispatch, "PREFERENCE", {**dispatch.PREFERENCE, "gelu_mlp": ("torch", "cuda")})
    x, parameters, _ = make(5, 16, 32, dtype, True)
    with pytest.warns(RuntimeWarning, match=re.escape(f"gelu_mlp: torch instead of cuda for {reason}")):
        y = mlp.gelu_mlp(x, *parameters, approximate)
    assert torch.equal(y, mlp.gelu_mlp_ref(x, *parameters, approximate))
    assert emulation.calls == []


def test_it_runs_on_request_only_and_its_limits_are_told(monkeypatch):
    monkeypatch.setattr(dispatch, "_unavailable", lambda op, backend, device_type: "" if backend in ("torch", "cuda") else "no")
    dispatch.use("auto")
    assert dispatch.choose("gelu_mlp", "cuda") == "torch"
    dispatch.use("cuda")
    assert dispatch.explain("cuda")["gelu_mlp"] == ("cuda", "asked for; tanh GELU in bf16 and fp16 only")


def test_a_missing_library_is_the_reason(monkeypatch):
    monkeypatch.setattr(extension, "_load", lambda backend: "")
    monkeypatch.setattr(torch, "ops", SimpleNamespace(nanogpt=SimpleNamespace(linear_gelu_load="no libcublasLt.so.{}".format)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    extension.unavailable.cache_clear()
    try:
        assert extension.unavailable("gelu_mlp", "cuda") == "no libcublasLt.so.13"
        assert extension.unavailable("adamw", "cuda") == ""
    finally:
        extension.unavailable.cache_clear()


# On a GPU ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu():
    missing = extension.unavailable("gelu_mlp", "cuda")
    if missing:
        pytest.skip(missing)
    dispatch.use("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(("M", "C"), [(1000, 768), (4096, 1024), (37, 48), (1, 16), (999, 1600)])
def test_on_gpu(on_gpu, M, C, bias, dtype):
    check(*make(M, C, 4 * C, dtype, bias, "cuda"))


@pytest.mark.gpu
def test_gpt2_shapes_have_algorithms(on_gpu):
    for C in (768, 1024, 1280, 1600):
        for bias in (True, False):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                step(mlp.gelu_mlp, *make(2048, C, 4 * C, torch.bfloat16, bias, "cuda"))


@pytest.mark.gpu
def test_opcheck_on_gpu(on_gpu):
    x, parameters, dy = make(40, 48, 80, torch.bfloat16, True, "cuda")
    shadows = [p.bfloat16() for p in parameters]
    torch.library.opcheck(mlp._mlp_fwd, (x, *shadows, True, True, True))
    post, pre = torch.randn(2, 40, 80, device="cuda").bfloat16()
    torch.library.opcheck(mlp._mlp_bwd, (dy, x, post, pre, shadows[0], shadows[2], True, True, True))


@pytest.mark.gpu
def test_cuda_graph_capture(on_gpu):
    x, parameters, dy = make(256, 768, 3072, torch.bfloat16, True, "cuda")
    leaves = [x.requires_grad_(), *(p.requires_grad_() for p in parameters)]

    def run():
        return torch.autograd.grad(mlp.gelu_mlp(x, *parameters, "tanh"), leaves, dy)

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
def test_first_call_may_be_inside_a_capture(on_gpu):
    x, parameters, _ = make(136, 264, 520, torch.bfloat16, True, "cuda")  # a shape of this test's own
    torch.mm(x, x.t())  # PyTorch's own cuBLAS must be up
    shadows = [p.bfloat16() for p in parameters]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = mlp._mlp_fwd(x, *shadows, True, True, True)
    graph.replay()
    eager = mlp._mlp_fwd(x, *shadows, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
