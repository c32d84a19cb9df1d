"""A conversation with a text completer: ``python -m nanogpt.sample --chat``.

The transcript is the model's context. What the user types begins a line of it, and the model goes on from where it ends.
"""

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, suppress

import torch

from nanogpt.generate import Text, write
from nanogpt.model import GPT
from nanogpt.tokenizer import Tokenizer

HELP = """\
A line is added to the transcript, and the model goes on from there; an empty line lets it go on.
  /reset  start anew        /quit  end, as Ctrl-D does
  /help   this              //...  a line that begins with /
Ctrl-C stops an answer; what it said so far stays in the transcript."""


class Chat:
    """A transcript, and the model that goes on with it.

    Args:
        opening: text that the transcript begins with.
        max_new_tokens: of an answer.
        stop: texts that end an answer, besides the tokenizer's end-of-text token.
        seed: of all draws until the next reset.
        sampling: temperature, top_k and top_p of :func:`nanogpt.generate.write`.
    """

    def __init__(
        self,
        model: GPT,
        encoder: Tokenizer,
        opening: str,
        max_new_tokens: int,
        stop: list[str],
        seed: int,
        sampling: dict[str, float],
    ):
        self.model, self.encoder = model, encoder
        self.max_new_tokens, self.stop, self.seed, self.sampling = max_new_tokens, stop, seed, sampling
        self.opening = encoder.encode(opening)
        self.reset()

    def reset(self) -> None:
        self.transcript = list(self.opening)
        self.generator = torch.Generator(self.model.lm_head.weight.device).manual_seed(self.seed)

    def say(self, line: str) -> None:
        """Adds a line of the user's.

        Raises:
            ValueError: for what the tokenizer cannot write; the transcript is as before.
        """
        tokens = self.encoder.encode(line.encode().decode())  # lone surrogates, bytes that were not UTF-8, end here
        if tokens and self.transcript and not self.encoder.decode_bytes(self.transcript[-1:]).endswith(b"\n"):
            with suppress(ValueError):  # a table of characters may lack the line end
                tokens = self.encoder.encode("\n") + tokens
        if not self.transcript and not tokens:
            raise ValueError("the transcript is empty: type something to begin with")
        self.transcript += tokens

    def window(self) -> list[int]:
        """The end of the transcript that leaves the answer its room, or half the context, from the first line end on."""
        block_size = self.model.config.block_size
        room = max(block_size - self.max_new_tokens, block_size // 2, 1)
        if len(self.transcript) <= room:
            return self.transcript
        kept = self.transcript[-room:]
        for i, token in enumerate(kept[: room // 2]):
            if b"\n" in self.encoder.decode_bytes([token]):
                return kept[i + 1 :]
        return kept

    def reply(self) -> Iterator[str]:
        """The model's answer as it comes.

        However the caller leaves the loop, what was drawn is in the transcript, but for the tokens of a character cut off at
        the end: the model draws these anew. One of them may have begun with whole characters, which were shown.
        """
        text = Text(self.encoder, self.stop, self.encoder.eot)
        steps = write(
            self.model, self.encoder, self.window(), [text], self.max_new_tokens, generator=self.generator, **self.sampling
        )
        try:
            with closing(steps):
                for [piece] in steps:
                    yield piece
        finally:
            unfinished = len(text.decoder.getstate()[0])  # bytes of a character cut off
            while unfinished > 0:
                unfinished -= len(self.encoder.decode_bytes([text.tokens.pop()]))
            self.transcript += text.tokens


class Interrupt:
    """What Ctrl-C does: gives up the line that is being typed, or asks the answer to stop; never anything in between."""

    def __init__(self):
        self.reading = self.stop = False

    def __call__(self, signum: int, frame: object) -> None:
        self.stop = True
        if self.reading:
            self.reading = False
            raise KeyboardInterrupt

    def read(self, prompt: str) -> str:
        self.reading = True
        line = input(prompt)
        self.reading = self.stop = False
        return line


def talk(chat: Chat) -> None:
    """Reads lines and prints answers until the input ends. At a terminal with editing and history, where readline is there."""
    for file, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(file, io.TextIOWrapper):
            file.reconfigure(errors=errors)  # a wrong byte or a terminal without the character costs one line, not the talk
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 (input() uses it from here on)
        print("Type the beginning of a text; /help lists the commands.")
    interrupt = Interrupt()
    earlier = signal.signal(signal.SIGINT, interrupt)
    try:
        while True:
            try:
                line = interrupt.read("> " if terminal else "")
            except EOFError:
                print(end="\n" if terminal else "")
                return
            except KeyboardInterrupt:
                if not terminal:
                    raise SystemExit(130) from None
                print()
                continue
            if line.startswith("/") and not line.startswith("//"):
                if not command(chat, line.strip()):
                    return
                continue
            try:
                chat.say(line[1:] if line.startswith("//") else line)
            except ValueError as error:
                print(f"chat: {error}", file=sys.stderr)
                continue
            shown = ""
            with closing(chat.reply()) as pieces:
                for piece in pieces:
                    print(piece, end="", flush=True)
                    shown = piece or shown
                    if interrupt.stop:
                        break
            if interrupt.stop or not shown.endswith("\n"):
                print(flush=True)
    finally:
        signal.signal(signal.SIGINT, earlier)


def command(chat: Chat, name: str) -> bool:
    """Obeys a line that begins with a slash; False ends the conversation."""
    if name == "/reset":
        chat.reset()
    elif name == "/help":
        print(HELP)
    elif name != "/quit":
        print(f"chat: {name}: no such command; /help lists them", file=sys.stderr)
    return name != "/quit"
