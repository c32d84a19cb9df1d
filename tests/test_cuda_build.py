"""What nvcc makes of every .cu file, without a GPU: strict warnings, no spills, 128-bit accesses, for sm_80 and sm_90a."""

import importlib.util
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import setuptools

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
# Kernels that stream through memory, in 128-bit accesses: those whose name matches must hold these instructions.
VECTORS = {
    "adamw_kernel": ("LDG.E.128", "STG.E.128"),
    "partial_kernel": ("LDG.E.128",),
    r"rows_kernelI.*Li[48]E": ("LDG.E.128", "STG.E.128"),
    r"rows_kernelI.*Li[48]ELb1E": ("LDS.128", "STS.128"),
}

pytestmark = [pytest.mark.aot, pytest.mark.slow]


@pytest.fixture(scope="module")
def cuda_home():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: None)
        found = runpy.run_path(str(CSRC.parent / "setup.py"))["find_cuda"]()
    if found is None:
        pytest.skip("no nvcc")
    return found[0]


@pytest.fixture(scope="module")
def cuobjdump(cuda_home):
    """The toolkit's own, or the one that Triton brings."""
    candidates = [cuda_home / "bin" / "cuobjdump"]
    spec = importlib.util.find_spec("triton")
    if spec:
        candidates.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = next((c for c in candidates if c.exists()), None)
    return found or pytest.skip("no cuobjdump")


@pytest.mark.parametrize("arch", ["80", "90a"], ids=["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda s: s.name)
def test_compiles_clean(source, arch, cuda_home, cuobjdump, tmp_path):
    cubin = tmp_path / "out.cubin"
    flags = ["-O3", "-std=c++17", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", "-Xptxas", "-v"]
    command = [cuda_home / "bin" / "nvcc", *flags, f"-arch=sm_{arch}", "-cubin", source, "-o", cubin]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'", result.stderr)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert kernels
    assert len(spills) == len(kernels)
    assert all(spill == ("0", "0", "0") for spill in spills), result.stderr

    sass = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\t\tFunction|\Z)", sass, re.DOTALL))
    assert set(bodies) == set(kernels)
    for pattern, instructions in VECTORS.items():
        for name, body in bodies.items():
            if re.search(pattern, name):
                assert [i for i in instructions if i not in body] == [], name


def test_every_pattern_names_a_kernel():
    text = "".join(s.read_text() for s in SOURCES)
    assert all(re.match(r"\w+?_kernel", pattern)[0] + "(" in text for pattern in VECTORS)
