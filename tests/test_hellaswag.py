"""nanogpt.hellaswag against lm-evaluation-harness's task written out plainly: one text at a time, through `transformers`."""

import hashlib
import json
import math
import re

import numpy as np
import pytest
import torch
import transformers

from nanogpt import hellaswag, pretrained
from nanogpt.data import assets
from nanogpt.distributed import World
from nanogpt.tokenizer import CharTokenizer

CPU = World(0, 0, 1, torch.device("cpu"))
WORDS = [
    "roof",
    "café",
    "[header]",
    "[title]",
    "naïve",
    "shingles",
    "he",
    "McCoy",
    "the",
    "wraps",
    "pulls",
    "3.5",
    "skis",
    "  ",
]
WORDS += ["[step]", "dog's", "—", "quickly", "water", "\n", "and", "up", "[unclosed", "on"]


def content(rng):
    """An item in the form and with the oddities of the published files: brackets, doubled spaces, no ctx_b, accents."""

    def words(low, high):
        return " ".join(rng.choice(WORDS, int(rng.integers(low, high))))

    end = rng.choice(["", words(1, 4), "[title] " + words(1, 3), "THE Man"], p=[0.3, 0.4, 0.2, 0.1])
    endings = [words(1, 3) + rng.choice([".", " [substeps] go.", ""]) for _ in range(4)]
    item = {"ind": 24, "activity_label": words(1, 3), "ctx_a": words(0, 90), "ctx_b": str(end), "endings": endings}
    return item | {"label": int(rng.integers(4)), "split": "val", "source_id": "activitynet~v_1"}


@pytest.fixture(scope="module")
def contents():
    rng = np.random.default_rng(3)
    return [content(rng) for _ in range(50)]


@pytest.fixture(scope="module")
def file(contents, tmp_path_factory):
    path = tmp_path_factory.mktemp("hellaswag") / "val.jsonl"
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in contents), encoding="utf-8")
    return path


def random_gpt2(directory):
    """GPT-2 with sharp, random predictions, its context so short that some of the items are cut."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50257, n_positions=96, n_embd=32, n_layer=2, n_head=4)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    theirs.save_pretrained(directory)
    return theirs


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    theirs = random_gpt2(directory)
    return pretrained.load(directory).model("cpu", torch.float32).eval(), theirs


def plain_preprocess(text):
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    return text.replace("  ", " ")


@torch.no_grad()
def plain_log_p(model, encode, context, continuation):
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole, start = encode(context + continuation), len(encode(context))
    context_tokens, ending = encode(context), whole[start:]
    tokens = (context_tokens + ending)[-(model.config.n_positions + 1) :]
    log_p = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    return sum(float(log_p[i - len(ending), t]) for i, t in enumerate(ending)), len(context_tokens + ending)


def plain_scores(model, encode, contents):
    right, right_norm, log_ps, longest = [], [], [], 0
    for item in contents:
        query = plain_preprocess(item["activity_label"] + ": " + item["ctx_a"] + " " + item["ctx_b"].capitalize())
        choices = [plain_preprocess(ending) for ending in item["endings"]]
        scores = []
        for choice in choices:
            log_p, length = plain_log_p(model, encode, query, " " + choice)
            scores.append(log_p)
            longest = max(longest, length)
        normed = [s / len(choice) if choice else -math.inf for s, choice in zip(scores, choices)]
        right.append(float(np.argmax(scores) == item["label"]))
        right_norm.append(float(np.argmax(normed) == item["label"]))
        log_ps += scores
    return right, right_norm, log_ps, longest


def log_ps_of(model, task, monkeypatch, world=CPU, on_round=None):
    """The accuracies, and what this rank has found of the log-probabilities that they compare."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(hellaswag, "assemble", lambda values, world: seen.append(values) or values)
        figures = hellaswag.score(model, task, 700, world, on_round)
    return figures, seen[0]


def test_scores_equal_a_plain_implementation(models, file, contents, gpt2, monkeypatch):
    ours, theirs = models
    right, right_norm, log_ps, longest = plain_scores(theirs, gpt2.encode, contents)
    assert longest > 97  # some contexts were cut
    assert 0 < sum(right) < 50
    assert right != right_norm
    task = hellaswag.prepare(hellaswag.read(str(file)), gpt2, 96)
    figures, ours = log_ps_of(ours, task, monkeypatch)
    assert figures["acc"] == sum(right) / 50
    assert figures["acc_norm"] == sum(right_norm) / 50
    torch.testing.assert_close(ours, torch.tensor(log_ps, dtype=torch.float64), rtol=2e-5, atol=1e-3)
    for name, values in (("acc", right), ("acc_norm", right_norm)):
        assert figures[f"{name}_stderr"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(50), rel=1e-12)


