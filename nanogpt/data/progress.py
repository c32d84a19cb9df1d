"""How far a preparation is: one line that moves on a terminal, else a line every ten seconds."""

import sys
import time

import numpy as np


class Meter:
    """Prints share done, tokens, tokens/s since this process began, and the time left.

    Args:
        name: of the corpus.
        sizes: bytes of its files.
        limit: tokens at which it stops; 0 where it does not.
        tokens: written by earlier processes.
    """

    def __init__(self, name: str, sizes: list[int], limit: int, tokens: int):
        self.name, self.sizes, self.limit, self.first = name, sizes, limit, tokens
        self.before = np.cumsum([0, *sizes])
        self.started = self.shown = time.monotonic()
        self.began: float | None = None  # share done when this process began
        self.moving = sys.stdout.isatty()

    def show(self, tokens: int, file: int, read: int) -> None:
        """After `read` bytes of a file, by its number."""
        share = (self.before[file] + min(read, self.sizes[file])) / self.before[-1]
        if self.limit:
            share = max(share, min(1.0, tokens / self.limit))
        self.began = share if self.began is None else self.began
        now = time.monotonic()
        if now - self.shown < (0.5 if self.moving else 10):
            return
        self.shown = now
        left = (1 - share) * (now - self.started) / (share - self.began) if share > self.began else 0
        eta = f"{left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}"
        line = f"{self.name}: {share:6.1%}  {tokens:,} tokens  {self._rate(tokens)}  eta {eta}"
        print(f"\r{line}\x1b[K" if self.moving else line, end="" if self.moving else "\n", flush=True)

    def done(self, tokens: int) -> None:
        print("\r\x1b[K" * self.moving + f"{self.name}: {tokens:,} tokens, {self._rate(tokens)}", flush=True)

    def _rate(self, tokens: int) -> str:
        return f"{(tokens - self.first) / max(time.monotonic() - self.started, 1e-9) / 1e6:.2f}M tokens/s"
