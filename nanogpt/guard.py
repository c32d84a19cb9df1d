"""Which updates are skipped, and what ends a run before max_iters.

Every update is judged on the device, from numbers that all ranks share: all of them skip it or none does, and the host learns
of it with the loss, without waiting.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt.goodput import Ledger
from nanogpt.optim import AdamW, LossScale
from nanogpt.saver import Saver
from nanogpt.sharding import local

UPDATED, OVERFLOW, NOT_FINITE, SPIKE = range(4)
WHY = ("", "overflow, loss scale halved", "not finite", "spike")
WINDOW, SIGMAS = 128, 6.0  # of the spike guard
HISTORY = 20  # updates that a message shows
MARGIN = 10.0  # seconds that a run is ready before its time is up


@dataclass
class Step:
    """One update as the host learned of it; the verdict is one of the four above."""

    it: int
    loss: float
    norm: float
    verdict: int


class DivergenceError(RuntimeError):
    """The guard ends the run: too many updates in a row were skipped."""

    def __init__(self, skipped: int, first: Step, history: list[Step]):
        super().__init__(f"{skipped} updates in a row were skipped, the first was {first.it}: {WHY[first.verdict]}")
        self.skipped, self.first, self.history = skipped, first, history


class Guard:
    """Skips updates that are not finite and, where asked, spikes; ends the run after too many in a row.

    A level that stays up is no spike for long: skipped values enter the window too, and widen it so that of equal ones only
    four are skipped. Ten in a row are therefore a run that goes on rising, or that is broken.

    Args:
        device: where losses and norms live.
        loss_scale: of fp16, whose overflows are part of the game until it is down to 1.
        spikes: whether to skip updates 6 sigma above the mean of the last 128.
        limit: skipped updates in a row that end the run; 0: never.
    """

    def __init__(self, device: torch.device, loss_scale: LossScale | None = None, spikes: bool = False, limit: int = 10):
        self.loss_scale, self.spikes, self.limit = loss_scale, spikes, limit
        self.window = torch.zeros(WINDOW, 2, device=device)  # loss and gradient norm of the last updates, a ring
        self.seen = torch.zeros((), dtype=torch.int64, device=device)  # rows ever written to it
        self.verdict = torch.zeros((), device=device)
        self.streak = 0
        self.first: Step | None = None  # of the streak
        self.history: deque[Step] = deque(maxlen=HISTORY)

    @torch.no_grad()
    def admits(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether to update, a bool device scalar; ``verdict`` says why not.

        Args:
            loss: mean over all ranks, fp32 device scalar.
            norm: of the unscaled gradients of all ranks, fp32 device scalar.
        """
        finite = loss.isfinite() & norm.isfinite()
        verdict = torch.where(finite, UPDATED, NOT_FINITE)
        if self.loss_scale is not None:
            verdict = torch.where(loss.isfinite() & ~finite & (self.loss_scale.value > 1), OVERFLOW, verdict)
        if self.spikes:
            now = torch.stack([loss, norm])
            std, mean = torch.std_mean(self.window, dim=0)
            spike = finite & (self.seen >= WINDOW) & (now > mean + SIGMAS * std).any()
            verdict = torch.where(spike, SPIKE, verdict)
            row = (self.seen % WINDOW)[None]
            self.window.index_copy_(0, row, torch.where(finite, now, self.window[row]))
            self.seen += finite
        self.verdict = verdict.float()
        return verdict == UPDATED

    def observe(self, step: Step) -> None:
        """Takes note of an update that has arrived on the host.

        Raises:
            DivergenceError: on every rank alike.
        """
        self.history.append(step)
        if step.verdict not in (NOT_FINITE, SPIKE):
            self.streak = 0
            return
        if self.streak == 0:
            self.first = step
        self.streak += 1
        if self.limit and self.streak >= self.limit:
            raise DivergenceError(self.streak, self.first or step, list(self.history))

    @property
    def unsound(self) -> bool:
        """Whether the last update was skipped as not finite, so that the weights may be the reason."""
        return self.streak > 0 and self.history[-1].verdict == NOT_FINITE

    def state(self) -> dict[str, Any]:
        """As JSON; waits for the device."""
        return {"seen": self.seen.item(), "window": self.window.tolist()} if self.spikes else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """A window that was not kept starts anew.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: for a state that :meth:`state` did not make.
        """
        if self.spikes and state:
            self.seen.fill_(state["seen"])
            self.window.copy_(torch.tensor(state["window"]))


@torch.no_grad()
def not_finite(model: nn.Module, optimizer: AdamW) -> str:
    """The first parameter that is not finite, or whose moments are not; empty if there is none. Waits for the device.

    Of sharded ones it sees this rank's parts.
    """
    named = dict(model.named_parameters())
    values = [torch.stack(torch._foreach_norm([local(p) for p in named.values()], ord=float("inf")))]
    for key in ("exp_avg", "exp_avg_sq"):
        moments = [local(optimizer.state[p][key] if p.requires_grad else p) for p in named.values()]  # frozen ones have none
        values.append(torch.stack(torch._foreach_norm(moments, ord=float("inf"))))
    bad = (~torch.stack(values).isfinite()).any(dim=0).tolist()
    return next((name for name, is_bad in zip(named, bad, strict=True) if is_bad), "")


def latest_stop(hours: float, ledger: Ledger, parameters: int, updates: int, saver: Saver) -> float:
    """The time (of time.time()) at which to stop, so that what is left to do is done before the process has run too long.

    Left: three updates, ten seconds, and to write 12 bytes a parameter, for which 100 MB/s are taken, as slow disks have, or
    one and a half times the longest save so far, whichever is more; twice where one may be under way in the background.

    Args:
        hours: that the process may run.
        ledger: of its time.
        parameters: of the model.
        updates: that it has done.
        saver: of the checkpoints.
    """
    longest = max(ledger.longest("checkpoint"), saver.longest)  # what the loop waited for it, and what the disk took
    save = max(12 * parameters / 100e6, 1.5 * longest) * (2 if saver.background else 1)
    update = ledger.elapsed("training") / max(1, updates)
    return ledger.started + hours * 3600 - save - 3 * update - MARGIN
