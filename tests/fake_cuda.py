"""A GPU that is not there: real code on fake CUDA tensors, under the rules by which a real GPU runs beside its host.

Tensors have shapes, dtypes and devices but no values. What the fake GPU notes, or refuses with AssertionError:

- `syncs`: each time the host would wait for the device (a value read, a copy that is not asynchronous), by the function of
  `nanogpt` or `kernels` in which it happens.
- work that reads or overwrites what another stream has not finished for certain, or whose memory might be reused;
- a host buffer read before its copy has arrived, or filled again while it is still being copied;
- tensors of the host where tensors of the device belong;
- under deterministic algorithms, ops that refuse to run on CUDA then.

Time is counted in works per stream; "seen" is what is finished for certain before a stream's next work, or for the host.
"""

import contextlib
import ctypes
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget

aten = torch.ops.aten
IMPLEMENTATION = "CompositeExplicitAutograd"  # the dispatch key of ops in Python
# They return nothing new. PyTorch 2.11 has a fake of the second, which takes no beta
WITHOUT_FAKE = {aten._fused_adamw_.tensor_lr, aten.addmm.dtype_out}
# Of those that torch.use_deterministic_algorithms() names, what a language model might call
REFUSED = {
    "cumsum",
    "cumsum_",
    "put",
    "put_",
    "histc",
    "bincount",
    "kthvalue",
    "median",
    "nll_loss2d_forward",
    "scatter_reduce",
}
ROOT = Path(__file__).parent.parent


