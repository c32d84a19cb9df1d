"""AdamW and the gradient norm of every backend that this machine has, against PyTorch in fp64."""

import pytest
import torch

from kernels import dispatch, extension
from kernels.linear import shadow
from kernels.optimizer import adamw_step, grad_norm
from tests.helpers import DEVICE, assert_as_accurate

BETAS, EPS = (0.9, 0.95), 1e-8
COMPILED = "cuda" if DEVICE == "cuda" else "cpp"
# Empty, one element, odd, a multiple of the vector, of the chunk of 1,024, one past it.
SHAPES = [(), (0,), (1,), (3,), (37, 11), (64, 16), (1024,), (1025,), (5, 1024)]


@pytest.fixture(params=["torch", COMPILED])
def backend(request):
    if request.param != "torch" and (missing := extension.unavailable("adamw", request.param)):
        pytest.skip(missing)
    dispatch.use(request.param)
    return request.param


def tensors(shapes, scale=1.0, dtype=torch.float32):
    return [torch.randn(s, device=DEVICE, dtype=dtype) * scale for s in shapes]


class Run:
    """One set of parameters under our AdamW; every second one decays."""

    def __init__(self, params):
        self.params = [p.clone() for p in params]
        self.exp_avgs = [torch.zeros_like(p) for p in params]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in params]
        self.decays = [0.1 * (i % 2) for i in range(len(params))]
        self.lr = torch.tensor(1e-2, device=DEVICE)
        self.steps = torch.zeros((), device=DEVICE)

    def step(self, grads, **options):
        adamw_step(
            self.params, grads, self.exp_avgs, self.exp_avg_sqs, lr=self.lr, step=self.steps,
            beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decays=self.decays, **options,
        )  # fmt: skip

    def state(self):
        return [t.clone() for t in (*self.params, *self.exp_avgs, *self.exp_avg_sqs, self.steps)]


def torch_adamw(params, dtype):
    """torch.optim.AdamW over copies in `dtype`, with the decay of Run."""
    copies = [p.to(dtype).clone().requires_grad_() for p in params]
    groups = [{"params": copies[k::2], "weight_decay": 0.1 * k} for k in (0, 1)]
    return copies, torch.optim.AdamW(groups, lr=1e-2, betas=BETAS, eps=EPS, foreach=True)


