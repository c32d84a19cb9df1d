"""What nvcc makes of every .cu file, without a GPU: strict warnings, no spills, 128-bit accesses, for sm_80 and sm_90a."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools

from kernels import report_cuda

SOURCES = sorted(report_cuda.CSRC.glob("*.cu"))
# Kernels that stream through memory, in 128-bit accesses: those whose name matches must hold these.
VECTORS = {
    "adamw_kernel": ("LDG", "STG"),
    "partial_kernel": ("LDG",),
    r"rows_kernelI.*Li[48]E": ("LDG", "STG"),
    r"rows_kernelI.*Li[48]ELb1E": ("LDS", "STS"),
}


@pytest.fixture(scope="module")
def compilers():
    """nvcc and cuobjdump."""
    nvcc, _ = report_cuda.find_nvcc()
    cuobjdump = nvcc and report_cuda.find_cuobjdump(nvcc)
    return (nvcc, cuobjdump) if cuobjdump else pytest.skip("no nvcc, or no cuobjdump")


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize("arch", report_cuda.ARCHS, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_compiles_clean(source, arch, compilers):
    kernels = report_cuda.compile_source(source, arch, *compilers)
    assert kernels
    for k in kernels:
        assert 0 < k.registers <= 255, k.name
        assert (k.stack, k.spills) == (0, 0), k.name
        for pattern, kinds in VECTORS.items():
            if re.search(pattern, k.name):
                assert {kind: k.accesses[kind] for kind in kinds} == dict.fromkeys(kinds, 128), k.name


@pytest.mark.aot
@pytest.mark.slow
def test_warnings_and_spills_are_errors(compilers, tmp_path, monkeypatch, capsys):
    source = tmp_path / "bad.cu"
    source.write_text("__global__ void f(float* x) { int unused; *x = 1; }\n")
    with pytest.raises(RuntimeError, match=r"bad\.cu for sm_80: .*unused"):
        report_cuda.compile_source(source, "80", *compilers)
    source.write_text("""
        __global__ void __launch_bounds__(1024, 2) spilling_kernel(float* x) {  // 32 registers a thread for 64 values
          float v[64];
        #pragma unroll
          for (int i = 0; i < 64; ++i) v[i] = x[threadIdx.x + 1024 * i];
          __syncthreads();
        #pragma unroll
          for (int i = 0; i < 64; ++i) x[threadIdx.x * 64 + i] = v[i] * v[63 - i];
        }
    """)
    monkeypatch.setattr(report_cuda, "CSRC", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report_cuda", "--arch", "80", "--only", "spilling"])
    assert report_cuda.main() == 1
    assert "spilling_kernel" in capsys.readouterr().out


def test_widest_accesses():
    sass = "LDG.E.U16 R1 ; LDG.E.64.CONSTANT R2 ; STG.E R3 ; LDS.128 R4 ; STS.U8 R5 ; LDGSTS.E.128 R6 ; LDG.E.U8 R7"
    kernel = report_cuda.Kernel("k", 32, 0, 0, 0, sass)
    assert kernel.accesses == {"LDG": 64, "STG": 32, "LDS": 128, "STS": 8}


def test_without_nvcc(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report_cuda"])
    monkeypatch.setattr(report_cuda, "find_nvcc", lambda: ("", ""))
    assert report_cuda.main() == 2
    assert capsys.readouterr().err == "report_cuda: no nvcc (set CUDA_HOME)\n"


def test_without_cuobjdump(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report_cuda"])
    monkeypatch.setattr(report_cuda, "find_nvcc", lambda: ("/cuda/bin/nvcc", "13.0"))
    monkeypatch.setattr(report_cuda, "find_cuobjdump", lambda nvcc: "")
    assert report_cuda.main() == 2
    assert capsys.readouterr().err == "report_cuda: no cuobjdump\n"


def compiled(spills):
    return lambda *arguments: [report_cuda.Kernel("adamw_kernel", 32, 0, 0, spills, "")]


def fails(*arguments):
    raise RuntimeError("adamw.cu for sm_80: error: expected a ';'")


@pytest.mark.parametrize(
    ("compile_source", "only", "code", "message"),
    [
        (compiled(0), "adamw", 0, ""),
        (compiled(8), "adamw", 1, ""),
        (
            lambda *arguments: [report_cuda.Kernel("adamw_kernel", 32, 0, 0, 8, "")],
            "nome",
            2,
            "report_cuda: --only nome: no kernel's name contains it\n",
        ),
        (fails, "", 2, "report_cuda: adamw.cu for sm_80: error: expected a ';'\n"),
    ],
    ids=["clean", "spills", "no-match", "no-compile"],
)
def test_exit_codes(monkeypatch, capsys, compile_source, only, code, message):
    monkeypatch.setattr(sys, "argv", ["report_cuda", "--only", only])
    monkeypatch.setattr(report_cuda, "find_nvcc", lambda: ("/cuda/bin/nvcc", "13.0"))
    monkeypatch.setattr(report_cuda, "find_cuobjdump", lambda nvcc: "/cuda/bin/cuobjdump")
    monkeypatch.setattr(report_cuda, "compile_source", compile_source)
    assert report_cuda.main() == code
    assert capsys.readouterr().err == message


@pytest.fixture
def toolkit(tmp_path):
    """A stand-in for nvcc in a home of its own, and a wrapper of it in another folder."""
    home, wrapper = tmp_path / "cuda", tmp_path / "wrapper" / "nvcc"
    for path, text in (
        (home / "bin" / "nvcc", f"echo '#$ _HERE_={home}/bin' >&2; echo 'Cuda compilation tools, release 12.9, V12.9.1'"),
        (wrapper, f'exec "{home}/bin/nvcc" "$@"'),
    ):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    return home, wrapper.parent


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_the_one_that_setup_takes(monkeypatch, toolkit, variable):
    home, wrapper = toolkit
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(wrapper if variable == "PATH" else home))
    assert report_cuda.find_nvcc() == (f"{home}/bin/nvcc", "12.9")
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    setup = runpy.run_path(str(Path(__file__).parent.parent / "setup.py"))
    assert setup["find_cuda"]() == (home, "12.9")


def test_an_nvcc_that_does_not_run_is_none(monkeypatch, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").write_text("")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert report_cuda.find_nvcc() == ("", "")


def test_every_pattern_names_a_kernel():
    text = "".join(s.read_text() for s in SOURCES)
    assert all(re.match(r"\w+?_kernel", pattern)[0] + "(" in text for pattern in VECTORS)
