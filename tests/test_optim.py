"""nanogpt.optim: the schedule against its formula, AdamW against torch.optim.AdamW, the fp16 loss scale."""

import copy
import math

import pytest
import torch

from nanogpt.config import TrainConfig
from nanogpt.optim import AdamW, LossScale, learning_rate

HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
SHAPES = [(7, 5), (3,), (2, 3, 4), (1,)]


def parameters():
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params):
    return [p for p in params if p.dim() >= 2], [p for p in params if p.dim() < 2]


def torch_adamw(params):
    decayed, rest = groups(params)
    return torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], **HYPER)


def set_gradients(params, seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator) * factor


def assert_equal(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_schedule():
    config = TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_iters=4, lr_decay_iters=10)
    assert [learning_rate(it, config) for it in range(4)] == [0.2, 0.4, 0.6, 0.8]
    assert learning_rate(4, config) == 1.0
    assert learning_rate(7, config) == pytest.approx(0.55)
    assert learning_rate(9, config) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 5 / 6)))
    assert learning_rate(10, config) == learning_rate(10**9, config) == 0.1
    config.lr_decay_iters = config.warmup_iters  # nothing to decay over
    assert learning_rate(4, config) == 0.1
    config.decay_lr = False
    assert {learning_rate(it, config) for it in range(12)} == {1.0}


@pytest.mark.parametrize("keep_gradients", [False, True])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
def test_adamw_equals_torch(max_norm, keep_gradients):
    ours, theirs = parameters(), parameters()
    optimizer = AdamW(groups(ours), weight_decay=0.1, keep_gradients=keep_gradients, **HYPER)
    reference = torch_adamw(theirs)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.set_lr(1e-2 / (step + 1))
        for group in reference.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm or math.inf)
        reference.step()
        torch.testing.assert_close(optimizer.step(max_norm), expected)
        assert_equal(ours, theirs)
        assert all((p.grad == 0).all() if keep_gradients else p.grad is None for p in ours)


@pytest.mark.parametrize("direction", ["from torch", "to torch", "to ours"])
def test_adamw_state_moves(direction):
    ours, theirs = parameters(), parameters()
    one, two = AdamW(groups(ours), weight_decay=0.1, **HYPER), torch_adamw(theirs)
    if direction == "to ours":
        two = AdamW(groups(theirs), weight_decay=0.1, **HYPER)
    donor, receiver, params, others = (two, one, theirs, ours) if direction == "from torch" else (one, two, ours, theirs)
    for step in range(3):
        set_gradients(params, step)
        donor.step()
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    receiver.load_state_dict(copy.deepcopy(donor.state_dict()))  # load_state_dict takes tensors as they are
    for step in range(3, 6):
        for optimizer, tensors in ((donor, params), (receiver, others)):
            set_gradients(tensors, step)
            optimizer.step()
    assert_equal(ours, theirs)
    assert {float(s["step"]) for s in receiver.state_dict()["state"].values()} == {6.0}


def test_adamw_refuses_unequal_steps():
    params = parameters()
    reference = torch_adamw(params)
    set_gradients(params, 0)
    reference.step()
    state = reference.state_dict()
    state["state"][0]["step"] = torch.tensor(2.0)
    with pytest.raises(ValueError, match=r"one number of steps for all parameters, got \[1.0, 2.0\]"):
        AdamW(groups(params), **HYPER).load_state_dict(state)


@pytest.mark.parametrize("case", ["missing", "shape"])
def test_adamw_refuses_the_state_of_other_parameters(case):
    params, others = parameters(), parameters()
    if case == "shape":
        others[0] = torch.nn.Parameter(torch.randn(5, 7))
    reference = torch_adamw(others)
    set_gradients(others, 0)
    if case == "missing":
        others[0].grad = None
    reference.step()
    optimizer = AdamW(groups(params), **HYPER)
    found = {"missing": "none", "shape": r"\(5, 7\)"}[case]
    with pytest.raises(ValueError, match=rf"moments of shape \(7, 5\) for parameter 0, got {found}"):
        optimizer.load_state_dict(reference.state_dict())
    set_gradients(params, 0)
    optimizer.step()  # as it was


def test_adamw_needs_all_gradients():
    params = parameters()
    optimizer = AdamW(groups(params), **HYPER)
    set_gradients(params, 0)
    params[1].grad = None
    with pytest.raises(ValueError, match="1 of 4 parameters have no gradient"):
        optimizer.step()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_non_finite_gradient_skips_the_update(bad):
    params = parameters()
    optimizer = AdamW(groups(params), **HYPER)
    set_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params], [optimizer.state[p]["exp_avg"].clone() for p in params]
    set_gradients(params, 1)
    params[1].grad[0] = bad
    assert not optimizer.step(1.0).isfinite()
    assert all(torch.equal(p, q) for p, q in zip(params, before[0], strict=True))
    assert all(torch.equal(optimizer.state[p]["exp_avg"], q) for p, q in zip(params, before[1], strict=True))
    assert optimizer.completed.item() == 1
    assert all(p.grad is None for p in params)  # a NaN left over would poison the next sum


def test_loss_scale_leaves_the_update_unchanged():
    ours, theirs = parameters(), parameters()
    optimizer, reference = AdamW(groups(ours), **HYPER), AdamW(groups(theirs), **HYPER)
    scale = LossScale(torch.device("cpu"), initial=1024.0)
    for step in range(3):
        set_gradients(ours, step, factor=1024.0)
        set_gradients(theirs, step)
        torch.testing.assert_close(optimizer.step(0.5, scale), reference.step(0.5))
        assert_equal(ours, theirs)


def test_loss_scale_backs_off_and_grows():
    scale = LossScale(torch.device("cpu"), initial=8.0, interval=3)
    seen = []
    for norm in [1.0, math.inf, 1.0, 1.0, 1.0, 1.0, math.nan, 1.0, 1.0]:
        scale.update(torch.tensor(norm))
        seen.append(scale.value.item())
    assert seen == [8.0, 4.0, 4.0, 4.0, 8.0, 8.0, 4.0, 4.0, 4.0]
    for _ in range(10):
        scale.update(torch.tensor(math.inf))
    assert scale.value.item() == 1.0
