"""Types of a kernel's arguments as the driver's JIT derives them at a launch, for compiling the same variant without a GPU."""

from typing import Any

import torch
from torch import Tensor

from kernels.configs import AotCase
from kernels.triton_compat import TensorDescriptor

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}


def case(name: str, kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> AotCase:
    """The variant that `kernel[grid](**arguments, **options)` compiles; tensors may be on the meta device."""
    signature, constants, aligned = {}, {}, []
    for (argument, x), parameter in zip(arguments.items(), kernel.params):
        assert argument == parameter.name, f"{argument} passed for {parameter.name}"
        if parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1):
            constants[argument] = x
        elif isinstance(x, TensorDescriptor):
            signature[argument] = f"tensordesc<{_TYPES[x.base.dtype]}{x.block_shape}>"
        elif isinstance(x, float):
            signature[argument] = "fp32"
        else:
            signature[argument] = f"*{_TYPES[x.dtype]}" if isinstance(x, Tensor) else "i32"
            if (x.data_ptr() if isinstance(x, Tensor) else x) % 16 == 0:
                aligned.append(argument)
    return AotCase(name, kernel, signature, constants, options, tuple(aligned))
