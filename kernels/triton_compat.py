"""Triton where it is installed, which is on Linux; elsewhere a stand-in, so that the PyTorch references run anywhere.

Under the stand-in the decorators, annotations and constants of a kernel file evaluate to nothing of use. No launch is
reached: `dispatch` knows :data:`INSTALLED`.
"""

import os

# Kernels count on products and sums that become one instruction: Triton's default until 3.10, of which 3.9 warns
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
except ModuleNotFoundError as error:
    if error.name != "triton":  # there, but broken
        raise
    INSTALLED = False
else:
    INSTALLED = True


class _Absent:
    """Any attribute of it, and what a call of it gives, is itself."""

    def __getattr__(self, name: str) -> "_Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs) -> "_Absent":
        return self


if INSTALLED:
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia import hopper
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    triton = tl = gluon = gl = hopper = TensorDescriptor = GluonTensorDescriptor = _Absent()


# As Triton's own, which also take constants of kernels and therefore some microseconds.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


__all__ = [
    "INSTALLED",
    "GluonTensorDescriptor",
    "TensorDescriptor",
    "cdiv",
    "gl",
    "gluon",
    "hopper",
    "next_power_of_2",
    "tl",
    "triton",
]
