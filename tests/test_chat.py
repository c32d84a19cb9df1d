"""The conversation: what is context, what is shown, commands, and a terminal's keys."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanogpt import chat, sample
from nanogpt.chat import Chat
from nanogpt.config import GPTConfig
from nanogpt.generate import generate
from nanogpt.model import GPT
from nanogpt.tokenizer import CharTokenizer
from tests.stand_ins import Bytes, character_model, save_run

pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")

GREEDY = {"temperature": 0, "top_k": 0, "top_p": 1.0}
CHARACTERS = "\n abcdé/"


@pytest.fixture(scope="module")
def model():
    return character_model(CHARACTERS)


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory):
    return save_run(model, CHARACTERS, tmp_path_factory.mktemp("run") / "out")


def make(model, opening="\n", max_new_tokens=5, stop=(), sampling=GREEDY, encoder=None):
    return Chat(model, encoder or CharTokenizer(CHARACTERS), opening, max_new_tokens, list(stop), 1, sampling)


def script(model, monkeypatch, capsys, text, **options):
    """(stdout, stderr) of a piped conversation."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    chat.talk(made := make(model, **options))
    shown = capsys.readouterr()
    return shown.out, shown.err, made


def test_answers_continue_the_transcript(model, monkeypatch, capsys):
    """Each answer is what the model says after everything before it."""
    encoder = CharTokenizer(CHARACTERS)
    out, err, made = script(model, monkeypatch, capsys, "ab\ncd\n\n", max_new_tokens=2)
    expected, context = "", encoder.encode("\n")
    for line in ("ab", "cd", ""):
        if line and context[-1] != encoder.encode("\n")[0]:
            context += encoder.encode("\n")
        context += encoder.encode(line)
        answer = generate(model, torch.tensor([context]), 2, temperature=0)[0, len(context) :].tolist()
        context += answer
        shown = encoder.decode(answer)
        expected += shown + "\n" * (not shown.endswith("\n"))
    assert made.transcript == context
    assert out == expected
    assert err == ""


def test_same_answers_as_sample(run_dir, monkeypatch, capsys):
    options = [f"--out_dir={run_dir}", "--device=cpu", "--start=ab\n", "--max_new_tokens=9", "--temperature=2", "--top_k=4"]
    options += ["--top_p=0.9", "--seed=5", "--stop=bc"]
    sample.main([*options, "--num_samples=1"])
    expected = capsys.readouterr().out.removesuffix(f"\n{sample.RULE}\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n/reset\n\n"))
    sample.main([*options, "--chat"])
    answer = expected.removeprefix("ab\n") + "\n" * (not expected.endswith("\n"))
    assert capsys.readouterr().out == 2 * answer  # the reset begins the seed anew as well


def test_commands(model, monkeypatch, capsys):
    out, err, made = script(model, monkeypatch, capsys, "ab\n/help\n/nothing to do\n/reset\n/quit\nab\n", max_new_tokens=0)
    assert out == f"\n{chat.HELP}\n"
    assert err == "chat: /nothing to do: no such command; /help lists them\n"
    assert made.transcript == made.opening
    _, _, made = script(model, monkeypatch, capsys, "//ab\n", max_new_tokens=0)
    assert made.encoder.decode(made.transcript) == "\n/ab"


@pytest.mark.parametrize(("line", "message"), [("axb", "character 'x' at 1"), ("a\udcff", "surrogates not allowed")])
def test_text_that_cannot_be_written_changes_nothing(model, monkeypatch, capsys, line, message):
    _, err, made = script(model, monkeypatch, capsys, f"{line}\nab\n", max_new_tokens=0)
    assert message in err
    assert err.count("\n") == 1
    assert made.encoder.decode(made.transcript) == "\nab"


def test_empty_transcript(model, monkeypatch, capsys):
    _, err, made = script(model, monkeypatch, capsys, "\na\n", opening="", max_new_tokens=1)
    assert "type something" in err
    assert made.transcript[0] == made.encoder.encode("a")[0]
    assert len(made.transcript) == 2


def test_a_table_without_line_end(model):
    made = make(model, opening="a", encoder=CharTokenizer("abcdefgh"))
    made.say("b")
    assert made.transcript == [0, 1]


@pytest.mark.parametrize(
    ("text", "max_new_tokens", "expected"),
    [
        ("a" * 11, 5, "a" * 11),  # fits with the answer
        ("a" * 12, 5, "a" * 11),  # does not
        ("b\n" + "a" * 10, 5, "a" * 10),
        ("bbbb\nbb\n" + "a" * 6, 5, "bb\n" + "a" * 6),  # as much as may be, from a line's beginning
        ("bbbbbbb\n" + "a" * 3, 12, "bbbb\naaa"),  # a line end in the second half would cost too much
        ("b" * 30, 500, "b" * 8),  # half the context at least
        ("b" * 30, 0, "b" * 16),
    ],
)
def test_window(model, text, max_new_tokens, expected):
    made = make(model, opening=text, max_new_tokens=max_new_tokens)
    assert made.encoder.decode(made.window()) == expected
    assert len(made.transcript) == len(text)


