"""Where the wall time of a run goes, from its first start on, kills and restarts included.

Every second is in one of six classes, so that they add up to the wall time:

    startup     imports, data, model, restoring a checkpoint        evaluation, checkpoint   what the loop waited for them
    training    updates that the weights now hold                   lost   updates done, and done again after a restart
    down        between the last sign of life in the metrics file and the next start

Goodput is the share of training. The account rides on the records of the metrics file, and is continued from there.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CLASSES = ("startup", "training", "evaluation", "checkpoint", "lost", "down")


class Ledger:
    """The account of one run; threads may share it.

    Args:
        started: when this process was started, on ``clock``.
        past: records of the metrics file, oldest first; [] for a new run.
        start: the update from which this process goes on.
    """

    def __init__(self, started: float, past: list[dict[str, Any]] = (), start: int = 0, clock: Callable[[], float] = time.time):
        self.clock, self.kind, self.since, self.started = clock, "startup", started, started
        self.seconds = dict.fromkeys(CLASSES, 0.0)
        self._lock = threading.RLock()
        self._longest = dict.fromkeys(CLASSES, 0.0)
        past = [record for record in past if "spent" in record]
        if past:
            self.seconds |= past[-1]["spent"]
            self.seconds["down"] += max(0.0, started - past[-1]["time"])
            # The last record of the same weights tells how much of the training is still of use
            kept = [record for record in past if _updates(record) <= start]
            training = kept[-1]["spent"]["training"] if kept else 0.0
            self.seconds["lost"] += self.seconds["training"] - training
            self.seconds["training"] = training
        self._before = dict(self.seconds)

    def enter(self, kind: str) -> None:
        """From now on time counts as ``kind``."""
        with self._lock:
            now = self.clock()
            self.seconds[self.kind] += now - self.since
            self.kind, self.since = kind, now

    def elapsed(self, kind: str) -> float:
        """Seconds of this process so far."""
        with self._lock:
            self.enter(self.kind)
            return self.seconds[kind] - self._before[kind]

    def longest(self, kind: str) -> float:
        """Seconds of the longest :meth:`spend` of this process."""
        return self._longest[kind]

    @contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        before, start = self.kind, self.clock()
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)
            self._longest[kind] = max(self._longest[kind], self.clock() - start)

    def spent(self) -> dict[str, float]:
        """Seconds by class up to now."""
        with self._lock:
            self.enter(self.kind)
            return {kind: round(seconds, 3) for kind, seconds in self.seconds.items()}

    def summary(self) -> str:
        spent = self.spent()
        total = sum(spent.values()) or 1.0
        shares = ", ".join(f"{kind} {seconds / total:.1%}" for kind, seconds in spent.items() if kind != "training")
        return f"goodput: {spent['training'] / total:.1%} of {total:,.0f} s; {shares}"


def _updates(record: dict[str, Any]) -> int:
    """How many updates had been done when it was written."""
    return record["iter"] + (record["kind"] == "train")