def test_any_batch_size_and_number_of_ranks_give_the_same_scores(models, file, gpt2, monkeypatch):
    """The ranks in turns, their parts added; the batches are the same, so the sums are bitwise."""
    model, _ = models
    task = hellaswag.prepare(hellaswag.read(str(file), limit=9), gpt2, 96)
    alone, expected = log_ps_of(model, task, monkeypatch)
    for size in (2, 3):
        worlds = [World(rank, rank, size, torch.device("cpu")) for rank in range(size)]
        rounds = [[] for _ in worlds]
        tell = [lambda done, total, seen=seen: seen.append((done, total)) for seen in rounds]
        with monkeypatch.context() as patch:
            work, find = [], hellaswag._log_p
            patch.setattr(hellaswag, "_log_p", lambda *args, work=work, find=find: work.append(len(args[1])) or find(*args))
            parts = [log_ps_of(model, task, monkeypatch, *each)[1] for each in zip(worlds, tell)]
        assert sum(work) == 9 * 4  # nothing twice, where a rank has nothing in the last round
        assert torch.equal(sum(parts), expected)
        assert all(seen == rounds[0] for seen in rounds)  # so that the ranks can vote after each
        assert rounds[0] == [(i + 1, len(rounds[0])) for i in range(len(rounds[0]))]
    for batch_tokens in (1, 100_000):
        again = hellaswag.score(model, task, batch_tokens, CPU)
        assert again == pytest.approx(alone, abs=1e-12)


def test_score_ends_where_it_is_told(models, file, gpt2):
    task = hellaswag.prepare(hellaswag.read(str(file), limit=2), gpt2, 96)
    seen = []
    assert hellaswag.score(models[0], task, 1, CPU, lambda done, total: seen.append(done) or done == 3) is None
    assert seen == [1, 2, 3]


def test_one_item_has_no_standard_error(models, file, gpt2):
    figures = hellaswag.score(models[0], hellaswag.load(str(file), gpt2, 96, limit=1), 1000, CPU)
    assert figures["acc"] in (0.0, 1.0)
    assert math.isnan(figures["acc_stderr"])


def test_batches_are_of_like_length_within_their_tokens():
    lengths = [5, 90, 3, 40, 41, 90, 7]
    batches = hellaswag.group(lengths, 100)
    assert batches == [[1], [5], [4, 3], [6, 0, 2]]
    assert hellaswag.group([], 100) == []


def item(**keys):
    return {"activity_label": "A", "ctx_a": "b", "ctx_b": "c", "endings": ["d", "e", "f", "g"], "label": 0} | keys


def test_text_of_an_item(tmp_path):
    path = tmp_path / "x.jsonl"
    odd = item(ctx_a="One [title] Two  [step] three\u2028", ctx_b="FOUR five", endings=[" a", "[x] b", "c  d", "e"], label="3")
    path.write_text(json.dumps(odd, ensure_ascii=False) + "\r\n" + json.dumps(item()), encoding="utf-8")
    first, second = hellaswag.read(str(path))
    assert first.context == "A: One. Two  three\u2028 Four five"
    assert first.endings == ("a", " b", "c d", "e")
    assert (first.label, second.label) == (3, 0)
    assert second.source == f"{path}:2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("[1]", "TypeError"),
        ("[" * 10**5, "RecursionError"),
        (json.dumps(item(label=float("inf"))), "OverflowError: cannot convert float infinity to integer"),
        (json.dumps({k: v for k, v in item().items() if k != "label"}), "KeyError: 'label'"),
        (json.dumps(item(label="")), "ValueError"),
        (json.dumps(item(label=4)), "label of 0 to 3"),
        (json.dumps(item(label=-1)), "label of 0 to 3"),
        (json.dumps(item(endings=["a", "b", "c"])), "four endings"),
        (json.dumps(item(endings=["a", "b", "c", 4])), "four endings"),
        (json.dumps(item(ctx_b=None)), "four endings"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(item()) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: no item of HellaSwag") + ".*" + message):
        hellaswag.read(str(path))
    assert len(hellaswag.read(str(path), limit=1)) == 1


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"hellaswag=.*nowhere.*No such file"):
        hellaswag.read(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"hellaswag=.*can't decode"):
        hellaswag.read(str(tmp_path / "bytes"))


def test_what_a_model_cannot_read_is_named(tmp_path, gpt2):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(item()) + "\n" + json.dumps(item(endings=["a", "b", "c", "d " * 9])) + "\n")
    with pytest.raises(ValueError, match=f"{path}:2: 9 tokens behind a context of 4: block_size=8 takes endings of 1 to 8"):
        hellaswag.load(str(path), gpt2, 8)
    with pytest.raises(ValueError, match=f"{path}:1: character 'A' at 0 is not among the 3"):
        hellaswag.load(str(path), CharTokenizer("abc"), 8)
    with pytest.raises(ValueError, match="needs a tokenizer, and the data has none"):
        hellaswag.load(str(path), None, 8)
    path.write_text(json.dumps(item(activity_label="[", ctx_a="]", ctx_b="", endings=[""] * 4)) + "\n")
    with pytest.raises(ValueError, match=f"{path}:1: 1 tokens behind a context of 0"):
        hellaswag.load(str(path), gpt2, 8)


def test_the_download_is_pinned(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOGPT_CACHE", str(tmp_path / "cache"))
    served = (json.dumps(item()) + "\n").encode()
    monkeypatch.setattr(assets, "_from_url", lambda asset: served)
    with pytest.raises(ValueError, match=r"cannot get hellaswag_val.jsonl: url: sha256 .* instead of 0aa3b888"):
        hellaswag.read("download")
    pinned = assets.Asset("hellaswag_val.jsonl", hashlib.sha256(served).hexdigest(), url=hellaswag.VALIDATION.url)
    monkeypatch.setattr(hellaswag, "VALIDATION", pinned)
    assert [found.context for found in hellaswag.read("download")] == ["A: b C"]
