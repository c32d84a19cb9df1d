import pytest
import torch

from kernels import dispatch, extension
from tests.helpers import INTERPRET


def test_torch_can_be_asked_for_everywhere():
    dispatch.use("torch")
    for op, (backend, reason) in dispatch.explain("cpu").items():
        assert (backend, reason) == ("torch", "asked for"), op


def test_auto_says_why_a_better_backend_is_not_used():
    dispatch.use("auto")
    backend, reason = dispatch.explain("cpu")["embedding"]
    if INTERPRET:
        assert (backend, reason) == ("triton", "first choice on this device")
    else:
        assert backend == "torch"
        assert "no triton" in reason


@pytest.mark.skipif(INTERPRET, reason="the interpreter runs Triton on the CPU")
def test_a_backend_that_cannot_run_is_an_error_not_a_fallback():
    dispatch.use("triton")
    with pytest.raises(ValueError, match="kernels=triton: attention on cpu"):
        dispatch.choose("attention", "cpu")


def test_an_op_without_the_backend_asked_for_says_so():
    backend, reason = dispatch._resolve("adamw", "cpu", "triton")
    assert backend != "triton"
    assert reason.startswith("adamw has no triton backend")


def test_what_runs_is_found_out_once_for_each_request(monkeypatch):
    """A benchmark switches at every call: that costs no search."""
    asked = []
    unavailable = dispatch._unavailable
    monkeypatch.setattr(dispatch, "_unavailable", lambda *call: asked.append(call) or unavailable(*call))
    counts = []
    for backend in ("auto", "torch") * 3:
        dispatch.use(backend)
        dispatch.choose("layer_norm", "cpu")
        counts.append(len(asked))
    assert 0 < counts[0] < counts[1] == counts[-1]


def test_a_compiled_backend_that_loads_can_be_asked_for(monkeypatch):
    """Every op then runs on it or says that it has none."""
    monkeypatch.setattr(extension, "unavailable", lambda op, backend: "" if op in extension.OPS[backend] else f"no {op}")
    for backend, device in (("cuda", "cuda"), ("cpp", "cpu")):
        dispatch.use(backend)
        for op, order in dispatch.PREFERENCE.items():
            if backend in order:
                assert dispatch.choose(op, device) == backend, op


def test_unknown_backend():
    with pytest.raises(ValueError, match="kernels=tritno: expected one of auto"):
        dispatch.use("tritno")


def test_unknown_backend_in_the_environment(monkeypatch):
    monkeypatch.setattr(dispatch, "_requested", "tritno")
    with pytest.raises(ValueError, match="NANOGPT_KERNELS=tritno: expected one of auto"):
        dispatch.choose("attention", "cpu")


def test_choice_is_a_constant_under_compile(monkeypatch):
    resolve = dispatch._resolve

    def untraceable(*args):
        torch._dynamo.graph_break()
        return resolve(*args)

    monkeypatch.setattr(dispatch, "_resolve", untraceable)
    dispatch.use("torch")

    @torch.compile(fullgraph=True, backend="eager")
    def f(x):
        return x + 1 if dispatch.choose("attention", x.device.type) == "torch" else x

    assert f(torch.zeros(1)).item() == 1