def build_guard(folder: Path) -> str:
    """Why fake CUDA tensors cannot be differentiated here; empty where they can, after a compilation of seconds."""
    if torch.version.cuda is not None:
        return ""
    library = folder / "fake_cuda.so"
    home = Path(torch.__file__).parent
    command = ["c++", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(ROOT / "tests" / "fake_cuda.cpp")]
    try:
        subprocess.run([*command, "-o", str(library), f"-L{home / 'lib'}", "-lc10"], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        return "no C++ compiler"
    ctypes.CDLL(str(library))
    return ""


def _later(a: dict, b: dict) -> dict:
    return {stream: max(a.get(stream, 0), b.get(stream, 0)) for stream in a | b}


class Stream:
    def __init__(self, gpu: "FakeGPU"):
        self.gpu, self.works, self.seen = gpu, 0, {}

    def now(self) -> dict:
        """What is finished once all work that this stream was given is."""
        return self.seen | {self: self.works}

    def wait_event(self, event: "Event") -> None:
        self.seen = _later(self.seen, event.done)

    def wait_stream(self, other: "Stream") -> None:
        self.seen = _later(self.seen, other.now())

    def synchronize(self) -> None:
        self.gpu.sync()
        self.gpu.host = _later(self.gpu.host, self.now())


class Event:
    def __init__(self, gpu: "FakeGPU"):
        self.gpu, self.done = gpu, {}

    def record(self) -> None:
        self.done = self.gpu.current.now()

    def synchronize(self) -> None:
        self.gpu.waits[_where()] += 1
        self.gpu.host = _later(self.gpu.host, self.done)


def _where() -> str:
    """The innermost function of the product on the stack: ``train.evaluate``."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if any(path.is_relative_to(ROOT / package) for package in ("nanogpt", "kernels")):
            return f"{path.stem}.{frame.f_code.co_qualname.split('.<locals>')[0]}"
        frame = frame.f_back
    return "?"


class FakeGPU(TorchDispatchMode):
    """Active as a context; inside of it, `torch.cuda` is this GPU's.

    Args:
        capability: (9, 0) for an H100.
        compiles: whether Triton compiles the kernels that it would launch, which takes seconds each.

    Attributes:
        syncs: waits for all that the device was given, by function.
        waits: waits for an event, by function.
        launches: how often each Triton kernel would run.
        shared_memory: of each Triton kernel, the most bytes of a program.
    """

    def __init__(self, monkeypatch, capability: tuple[int, int] = (9, 0), compiles: bool = False):
        super().__init__()
        self.patch, self.capability, self.compiles = monkeypatch, capability, compiles
        self.syncs, self.waits, self.launches, self.shared_memory = Counter(), Counter(), Counter(), Counter()
        self.main = self.current = Stream(self)
        self.host = {}  # what the host knows to be finished
        self.last = {}  # by storage: (stream, its work) that wrote it last, stream that owns its memory, storage
        self.used = {}  # by storage of the host: what the device does with it
        self.pinned, self.shared = {}, set()  # storages; (storage, stream) that record_stream named
        self.fake = FakeTensorMode()

    def __enter__(self):
        cuda = {
            "device_count": lambda: 1,
            "set_device": lambda device: None,
            "current_device": lambda: 0,
            "device_of": lambda t: contextlib.nullcontext(),
            "current_stream": lambda device=None: self.current,
            "Stream": lambda device=None: Stream(self),
            "Event": lambda **options: Event(self),
            "stream": self._stream,
            "get_device_capability": lambda device=None: self.capability,
            "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
            "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=132, uuid="none"),
            "is_bf16_supported": lambda including_emulation=True: self.capability >= (8, 0),
            "max_memory_allocated": lambda device=None: 0,
            "mem_get_info": lambda device=None: (0, 0),
            "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
            "manual_seed_all": lambda seed: None,
        }
        for name, function in cuda.items():
            self.patch.setattr(torch.cuda, name, function)
        target = GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)
        driver = {"target": target, "device": target.arch, "stream": 0}  # Triton keeps what it compiled by device
        driver = {f"get_current_{name}": lambda *_, value=value: value for name, value in driver.items()}
        self.patch.setattr(triton.runtime.driver, "_active", SimpleNamespace(**driver))
        run = triton.JITFunction.run
        self.patch.setattr(
            triton.JITFunction, "run", lambda kernel, *args, **options: self.launch(run, kernel, *args, **options)
        )
        if not self.compiles:
            self.patch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **variant: True)
        self.patch.setattr(Tensor, "record_stream", lambda t, stream: self.shared.add((_storage(t), stream)))
        self.patch.setattr(Tensor, "backward", backward)
        self.patch.setattr(FakeTensor, "tolist", lambda t: _nested(self._value(t), t.shape))
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    @contextlib.contextmanager
    def _stream(self, stream: Stream):
        self.current, before = stream, self.current
        try:
            yield
        finally:
            self.current = before

    def sync(self) -> None:
        self.syncs[_where()] += 1

    def fill(self, batch: Tensor, *_) -> None:
        """In place of `loader._fill`: the host writes to a buffer."""
        self._finished(batch, "is filled while it is still being copied")

    def _finished(self, t: Tensor, complaint: str) -> None:
        stream, work = self.used.get(_storage(t), (self.main, 0))
        assert self.host.get(stream, 0) >= work, f"{_where()}: a buffer of the host {complaint}"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._value(*args)
        out = kwargs.get("out") if func in WITHOUT_FAKE else func(*args, **kwargs)
        if kwargs.get("pin_memory"):
            self.pinned[_storage(out)] = out.untyped_storage()
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if func.namespace == "prim" or not any(t.is_cuda for t in given + made):
            return out
        refused = torch.are_deterministic_algorithms_enabled() and func.overloadpacket.__name__ in REFUSED
        assert not refused, f"{_where()}: {func} is not deterministic"
        self._work(func, args, given, made)
        hosts = [t for t in given + made if not t.is_cuda]
        if func.overloadpacket in (aten.copy_, aten._to_copy):
            for host in hosts[:1]:
                self._copy(host, kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))
        else:
            strangers = [tuple(t.shape) for t in hosts if t.dim() or func.namespace == "nanogpt"]
            assert not strangers, f"{_where()}: {func} of tensors on the device and {strangers} on the host"
        if func.namespace == "nanogpt" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), IMPLEMENTATION):
            self._implementation(func, args, kwargs, out)
        return out

    def _implementation(self, func, args: tuple, kwargs: dict, out: object) -> None:
        """What torch.compile sees of an op must be what its Python makes, up to the launches."""
        super().__enter__()  # its ops are under the same rules
        try:
            made = func._op_dk(IMPLEMENTATION, *args, **kwargs)
        finally:
            super().__exit__(None, None, None)
        for ours, theirs in zip(tree_leaves(out), tree_leaves(made), strict=True):
            assert _layout(ours) == _layout(theirs), f"{func}: {_layout(theirs)} and its fake {_layout(ours)}"

    def launch(self, run, kernel, *args, grid: tuple[int, ...], warmup: bool, **options) -> None:
        """In place of ``kernel[grid](...)``: everything but the launch."""
        name = f"{kernel.__module__.removeprefix('kernels.')}.{kernel.__name__}"
        tensors = [getattr(x, "base", x) for x in (*args, *options.values())]  # of a descriptor
        assert all(t.is_cuda for t in tensors if isinstance(t, Tensor)), f"{name}: a tensor on the host"
        assert all(0 < n < 2**31 for n in grid), f"{name}: a grid of {grid}"
        self.launches[name] += 1
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        if compiled is not None:
            self.shared_memory[name] = max(self.shared_memory[name], compiled.metadata.shared)

    def _value(self, t: Tensor) -> int:
        """The host reads a value: 1 of the device's, 0 of one that was copied for it."""
        if t.is_cuda:
            self.sync()
            return 1
        assert _storage(t) in self.pinned, f"{_where()}: a value of the host that this fake does not know"
        self._finished(t, "is read before its copy has arrived")
        return 0

    def _work(self, func, args: tuple, given: list[Tensor], made: list[Tensor]) -> None:
        """The current stream does something with tensors of the device."""
        now = self.current
        for t in given:
            if _storage(t) in self.last:
                stream, work, owner, _ = self.last[_storage(t)]
                assert stream is now or now.seen.get(stream, 0) >= work, f"{_where()}: {func} does not wait for another stream"
                shared = owner is now or (_storage(t), now) in self.shared
                assert shared, f"{_where()}: {func}: memory of another stream, without record_stream"
        now.works += 1
        written = [a for a, s in zip(args, func._schema.arguments) if s.alias_info and s.alias_info.is_write]
        written = [t for t in tree_leaves(written) if isinstance(t, Tensor)]
        for t in written + [t for t in made if _storage(t) not in self.last]:
            if t.is_cuda:
                owner = self.last.get(_storage(t), (0, 0, now))[2]
                self.last[_storage(t)] = now, now.works, owner, t.untyped_storage()

    def _copy(self, host: Tensor, asynchronous: bool) -> None:
        """Between host and device."""
        if asynchronous and _storage(host) in self.pinned:
            self.used[_storage(host)] = self.current, self.current.works
        else:
            self.sync()


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _layout(t: Tensor) -> tuple:
    return tuple(t.shape), t.stride(), t.dtype, t.device


def _nested(value: int, shape: torch.Size) -> list | int:
    return [_nested(value, shape[1:])] * shape[0] if shape else value


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """``loss.backward()`` without the engine, whose threads and streams are a real device's: node after node."""
    root = loss.grad_fn
    waiting, stack = Counter(), [root]
    found = {root}
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in found:
                    found.add(node)
                    stack.append(node)
    grads = {root: {0: torch.ones_like(loss)}}
    ready = [root]
    while ready:
        node = ready.pop()
        given = grads.pop(node, {})
        if hasattr(node, "variable"):
            p = node.variable
            assert given[0].dtype == p.dtype, f"{given[0].dtype} gradient of a {p.dtype} parameter"
            assert given[0].device == p.device, f"gradient on {given[0].device} of a parameter on {p.device}"
            p.grad = given[0] if p.grad is None else p.grad.add_(given[0])
            continue
        inputs = [given.get(i) for i in range(len(node._input_metadata))]
        out = (node.apply if hasattr(node, "apply") else node)(*inputs)
        out, edges = out if isinstance(out, tuple) else (out,), node.next_functions
        if hasattr(node, "apply"):  # a function in Python answers for arguments that are no tensors too
            out, edges = itertools.compress(out, node.needs_input_grad), (edge for edge in edges if edge[0] is not None)
        for (following, index), grad in zip(edges, out, strict=True):
            if following is None:
                continue
            if grad is not None:
                slot = grads.setdefault(following, {})
                slot[index] = slot[index] + grad if index in slot else grad
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
