"""Ends a run that hangs, and names the process that does.

Each process's loop says where it is; a thread beside it passes that on through the process group's store. A thread whose own
process has made no progress for the time allowed compares all of them: one that has come less far than the others, or whose
thread is silent as well, is the one that hangs. The others wait for it, typically in a collective, which names nobody. Where
one gets on, as in a long save, which tells of each piece on disk, the others wait as long as it does.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from nanogpt.distributed import World

EXIT_CODE = 1


class Watchdog:
    """Watches over this process's progress, in a thread.

    Args:
        world: with its store, where there is more than one process.
        timeout: seconds without progress that end the process; 0: never.
        report: called once before the end, with what is known.
    """

    def __init__(self, world: World, timeout: float, report: Callable[[str], None] = lambda message: None):
        self.world, self.timeout, self.report = world, timeout, report
        self.count, self.where = 0, "start-up"
        self.changed = time.monotonic()
        self.beats = 0  # of the thread, which a stopped process does not have
        self.interval = min(5.0, timeout / 8)
        self._end = threading.Event()
        # The store's own connection may be busy, waiting, while the process hangs
        self.store = world.store.clone() if world.store is not None and timeout else None
        if timeout:
            self._publish()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def at(self, where: str) -> None:
        """The loop goes on to what comes next; every rank passes through the same places."""
        self.count += 1
        self.where = where
        self.changed = time.monotonic()

    def alive(self) -> None:
        """Progress at the same place; from any thread."""
        self.changed = time.monotonic()

    def close(self) -> None:
        if self.timeout:
            self._end.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(self.interval):
            with suppress(RuntimeError):  # the store is gone with its process, which is found out below
                self._publish()
            stalled = time.monotonic() - self.changed
            if stalled > self.timeout:
                self._give_up(stalled)

    def _publish(self) -> None:
        self.beats += 1
        if self.store is not None:
            self.store.set(f"watchdog/{self.world.rank}", self._state())

    def _state(self) -> str:
        return f"{self.beats} {self.count} {time.monotonic() - self.changed} {self.where}"

    def _read(self) -> list[tuple[int, int, float, str]]:
        """(beats, count, seconds without progress, where) of each rank; one that has no watchdog yet is silent, at start-up."""
        if self.store is None:
            states = [self._state()]
        else:
            keys = [f"watchdog/{rank}" for rank in range(self.world.size)]  # get() would wait for what is not there
            states = [self.store.get(key).decode() if self.store.check([key]) else "0 0 inf start-up" for key in keys]
        fields = (state.split(" ", 3) for state in states)
        return [(int(beats), int(count), float(stalled), where) for beats, count, stalled, where in fields]

    def _give_up(self, stalled: float) -> None:
        try:
            before = self._read()
            time.sleep(max(3.0, 2 * self.interval))  # for threads to show that they live, on a busy machine too
            self._publish()
            if time.monotonic() - self.changed < self.timeout:
                return  # it went on meanwhile
            now = self._read()
        except RuntimeError as error:
            hung, message = [], f"no progress for {stalled:.0f} s at {self.where}; the other processes are gone ({error})"
        else:
            hung = [rank for rank, (b, n) in enumerate(zip(before, now, strict=True)) if b[0] == n[0]]  # silent
            if any(n[2] < self.timeout for rank, n in enumerate(now) if rank not in hung):
                return  # one gets on, and the others wait for it
            least = min(count for _, count, _, _ in now)
            hung = hung or [rank for rank, (_, count, _, _) in enumerate(now) if count == least]
            names = ", ".join(f"rank {rank} (at {now[rank][3]})" for rank in hung[:8])
            message = f"no progress for {stalled:.0f} s, --timeout={self.timeout:g}; hangs: {names}"
            if len(hung) == self.world.size > 1:
                message += ": all are at the same place, so the network or the devices do"
        print(f"rank {self.world.rank}: {message}", file=sys.stderr, flush=True)
        self.report(message)
        if self.world.rank in hung:
            faulthandler.dump_traceback()
            if self.world.size > 1:
                time.sleep(max(3.0, 2 * self.interval))  # the others, which end with this one, speak too
        os._exit(EXIT_CODE)
