"""Decoding: the cache against none, the sliding window, sampling options, the stop token, and the command line."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import checkpoint, pretrained, sample, tokenizer
from nanogpt.config import GPTConfig
from nanogpt.generate import Text, choose, generate, stream
from nanogpt.model import GPT
from nanogpt.tokenizer import CharTokenizer
from tests.helpers import DEVICE
from tests.stand_ins import Bytes

V = 11


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(7)
    made = GPT(GPTConfig(block_size=16, vocab_size=V, n_layer=2, n_head=2, n_embd=32, bias=True), torch.float32).to(DEVICE)
    for p in made.parameters():  # far from uniform, so that the choice of a token is no tie
        p.data.mul_(4)
    return made


def prompt(B, T):
    return torch.randint(V, (B, T), device=DEVICE)


@pytest.mark.parametrize(("T", "new"), [(1, 15), (5, 11), (16, 1), (5, 30), (16, 5), (20, 6), (3, 0)])
def test_greedy_with_cache_equals_without(model, T, new):
    idx = prompt(3, T)
    cached = generate(model, idx, new, temperature=0)
    plain = generate(model, idx, new, temperature=0, use_cache=False)
    assert cached.shape == (3, T + new)
    assert torch.equal(cached, plain)
    for row in range(3):  # nanoGPT's loop, one row at a time
        text = idx[row : row + 1]
        for _ in range(new):
            logits, _ = model.eval()(text[:, -16:])
            text = torch.cat((text, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        assert torch.equal(text[0], cached[row])


def test_cache_computes_one_token_a_step_until_the_window_slides(model, monkeypatch):
    lengths = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda idx, *a, **k: lengths.append(idx.shape[1]) or forward(idx, *a, **k))
    generate(model, prompt(2, 4), 16)
    assert lengths == [4] + [1] * 12 + [16] * 3


def test_same_seed_same_text(model):
    def draw(seed, **options):
        return generate(model, idx, 12, generator=torch.Generator(DEVICE).manual_seed(seed), **options)

    idx = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1), draw(1, use_cache=False))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1)[0], draw(1)[1])


def test_padded_ids_are_never_drawn(model):
    idx = prompt(64, 2) % 3
    assert generate(model, idx, 8, temperature=50.0).max() >= 3
    assert generate(model, idx, 8, temperature=50.0, vocab_size=3).max() < 3
    assert generate(model, idx, 8, temperature=0, vocab_size=3).max() < 3


def test_stream_gives_the_tokens_of_generate_until_it_is_left(model, monkeypatch):
    idx = prompt(6, 2)
    steps = [tokens.tolist() for tokens in stream(model, idx, 20, temperature=0)]
    assert [list(row) for row in zip(*steps)] == generate(model, idx, 20, temperature=0)[:, 2:].tolist()
    caches = []
    new_cache = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda *args: caches.append(weakref.ref(c := new_cache(*args))) or c)
    made = stream(model.train(), idx, 10**9)
    next(made)
    assert not model.training
    assert caches[0]() is not None
    assert torch.is_grad_enabled()  # between the steps the caller's mode holds
    made.close()
    assert model.training
    assert caches[0]() is None


def test_leaves_the_mode_as_it_was(model):
    for mode in (True, False):
        model.train(mode)
        generate(model, prompt(1, 1), 1)
        assert model.training is mode


@pytest.mark.parametrize(
    ("options", "name"),
    [({"temperature": -1}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p")],
)
def test_options_out_of_range(model, options, name):
    with pytest.raises(ValueError, match=f"{name}="):
        generate(model, prompt(1, 1), 1, **options)


def test_empty_prompt(model):
    with pytest.raises(ValueError, match="prompt"):
        generate(model, prompt(1, 0), 1)


@pytest.mark.parametrize("top_k", [1, 2, 5, 12])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_only_tokens_of_top_k_and_top_p(top_k, top_p, temperature):
    """Against the definition, token by token, on 300 draws."""
    logits = [n / 8 for n in torch.randint(-40, 41, (9,)).tolist()]  # with ties now and then
    exact = torch.tensor(logits, dtype=torch.float64) / temperature
    kept = [i for i in range(len(logits)) if sum(x > logits[i] for x in logits) < top_k]
    p = torch.zeros(len(logits), dtype=torch.float64)
    p[kept] = exact[kept].softmax(0)
    # Token i stays if the likelier ones fall short of top_p; ties and rounding may count either way.
    allowed = {i for i in kept if sum(float(q) for q in p if q > p[i]) < top_p + 1e-5}
    draws = choose(torch.tensor(logits).expand(300, -1), temperature, top_k, top_p)
    assert set(draws.tolist()) <= allowed
    best = {i for i, x in enumerate(logits) if x == max(logits)}
    assert set(draws.tolist()) & best or float(p[list(best)].sum()) < 0.2


def test_frequencies_follow_temperature():
    logits = torch.tensor([0.0, 1.0, 2.0])
    expected = (logits / 0.7).softmax(0)
    n = 20000
    counts = torch.bincount(choose(logits.expand(n, -1), 0.7), minlength=3) / n
    assert ((counts - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt()).all()  # 5 sigma


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(2000, -1)
    assert set(choose(logits, top_p=0.4).tolist()) == {0}
    assert set(choose(logits, top_p=0.6).tolist()) == {0, 1}
    assert set(choose(logits, top_p=0.9).tolist()) == {0, 1, 2}


@pytest.fixture(scope="module")
def run_dir(model, tmp_path_factory):
    """A training run of a character model with a padded vocabulary."""
    out = tmp_path_factory.mktemp("run") / "out"
    encoder = CharTokenizer("\n abcdé")  # 7 of 11 ids
    state = {"step": 3, "model": vars(model.config), "config": {"dataset": "nowhere"}, "val_loss": 1.0}
    path = checkpoint.save(out, 3, checkpoint.model_tensors(model), {}, state)
    tokenizer.save(encoder, path)
    tokenizer.save(encoder, out)
    return out


def texts(capsys, *argv):
    sample.main([*argv, "--device=cpu"])
    out = capsys.readouterr().out
    assert out.endswith(f"\n{sample.RULE}\n")
    return out.split(f"\n{sample.RULE}\n")[:-1]


def test_command_prints_samples(run_dir, capsys):
    made = texts(capsys, f"--out_dir={run_dir}", "--start=ab", "--num_samples=3", "--max_new_tokens=40", "--top_p=0.9")
    assert [len(text) for text in made] == [42] * 3
    assert all(text.startswith("ab") and set(text) <= set("\n abcdé") for text in made)
    assert len(set(made)) == 3
    assert texts(capsys, f"--out_dir={run_dir / 'step-3'}", "--num_samples=1", "--max_new_tokens=5")[0][0] == "\n"


def test_command_reads_the_prompt_from_a_file(run_dir, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("déc", encoding="utf-8")
    made = texts(
        capsys, f"--out_dir={run_dir}", f"--start=FILE:{tmp_path / 'prompt.txt'}", "--num_samples=2", "--max_new_tokens=1"
    )
    assert [text[:3] for text in made] == ["déc", "déc"]


@pytest.mark.parametrize("stop", ["b", "ba"])
def test_command_stops_at_the_text(run_dir, capsys, stop):
    options = (f"--out_dir={run_dir}", "--start=b", "--num_samples=20", "--max_new_tokens=60", "--temperature=9")
    whole, cut = texts(capsys, *options), texts(capsys, *options, f"--stop={stop}")
    assert [text[0] + text[1:].split(stop)[0] for text in whole] == cut
    assert whole != cut


def test_greedy_samples_are_equal(run_dir, capsys):
    made = texts(capsys, f"--out_dir={run_dir}", "--temperature=0", "--num_samples=2", "--max_new_tokens=30")
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--top_p=2", "top_p=2.0"),
        ("--num_sample=2", "did you mean --num_samples"),
        ("--start=xyz", "'x'"),
        ("--start=", "no token"),
        ("--start=FILE:none.txt", "none.txt"),
        ("--init_from=gpt", "did you mean gpt2?"),
        ("--out_dir=/nonexistent", "/nonexistent"),
    ],
)
def test_command_refuses_in_one_line(run_dir, capsys, option, message):
    with pytest.raises(SystemExit) as stopped:
        sample.main([f"--out_dir={run_dir}", "--device=cpu", option])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_tokenizer_is_found_with_the_data(tmp_path):
    tokenizer.save(CharTokenizer("xy"), tmp_path)

    def weights(dataset):
        state = {"config": {"dataset": dataset}}
        return pretrained.Weights("out", GPTConfig(vocab_size=2), {}, directory=tmp_path / "out", state=state)

    assert pretrained.find_tokenizer(weights(str(tmp_path))).characters == "xy"
    with pytest.raises(ValueError, match=r"no tokenizer\.json beside it, and dataset=gone"):
        pretrained.find_tokenizer(weights("gone"))


class Pieces:
    """A token is an index into some texts."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode_bytes(self, ids):
        return "".join(self.pieces[i] for i in ids).encode()