def test_500_steps_like_torch(backend):
    """As close to AdamW in fp64 as torch.optim.AdamW in fp32 is, with clipping, decay groups and a moving learning rate."""
    params = tensors(SHAPES)
    ours = Run(params)
    exact, exact_optimizer = torch_adamw(params, torch.float64)
    plain, plain_optimizer = torch_adamw(params, torch.float32)
    for i in range(500):
        lr = 1e-2 * (0.5 + 0.5 * (i % 7) / 7)
        grads = tensors(SHAPES, scale=10.0 ** (i % 3 - 2))
        for copies, optimizer in ((exact, exact_optimizer), (plain, plain_optimizer)):
            for p, g in zip(copies, grads, strict=True):
                p.grad = g.to(p.dtype)
            torch.nn.utils.clip_grad_norm_(copies, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        ours.lr.fill_(lr)
        ours.step(grads, norm=grad_norm(grads), max_norm=1.0)
    assert ours.steps.item() == 500
    for p, q, e in zip(ours.params, plain, exact, strict=True):
        if p.numel():
            assert_as_accurate(p, q.detach(), e.detach(), atol=1e-7)


def test_2000_small_parameters(backend):
    shapes = [(i % 5, 3) for i in range(2000)]
    params, grads = tensors(shapes), tensors(shapes)
    ours = Run(params)
    exact, optimizer = torch_adamw(params, torch.float64)
    for p, g in zip(exact, grads, strict=True):
        p.grad = g.double()
    optimizer.step()
    norm = grad_norm(grads)
    ours.step([g.clone() for g in grads], norm=norm)
    assert norm.item() == pytest.approx(sum(g.double().pow(2).sum().item() for g in grads) ** 0.5, rel=1e-6)
    assert ours.steps.item() == 1
    for p, e in zip(ours.params, exact, strict=True):
        torch.testing.assert_close(p.double(), e.detach(), rtol=0, atol=3e-7)


def test_unaligned_views(backend):
    """Gradients and parameters that start anywhere in a buffer, as DDP's buckets give them."""

    def buckets():
        flat = torch.randn(5000, device=DEVICE)
        return flat, [flat[1:1030], flat[1030:1033], flat[1033:3000].view(7, 281)]

    (_, params), (grad_buffer, grads) = buckets(), buckets()
    before = grad_buffer.clone()
    a, b = Run(params), Run(params)  # a works on clones, which are aligned
    clones = [g.clone() for g in grads]
    a.step(clones, norm=grad_norm(clones), max_norm=1.0)
    b.params = params
    b.step(grads, norm=grad_norm(grads), max_norm=1.0, zero_grad=True)
    for x, y in zip(a.params, b.params, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    assert grad_buffer[1:3000].eq(0).all()
    assert torch.equal(grad_buffer[:1], before[:1])
    assert torch.equal(grad_buffer[3000:], before[3000:])


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("zero_grad", [False, True], ids=["keep", "zero"])
def test_non_finite_gradient_skips_the_update(backend, bad, zero_grad):
    run = Run(tensors(SHAPES))
    run.step(tensors(SHAPES))
    for p in run.params:
        shadow(p, torch.float16)
    before, shadows = run.state(), [p.shadow.clone() for p in run.params]
    grads = tensors(SHAPES)
    grads[-1][2, 77] = bad
    norm = grad_norm(grads)
    assert not norm.isfinite()
    run.step(grads, norm=norm, max_norm=1.0, zero_grad=zero_grad)
    assert all(torch.equal(x, y) for x, y in zip(before, run.state(), strict=True))
    assert all(torch.equal(x, p.shadow) for x, p in zip(shadows, run.params, strict=True))
    if zero_grad:
        assert all(g.eq(0).all() for g in grads)
    grads = tensors(SHAPES)
    run.step(grads, norm=grad_norm(grads))
    assert run.steps.item() == 2
    assert all(p.isfinite().all() for p in run.params)


def test_grad_scale_is_exact_for_powers_of_two(backend):
    params, grads = tensors(SHAPES), tensors(SHAPES)
    plain, scaled = Run(params), Run(params)
    plain.step([g.clone() for g in grads], norm=grad_norm(grads), max_norm=0.5)
    grads = [g * 1024 for g in grads]
    scaled.step(grads, norm=grad_norm(grads), max_norm=0.5, grad_scale=torch.tensor(1024.0, device=DEVICE))
    for x, y in zip(plain.state(), scaled.state(), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-9)


def test_clipping_scales_the_gradient(backend):
    params, grads = tensors([(300,)]), tensors([(300,)])
    clipped, by_hand = Run(params), Run(params)
    norm = grad_norm(grads)
    coefficient = 0.25 / (norm + 1e-6)
    by_hand.step([g * coefficient for g in grads])
    clipped.step(grads, norm=norm, max_norm=0.25)
    torch.testing.assert_close(clipped.exp_avgs[0], by_hand.exp_avgs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(clipped.exp_avg_sqs[0], by_hand.exp_avg_sqs[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_shadow_follows(backend, dtype):
    """Shadows equal the rounded parameters bit for bit and count as current; parameters without one get none."""
    run = Run(tensors(SHAPES))
    for p in run.params[::2]:
        shadow(p, dtype)
    copies = [p.shadow for p in run.params[::2]]
    run.step(tensors(SHAPES))
    for p, copy in zip(run.params[::2], copies, strict=True):
        assert torch.equal(copy, p.to(dtype))
        assert shadow(p, dtype) is copy
        assert p.shadow_version == p._version
    assert not hasattr(run.params[1], "shadow")


def test_version_counter_moves(backend):
    run = Run(tensors([(8,)]))
    before = run.params[0]._version
    run.step(tensors([(8,)]))
    assert run.params[0]._version > before  # a stale shadow or a saved tensor is noticed by it


@pytest.mark.parametrize("zero_grad", [False, True], ids=["keep", "zero"])
def test_zero_grad(backend, zero_grad):
    run = Run(tensors(SHAPES))
    grads = tensors(SHAPES)
    run.step(grads, zero_grad=zero_grad)
    assert all(g.eq(0).all() for g in grads) == zero_grad


def test_grad_norm_is_accurate_and_repeatable(backend):
    grads = tensors([(1000, 1003), (17,), (0,), (64, 64)], scale=1e-3)
    norms = [grad_norm(grads) for _ in range(3)]
    exact = torch.stack([g.double().norm() for g in grads]).norm()
    assert norms[0].dtype == torch.float32
    assert all(torch.equal(norms[0], n) for n in norms)
    assert_as_accurate(norms[0], torch.nn.utils.get_total_norm(grads), exact)
    assert grad_norm([torch.zeros(0, device=DEVICE)]).item() == 0.0


def test_no_parameters(backend):
    steps = torch.zeros((), device=DEVICE)
    adamw_step([], [], [], [], lr=steps, step=steps, beta1=0.9, beta2=0.95, eps=1e-8, weight_decays=[])
    assert steps.item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, g: g.pop(), "1 gradients for 2 parameters"),
        (lambda r, g: g.__setitem__(1, g[1].double()), "gradient 1: expected contiguous fp32"),
        (lambda r, g: g.__setitem__(1, g[1].t()), "gradient 1: expected contiguous fp32"),
        (lambda r, g: g.__setitem__(1, g[1].view(-1)), r"gradient 1: shape \(12,\)"),
        (lambda r, g: setattr(r, "decays", [0.1]), "weight_decays: 1 values for 2 parameters"),
        (lambda r, g: setattr(r, "steps", r.steps.double()), "step: expected one fp32 value"),
    ],
    ids=["count", "dtype", "layout", "shape", "decays", "step"],
)
def test_errors_name_the_argument(change, message):
    run = Run(tensors([(2,), (3, 4)]))
    grads = tensors([(2,), (3, 4)])
    change(run, grads)
    with pytest.raises(ValueError, match=message):
        run.step(grads)


def test_clipping_needs_the_norm():
    run = Run(tensors([(2,)]))
    with pytest.raises(ValueError, match=r"max_norm=1\.0 needs norm"):
        run.step(tensors([(2,)]), max_norm=1.0)
    with pytest.raises(ValueError, match="no gradients"):
        grad_norm([])


@pytest.mark.gpu
def test_cuda_graph_and_no_host_sync(backend):
    """A captured step obeys lr, step, norm and grad_scale as they are at replay."""
    params = tensors(SHAPES)
    eager, graphed = Run(params), Run(params)
    scale = torch.tensor(4.0, device=DEVICE)
    static = tensors(SHAPES)

    def step(run, grads):
        run.step(grads, norm=grad_norm(grads), max_norm=1.0, grad_scale=scale, zero_grad=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(Run(params), [g.clone() for g in static])  # warm-up on throw-away state
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(graphed, static)
    for i in range(5):
        grads = tensors(SHAPES)
        if i == 3:
            grads[5][0, 0] = float("nan")
        for run in (eager, graphed):
            run.lr.fill_(1e-2 / (i + 1))
        torch._foreach_copy_(static, grads)
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
            step(eager, grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert eager.steps.item() == graphed.steps.item() == 4
    for x, y in zip(eager.state(), graphed.state(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
def test_more_elements_than_int32(backend):
    """2^31 + 5 parameters in one tensor: the last ones must move, and nothing else be written twice."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    n = 2**31 + 5
    run = Run([])
    run.params, run.exp_avgs, run.exp_avg_sqs = ([torch.zeros(n, device=DEVICE)] for _ in range(3))
    run.decays = [0.0]
    grads = [torch.ones(n, device=DEVICE)]
    run.step(grads, norm=grad_norm(grads))
    assert grad_norm(grads).item() == pytest.approx(n**0.5, rel=1e-6)
    # Step 1 of AdamW moves each parameter by lr * g / (|g| + eps).
    assert run.params[0].min().item() == run.params[0].max().item() == pytest.approx(-1e-2, rel=1e-6)