def test_interrupt_keeps_what_was_said(model, monkeypatch, capsys):
    count = iter(range(100))

    class Encoder(CharTokenizer):
        def decode_bytes(self, ids):
            if next(count) == 4:
                signal.raise_signal(signal.SIGINT)
            return super().decode_bytes(ids)

    out, _, made = script(model, monkeypatch, capsys, "ab\n\n", max_new_tokens=6, encoder=Encoder(CHARACTERS))
    answers = made.encoder.decode(made.transcript[3:])
    assert 6 < len(answers) < 6 + 6  # the first was cut short, the second was not
    assert out in (f"{answers[:-6]}\n{answers[-6:]}", f"{answers[:-6]}\n{answers[-6:]}\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_while_a_pipe_is_read_ends(model, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        chat.talk(make(model))
    assert stopped.value.code == 130


class Parrot(GPT):
    """Says a text over and over, byte by byte, whatever the context says."""

    def __init__(self, text):
        super().__init__(GPTConfig(block_size=64, vocab_size=256, n_layer=1, n_head=1, n_embd=8), torch.float32)
        self.text, self.said = text.encode(), 0

    def forward(self, idx, cache=None):
        if cache is not None:
            cache.length += idx.shape[1]
        byte = self.text[self.said % len(self.text)]
        self.said += 1
        return torch.nn.functional.one_hot(torch.tensor([[byte]] * len(idx)), 256).float(), None


def test_characters_of_several_tokens(monkeypatch, capsys):
    """No replacement character, neither between tokens nor where an answer ends inside a character, nor after that."""
    parrot = Parrot("é𝄞\n")
    out, _, made = script(parrot, monkeypatch, capsys, "x\n", max_new_tokens=10, encoder=Bytes())
    assert out == "é𝄞\né\n"  # and one byte of 𝄞
    assert bytes(made.transcript).decode() == "\nxé𝄞\né"
    parrot.said = 2
    assert "".join(made.reply()) == "𝄞\né"
    assert bytes(made.transcript).decode() == "\nxé𝄞\né𝄞\né"


def test_end_of_text_ends_an_answer_and_is_forgotten(monkeypatch, capsys):
    out, _, made = script(Parrot("ab\0"), monkeypatch, capsys, "x\ny\n", max_new_tokens=10, encoder=Bytes())
    assert out == "ab\nab\n"
    assert bytes(made.transcript) == b"\nxab\nyab"


class Terminal:
    """The command at a pseudo-terminal, and keys to press."""

    def __init__(self, *argv):
        self.fd, child = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "INPUTRC": "/dev/null", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanogpt.sample", "--chat", *argv],
            stdin=child,
            stdout=child,
            stderr=child,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its controlling terminal, whose Ctrl-C it hears
        )
        os.close(child)
        self.shown = ""

    def press(self, keys):
        os.write(self.fd, keys.encode())

    def wait_for(self, text, seconds=180):
        """What is shown up to the text, for the first time since the last call."""
        end = time.monotonic() + seconds
        os.set_blocking(self.fd, False)
        while text not in self.shown:
            assert time.monotonic() < end, f"{text!r} never came after {self.shown!r}"
            try:
                self.shown += os.read(self.fd, 4096).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # the process has closed its side
                assert text in self.shown, self.shown
        before, _, self.shown = self.shown.partition(text)
        return before


def test_terminal(run_dir):
    """Ctrl-C stops an answer and not the program, and clears a line; the arrow brings a line back; Ctrl-D ends."""
    terminal = Terminal(f"--out_dir={run_dir}", "--device=cpu", "--max_new_tokens=1000000000", "--temperature=0.5")
    try:
        assert "/help" in terminal.wait_for("> ")
        terminal.press("abc\n")
        terminal.wait_for("abc\r\n")
        terminal.press("\x03")
        terminal.wait_for("\n> ")
        terminal.press("ddd\x03")  # a line given up
        terminal.wait_for("\n> ")
        terminal.press("\x1b[A\n")  # the line before it, once more
        terminal.wait_for("abc\r\n")
        terminal.press("\x03")
        terminal.wait_for("\n> ")
        terminal.press("\x04")
        assert terminal.process.wait(180) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.fd)


def test_pipe(run_dir):
    """Bytes that are no UTF-8 cost one line; answers come as UTF-8; the end of the input ends the program."""
    done = subprocess.run(
        [sys.executable, "-m", "nanogpt.sample", "--chat", f"--out_dir={run_dir}", "--device=cpu", "--max_new_tokens=3"],
        input=b"ab\n\xff\xfe\n\xc3\xa9\n/quit\n",
        capture_output=True,
        timeout=120,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0
    assert done.stderr.decode().count("\n") == 1
    assert "surrogates not allowed" in done.stderr.decode()
    assert set(done.stdout.decode()) <= set(CHARACTERS)
    assert len(done.stdout.decode()) >= 6
