"""How the functions of this folder become ops: opaque to torch.compile, with a schema, under their names in a profile.

What ``torch.library.custom_op`` does, without the Python that it runs around each call. An op has no gradient of its own: where
one may be asked for, a ``torch.autograd.Function`` calls it.
"""

import functools
from collections.abc import Callable

import torch

_nanogpt = torch.library.Library("nanogpt", "FRAGMENT")
bodies: dict[torch._ops.OpOverload, Callable] = {}  # the function behind each op


def custom_op(name: str) -> Callable[[Callable], torch._ops.OpOverload]:
    """Decorates a function of tensors, none of which it changes or returns: makes it ``torch.ops.nanogpt.NAME`` and gives that.

    The annotations are its schema. It needs a ``torch.library.register_fake`` beside it.
    """

    def define(function: Callable) -> torch._ops.OpOverload:
        schema = torch.library.infer_schema(function, mutates_args=())
        _nanogpt.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _nanogpt.impl(name, function, "CompositeExplicitAutograd")
        defined = getattr(torch.ops.nanogpt, name).default
        bodies[defined] = function
        return defined

    return define


def once_differentiable(backward: Callable) -> Callable:
    """Of a Function that has no second derivatives. PyTorch's decorator of this name notices only some that are asked for: not
    those through what was saved, whose share of the gradient would be missing without a word."""

    @functools.wraps(backward)
    def checked(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise RuntimeError("the kernels have no second derivatives; kernels=torch takes PyTorch's, where it has them")
        return backward(ctx, *grads)

    return checked