def test_characters_of_several_tokens_are_given_whole():
    text = Text(Bytes())
    assert [text.put(byte) for byte in "é𝄞A".encode()] == ["", "é", "", "", "", "𝄞", "A"]
    cut = Text(Bytes())
    assert [cut.put(byte) for byte in "aé".encode()[:2]] + [cut.close()] == ["a", "", ""]
    wrong = Text(Bytes())
    assert "".join(wrong.put(byte) for byte in b"a\xffb") == "a\ufffdb"


def test_characters_that_gpt2_splits(gpt2):
    ids = gpt2.encode("naïve 東京 \U0001f600!")
    assert "\ufffd" in "".join(gpt2.decode([i]) for i in ids)  # token by token it would show
    text = Text(gpt2, ["\U0001f600!"])
    assert "".join(text.put(i) for i in ids) == "naïve 東京 "
    assert text.ended


@pytest.mark.parametrize(
    ("pieces", "stop", "expected", "ended"),
    [
        (["ab", "cd", "ef"], ["cd"], ["ab", ""], True),
        (["ab", "cd", "ef"], ["bc"], ["a", ""], True),
        (["ab", "cd", "ef"], ["bce"], ["a", "bcd", "ef"], False),
        (["a", "a", "a", "b"], ["aab"], ["", "", "a", ""], True),  # the longest beginning of a stop is held, no more
        (["a", "b", "a", "c"], ["abad"], ["", "", "", "abac"], False),
        (["xabcdy"], ["abcd", "c"], ["xab"], True),  # c is complete before abcd, as it is where tokens are characters
        (["xab", "cdy"], ["abcd", "bc"], ["x", "a"], True),
        (["xab", "c"], ["abcd"], ["x", "", "abc"], False),  # held back to the end, then given
        (["é", "é"], ["éé"], ["", ""], True),
        (["ab"], [], ["ab"], False),
    ],
)
def test_stop_text_across_tokens(pieces, stop, expected, ended):
    text = Text(Pieces(*pieces), stop)
    shown = [text.put(i) for i in range(len(expected) if ended else len(pieces))]
    assert text.ended is ended
    last = text.close()
    assert shown + [last] * (len(expected) > len(shown)) == expected
    assert last == "" or not ended
    assert text.put(0) == "" or not ended


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab\u00e9", max_size=4), max_size=12), st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3)
)
def test_stop_text_is_independent_of_the_tokens(pieces, stop):
    whole = "".join(pieces)
    ends = [(at + len(s), at) for s in stop if (at := whole.find(s)) >= 0]
    expected = whole[: min(ends)[1]] if ends else whole
    for cut in (pieces, list(whole), [whole]):
        text = Text(Pieces(*cut), stop)
        shown = ""
        for i in range(len(cut)):
            shown += text.put(i)
            assert expected.startswith(shown)
        assert shown + text.close() == expected
        assert text.ended is bool(ends)


def test_end_token_gives_back_what_was_held():
    text = Text(Pieces("ab", "c", "<end>"), ["bcd"], end=2)
    assert [text.put(i) for i in (0, 1, 2, 0)] == ["a", "", "bc", ""]
    assert text.tokens == [0, 1]
    assert text.ended
    with pytest.raises(ValueError, match="stop: an empty text"):
        Text(Bytes(), [""])


def test_tiny_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0]]).expand(50, -1)
    for temperature in (1e-300, 1e-45, 1e-6):
        assert set(choose(logits, temperature).tolist()) == {1}
