"""Learning-rate schedule, AdamW on the fused kernel, and the dynamic loss scale of fp16: nothing here waits for the device."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from kernels.optimizer import adamw_step, grad_norm
from nanogpt.config import TrainConfig
from nanogpt.distributed import total
from nanogpt.sharding import is_sharded, local


def learning_rate(it: int, config: TrainConfig) -> float:
    """The rate of update ``it`` (from 0): linear warmup, then a cosine down to min_lr at lr_decay_iters, then min_lr."""
    if not config.decay_lr:
        return config.learning_rate
    if it < config.warmup_iters:
        return config.learning_rate * (it + 1) / (config.warmup_iters + 1)
    if it >= config.lr_decay_iters:
        return config.min_lr
    progress = (it - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
    return config.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (config.learning_rate - config.min_lr)


class LossScale:
    """The factor that keeps fp16 gradients from underflowing: halved after an overflow, doubled after ``interval`` good steps.

    ``value`` and ``good_steps`` are fp32 device scalars, so neither the check nor the change waits for the host.
    """

    def __init__(self, device: torch.device, initial: float = 2.0**16, interval: int = 2000):
        self.interval = interval
        self.value = torch.tensor(initial, device=device)
        self.good_steps = torch.zeros((), device=device)

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """After a step, given the norm of its scaled gradients."""
        finite = norm.isfinite()
        good = torch.where(finite, self.good_steps + 1, 0.0)
        grow = good >= self.interval
        factor = torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
        self.value.copy_((self.value * factor).clamp(1.0, 2.0**24))
        self.good_steps.copy_(torch.where(grow, 0.0, good))


class AdamW(torch.optim.Optimizer):
    """AdamW whose step clips, unscales and skips a non-finite update, all in one pass on the device.

    Its state goes by the names of ``torch.optim.AdamW`` (exp_avg, exp_avg_sq, step), and each loads the other's.

    Args:
        groups: (decayed parameters, the others), as ``GPT.decay_groups()`` gives them; fp32, on one device. Of
            sharded ones, each rank updates its part.
        lr: initial learning rate; later ones through :meth:`set_lr`.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``; the second group does not decay.
        keep_gradients: zero them after a step instead of dropping them, for DDP, where they are views of its buckets. Dropped,
            the next backward's own tensors take their place, and a pass that adds to zeros is saved.
        lr_scales: factors of the learning rate; 1 for parameters that it does not name.
    """

    writes_shadows = True  # `kernels.linear` need not make them anew

    def __init__(
        self,
        groups: tuple[Iterable[Tensor], Iterable[Tensor]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        keep_gradients: bool = False,
        lr_scales: Mapping[Tensor, float] | None = None,
    ):
        decayed, rest = (list(group) for group in groups)
        device = (decayed + rest)[0].device
        self.lr = torch.tensor(lr, dtype=torch.float32, device=device)
        self.completed = torch.zeros((), device=device)  # updates, the skipped ones not counted
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.keep_gradients = keep_gradients
        super().__init__([g for g in groups if g["params"]], {"lr": self.lr, "betas": betas, "eps": eps})
        self.by_scale: dict[float, list[int]] = {}  # indices into parameters()
        for i, p in enumerate(self.parameters()):
            self.by_scale.setdefault((lr_scales or {}).get(p, 1.0), []).append(i)
        for p in self.parameters():
            self.state[p] = {"step": self.completed, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def set_lr(self, lr: float) -> None:
        self.lr.fill_(lr)

    @torch.no_grad()
    def step(
        self,
        max_norm: float = 0.0,
        loss_scale: LossScale | None = None,
        admits: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """One update from the gradients, which are used up: zero afterwards, or None.

        Args:
            max_norm: gradients are scaled down to this norm; 0: never.
            loss_scale: what the loss was multiplied by; it is updated.
            admits: given the norm of the unscaled gradients, whether to update at all: a bool device scalar.

        Returns:
            The norm of the unscaled gradients before clipping, an fp32 device scalar. If it is not finite, or was not admitted,
            nothing was updated.

        Raises:
            ValueError: for parameters without a gradient.
        """
        whole = self.parameters()
        if missing := sum(p.grad is None for p in whole):
            raise ValueError(f"optimizer: {missing} of {len(whole)} parameters have no gradient")
        params, grads = [local(p) for p in whole], [local(p.grad) for p in whole]
        exp_avgs, exp_avg_sqs = ([local(self.state[p][key]) for p in whole] for key in ("exp_avg", "exp_avg_sq"))
        norm = grad_norm(grads)
        if is_sharded(whole[0]):
            norm = total(norm.square()).sqrt()
        unscaled = norm if loss_scale is None else norm / loss_scale.value
        admitted = norm if admits is None else torch.where(admits(unscaled), norm, torch.nan)
        decays = [group["weight_decay"] for group in self.param_groups for _ in group["params"]]
        steps = [self.completed.clone() for _ in range(len(self.by_scale) - 1)] + [self.completed]  # each call advances its own
        for (scale, chosen), step in zip(self.by_scale.items(), steps, strict=True):
            adamw_step(
                [params[i] for i in chosen],
                [grads[i] for i in chosen],
                [exp_avgs[i] for i in chosen],
                [exp_avg_sqs[i] for i in chosen],
                lr=self.lr if scale == 1 else self.lr * scale,
                step=step,
                beta1=self.param_groups[0]["betas"][0],
                beta2=self.param_groups[0]["betas"][1],
                eps=self.param_groups[0]["eps"],
                weight_decays=[decays[i] for i in chosen],
                norm=admitted,
                max_norm=max_norm,
                grad_scale=None if loss_scale is None else loss_scale.value,
                zero_grad=self.keep_gradients,
            )
        if not self.keep_gradients:
            for p in whole:
                p.grad = None
        if loss_scale is not None:
            loss_scale.update(norm)
        return unscaled

    def state_dict(self) -> dict:
        """As ``torch.optim.AdamW``'s: the learning rate is a float, each parameter has its own step. Waits for the device."""
        state = super().state_dict()
        for group in state["param_groups"]:
            group["lr"] = self.lr.item()
        state["state"] = {i: s | {"step": self.completed.detach().clone()} for i, s in state["state"].items()}
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """From ours or from ``torch.optim.AdamW``'s.

        Raises:
            ValueError: for other parameters, or parameters with unequal numbers of steps.
        """
        steps = {float(s["step"]) for s in state_dict["state"].values()}
        if len(steps) != 1:
            raise ValueError(f"optimizer state: expected one number of steps for all parameters, got {sorted(steps)}")
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, self.parameters()):
            found = tuple(state_dict["state"][i]["exp_avg"].shape) if i in state_dict["state"] else "none"
            if found != p.shape:
                raise ValueError(f"optimizer state: expected moments of shape {tuple(p.shape)} for parameter {i}, got {found}")
        super().load_state_dict(state_dict)
        self.completed.fill_(steps.pop())
        self.lr.fill_(float(self.param_groups[0]["lr"]))
        for group in self.param_groups:
            group["lr"] = self.lr
        for p in self.parameters():
            self.state[p]["step"] = self.completed
