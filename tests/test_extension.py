"""The compiled extension: how it is found and loaded, and its row kernels against PyTorch in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import extension
from tests.helpers import DEVICE, assert_as_accurate, dtype_id

BACKEND = "cuda" if DEVICE == "cuda" else "cpp"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def need(op):
    if missing := extension.unavailable(op, BACKEND):
        pytest.skip(missing)


def rows_case(n, v, vocab, dtype, scale=3.0):
    """Logits whose padding is poisoned, targets with an ignored row, and losses that must be overwritten."""
    logits = (torch.randn(n, v, device=DEVICE) * scale).to(dtype)
    logits[:, vocab:] = float("nan")
    targets = torch.randint(vocab, (n,), device=DEVICE)
    if n > 2:
        targets[1] = -1
    return logits, targets, torch.full((n,), float("nan"), device=DEVICE)


def rows_exact(logits, targets, vocab, dtype):
    """Losses and padded gradients of cross_entropy(reduction="sum") in `dtype`."""
    x = logits[:, :vocab].to(dtype).requires_grad_()
    losses = F.cross_entropy(x, targets, ignore_index=-1, reduction="none")
    losses.sum().backward()
    return losses.detach(), F.pad(x.grad, (0, logits.shape[1] - vocab))


ROWS = [(0, 8, 8), (1, 1, 1), (5, 65, 65), (7, 128, 100), (33, 1000, 999), (3, 4097, 4097), (9, 50304, 50257)]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("n", "v", "vocab"), ROWS, ids=lambda x: str(x))
def test_cross_entropy_rows(n, v, vocab, dtype):
    need("cross_entropy")
    logits, targets, losses = rows_case(n, v, vocab, dtype)
    exact_losses, exact_grads = rows_exact(logits, targets, vocab, torch.float64)
    plain_losses, plain_grads = rows_exact(logits, targets, vocab, dtype)
    before = logits.clone()
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, vocab, False)
    assert torch.equal(logits[:, :vocab], before[:, :vocab])
    loss_only = losses.clone()
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, vocab, True)
    assert torch.equal(loss_only, losses)
    if n:
        assert_as_accurate(losses, plain_losses, exact_losses, atol=2e-6)
        assert_as_accurate(logits, plain_grads, exact_grads, factor=3)
        assert logits[:, vocab:].eq(0).all()


def test_cross_entropy_rows_all_ignored():
    need("cross_entropy")
    logits, targets, losses = rows_case(4, 96, 90, torch.float32)
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets.fill_(7), losses, 7, 90, True)
    assert logits.eq(0).all()
    assert losses.eq(0).all()


@pytest.mark.parametrize("target", [-2, 90, 95, 2**40])
def test_cross_entropy_rows_target_out_of_range(target):
    """A corrupt token shows as a NaN loss, whatever lies in the padding, and touches no other row."""
    need("cross_entropy")
    logits, targets, losses = rows_case(3, 96, 90, torch.float32)
    targets.fill_(5)
    targets[1] = target
    exact, _ = rows_exact(logits[::2], targets[::2], 90, torch.float64)
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, 90, True)
    assert losses[1].isnan()
    torch.testing.assert_close(losses[::2].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_cross_entropy_rows_extreme_logits(dtype):
    """Large, equal and -inf logits."""
    need("cross_entropy")
    logits = torch.zeros(4, 128, device=DEVICE, dtype=dtype)
    logits[0, 3] = 6e4
    logits[1] = -6e4
    logits[2, 1:] = float("-inf")
    logits[3] = torch.linspace(-100, 100, 128)
    targets = torch.tensor([3, 5, 0, 127], device=DEVICE)
    exact_losses, exact_grads = rows_exact(logits, targets, 128, torch.float64)
    plain_losses, plain_grads = rows_exact(logits, targets, 128, dtype)
    losses = torch.empty(4, device=DEVICE)
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, 128, True)
    assert_as_accurate(losses, plain_losses, exact_losses)
    assert_as_accurate(logits, plain_grads, exact_grads, factor=3)


def test_cross_entropy_rows_non_finite_row():
    need("cross_entropy")
    logits = torch.zeros(2, 64, device=DEVICE)
    logits[0, 9] = float("nan")
    losses = torch.zeros(2, device=DEVICE)
    torch.ops.nanogpt.cross_entropy_rows_(logits, torch.zeros(2, dtype=torch.int64, device=DEVICE), losses, -1, 64, True)
    assert losses[0].isnan()
    assert losses[1].isfinite()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), 6, 2, 4), "expected \\(rows, columns\\)"),
        ((torch.zeros(2, 4).double(), 2, 2, 4), "Double"),
        ((torch.zeros(4, 2).t(), 2, 2, 4), "contiguous"),
        ((torch.zeros(2, 4), 3, 2, 4), "targets: 3 values for 2 rows"),
        ((torch.zeros(2, 4), 2, 1, 4), "losses: 1 values for 2 rows"),
        ((torch.zeros(2, 4), 2, 2, 5), "vocab_size 5 outside"),
    ],
    ids=["dims", "dtype", "layout", "targets", "losses", "vocab"],
)
def test_cross_entropy_rows_checks(arguments, message):
    need("cross_entropy")
    logits, targets, losses, vocab = arguments
    targets, losses = torch.zeros(targets, dtype=torch.int64, device=DEVICE), torch.zeros(losses, device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nanogpt.cross_entropy_rows_(logits.to(DEVICE), targets, losses, -1, vocab, True)


@pytest.mark.gpu
def test_cross_entropy_rows_beyond_int32():
    need("cross_entropy")
    n, v = 42_720, 50_304  # n * v > 2^31
    logits = torch.zeros(n, v, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.arange(n, device=DEVICE) % 50_257
    losses = torch.full((n,), float("nan"), device=DEVICE)
    torch.ops.nanogpt.cross_entropy_rows_(logits, targets, losses, -1, 50_257, True)
    torch.testing.assert_close(losses, torch.full_like(losses, 50_257).log(), rtol=1e-6, atol=0)
    assert logits[-1, targets[-1]].item() == pytest.approx(-1, rel=1e-2)
    assert logits[-1].argmin().item() == targets[-1].item()


def sample_inputs():
    def t(*shape):
        return torch.randn(*shape, device=DEVICE)

    params, grads, m, v = ([t(3, 5), t(7)] for _ in range(4))
    v = [x.square() for x in v]
    shadows = [p.half() for p in params]
    lr, step, norm = torch.tensor(0.1, device=DEVICE), torch.tensor(2.0, device=DEVICE), torch.tensor(1.0, device=DEVICE)
    logits, targets, losses = rows_case(4, 96, 90, torch.float32)
    logits.nan_to_num_()
    return {
        "adamw_": ("adamw", (params, grads, m, v, shadows, lr, step, [0.0, 0.1], 0.9, 0.95, 1e-8, norm, 1.0, None, True)),
        "grad_norm": ("grad_norm", (grads,)),
        "cross_entropy_rows_": ("cross_entropy", (logits, targets, losses.zero_(), -1, 90, True)),
    }


@pytest.mark.parametrize("name", ["adamw_", "grad_norm", "cross_entropy_rows_"])
def test_opcheck(name):
    op, arguments = sample_inputs()[name]
    need(op)
    torch.library.opcheck(getattr(torch.ops.nanogpt, name).default, arguments)
