"""nanogpt.evaluate: each token predicted once, figures against plain arithmetic, one or two processes, mistakes, presets."""

import hashlib
import json
import math
import re
import shutil
import string
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import checkpoint, evaluate, pretrained, tokenizer, train
from nanogpt.config import GPTConfig, TrainConfig, load
from nanogpt.data.shards import open_dataset, write_shard
from nanogpt.distributed import World
from nanogpt.model import GPT
from nanogpt.tokenizer import CharTokenizer
from tests.test_model import all_logits, spread
from tests.test_train import TORCHRUN, arguments, losses, records, start

CPU = World(0, 0, 1, torch.device("cpu"))
LETTERS = string.ascii_letters + " .:é"  # é is two bytes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Random walks over letters, and their table."""
    path = tmp_path_factory.mktemp("letters")
    generator = np.random.default_rng(0)
    for split, count in (("train", 20_000), ("val", 1001)):
        walk = np.cumsum(generator.integers(-1, 2, count)) % len(LETTERS)
        walk.astype(np.uint16).tofile(path / f"{split}.bin")
    (path / "dataset.json").write_text(json.dumps({"vocab_size": len(LETTERS)}))
    tokenizer.save(CharTokenizer(LETTERS), path)
    return path


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "val.jsonl"
    generator = np.random.default_rng(1)

    def word():
        return "".join(generator.choice(list(string.ascii_lowercase), int(generator.integers(2, 9))))

    with open(path, "w") as file:
        for _ in range(9):
            endings = [word() + "." for _ in range(4)]
            item = {"activity_label": word(), "ctx_a": f"{word()} {word()}", "ctx_b": word(), "endings": endings}
            file.write(json.dumps(item | {"label": int(generator.integers(4))}) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run's directory, its only checkpoint step-3."""
    out = tmp_path_factory.mktemp("run")
    assert train.main(load(TrainConfig, arguments(data, out, max_iters=3, learning_rate=3e-2))) == 0
    return out


def figures(*argv, capsys):
    """What --json prints."""
    capsys.readouterr()
    assert evaluate.main(evaluate.command_line([*map(str, argv), "--json", "--device=cpu"])) == 0
    out, _ = capsys.readouterr()
    return json.loads(out)


def mistake(*argv, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(evaluate.command_line([*map(str, argv), "--device=cpu"]))
    assert stop.value.code == 2
    _, err = capsys.readouterr()
    assert err.startswith("evaluate: ")
    assert err.count("\n") == 1
    return err


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(1, 9).flatmap(lambda block_size: st.tuples(st.just(block_size), st.integers(1, block_size))),
    st.integers(0, 50),
)
def test_each_token_is_predicted_once_from_what_precedes_it(tmp_path_factory, counts, sizes, limit):
    path, (block_size, stride) = tmp_path_factory.mktemp("shards"), sizes
    for i, count in enumerate(counts):
        write_shard(path / f"val_{i:06d}.bin", np.arange(100 * i, 100 * i + count, dtype=np.uint16))
    windows = evaluate.Windows(open_dataset(path).shards("val"), block_size, stride, limit)
    expected = [100 * i + j for i, count in enumerate(counts) for j in range(1, count)]
    expected = expected[: limit or None]
    assert windows.tokens == len(expected)
    predicted = []
    for window in range(len(windows)):
        (idx,), (targets,) = windows.read(range(window, window + 1))
        assert idx.shape == targets.shape == (block_size,)
        at = np.flatnonzero(targets >= 0)
        assert 0 < len(at) <= stride
        assert (np.diff(at) == 1).all()
        predicted += targets[at].tolist()
        context = idx[: at[-1] + 1]
        assert context.tolist() == list(range(targets[at[-1]] - len(context), targets[at[-1]]))  # the tokens right before
        before = at[0] + 1  # tokens before the first that is predicted
        assert before == min(block_size - stride + 1, targets[at[0]] % 100)  # of any window, the last one too
    assert predicted == expected


@pytest.fixture(scope="module")
def sharp(data, tmp_path_factory):
    """A run's directory, its model one of large random weights: what precedes a token matters much."""
    out = tmp_path_factory.mktemp("sharp")
    model = spread(GPT(GPTConfig(16, len(LETTERS), 2, 2, 16, bias=True), torch.float32), factor=20).cpu()
    state = {"iter": 3, "val_loss": 1.0, "model": asdict(model.config), "config": {}, "data_dir": str(data)}
    checkpoint.save(out, 3, checkpoint.model_tensors(model), {}, state)
    return out


def plain_loss(out, data, block_size, stride, limit):
    """The mean over tokens one by one: each from all that precede it, up to the context that its window begins with."""
    model, _ = checkpoint.load_model(out, "cpu", torch.float32)
    tokens = torch.from_numpy(np.fromfile(data / "val.bin", dtype=np.uint16).astype(np.int64))
    sequences = defaultdict(list)  # by length, each with the token that follows it
    for predicted in range(1, limit + 1):
        number, _ = divmod(predicted - 1, stride)
        alone = block_size - stride  # context at the beginning of a window, of which the first few have less
        begin = max(0, number * stride - alone)
        sequences[predicted - begin].append(tokens[begin : predicted + 1])
    nats = 0.0
    with torch.no_grad():
        for group in map(torch.stack, sequences.values()):
            nats += F.cross_entropy(all_logits(model, group[:, :-1])[:, -1].double(), group[:, -1], reduction="sum").item()
    return nats / limit, len(CharTokenizer(LETTERS).decode(tokens[1 : limit + 1].tolist()).encode())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, (16, 16, 1000)),
        ({"tokens": 777}, (16, 16, 777)),
        ({"block_size": 12, "stride": 5, "batch_size": 3}, (12, 5, 1000)),
        ({"stride": 1, "tokens": 60}, (16, 1, 60)),
    ],
    ids=["all", "tokens", "stride", "one"],
)
def test_figures_equal_plain_arithmetic(sharp, data, capsys, keys, expected):
    found = figures(sharp, *[f"--{key}={value}" for key, value in keys.items()], capsys=capsys)
    loss, size = plain_loss(sharp, data, *expected)
    assert (found["block_size"], found["stride"], found["tokens"]) == expected
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["bytes"] == size > found["tokens"]  # é takes two
    assert found["bits_per_byte"] == pytest.approx(loss * expected[2] / math.log(2) / size, rel=1e-6)
    assert (found["model"], found["iter"], found["split"], found["data"]) == (str(sharp), 3, "val", str(data))


def test_agrees_with_the_evaluation_of_the_training(trained, data, capsys):
    """Where that takes all whole windows, so that both are over the same tokens."""
    keys = {"init_from": "resume", "eval_only": True, "eval_iters": 62, "batch_size": 1}
    assert train.main(load(TrainConfig, arguments(data, trained, **keys))) == 0
    out, _ = capsys.readouterr()
    (val,) = re.findall(r"step 3: train loss [\d.]+, val loss ([\d.]+)", out)
    found = figures(trained, "--tokens=992", capsys=capsys)
    assert found["loss"] == pytest.approx(float(val), abs=6e-5)


def test_any_batch_size_gives_the_same_figure(trained, capsys):
    found = [figures(trained, f"--batch_size={n}", capsys=capsys)["loss"] for n in (1, 5, 64)]
    assert max(found) - min(found) < 1e-6
    assert found[0] == figures(trained, "--batch_size=1", capsys=capsys)["loss"]


def test_16_bit_and_the_references_are_close(trained, capsys):
    exact = figures(trained, "--tokens=200", capsys=capsys)
    references = figures(trained, "--tokens=200", "--kernels=torch", capsys=capsys)
    assert references["loss"] == pytest.approx(exact["loss"], rel=1e-6)
    evaluate.dispatch.use("auto")
    short = figures(trained, "--tokens=200", "--dtype=bfloat16", capsys=capsys)
    assert (exact["dtype"], short["dtype"]) == ("float32", "bfloat16")
    assert 0 < abs(short["loss"] - exact["loss"]) < 1e-2


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_figures(trained, data, items):
    command = ["-m", "nanogpt.evaluate", trained, f"--data={data}", f"--hellaswag={items}"]
    command += ["--batch_size=3", "--device=cpu", "--backend=gloo", "--json"]
    found = []
    for launcher in ([], TORCHRUN):
        code, out, err = start([*launcher, *command])
        assert code == 0, err
        found.append(json.loads(out))  # one object, of one process
    assert [each.pop("processes") for each in found] == [1, 2]
    assert found[0] == found[1]  # bitwise
    assert found[0]["hellaswag_items"] == 9


def test_lines_for_people(trained, items, capsys):
    config = evaluate.command_line([str(trained / "step-3"), f"--hellaswag={items}", "--limit=8", "--device=cpu"])
    assert evaluate.main(config) == 0
    out, _ = capsys.readouterr()
    assert re.fullmatch(
        r"model: .*step-3 after 3 updates, 0\.01M parameters, float32\n"
        r"HellaSwag: acc 0\.\d{4} \+- 0\.\d{4}, acc_norm 0\.\d{4} \+- 0\.\d{4}, 8 items\n",
        out,
    )
    assert evaluate.main(evaluate.command_line([f"--out_dir={trained}", "--split=train", "--device=cpu"])) == 0
    out, _ = capsys.readouterr()
    assert "train, 19,999 tokens, block size 16, stride 16\n" in out
    assert re.search(r"\nloss \d\.\d{4}, perplexity \d+\.\d{4}, bits per byte \d\.\d{4} \(20,\d{3} bytes\)\n$", out)


def test_data_without_a_tokenizer_has_no_bits_per_byte(trained, tmp_path, capsys):
    np.arange(56, dtype=np.uint16).tofile(tmp_path / "val.bin")
    (tmp_path / "dataset.json").write_text('{"vocab_size": 56}')
    found = figures(trained, f"--data={tmp_path}", capsys=capsys)
    assert (found["tokens"], found["bits_per_byte"], found["bytes"]) == (55, None, None)
    assert evaluate.main(evaluate.command_line([str(trained), f"--data={tmp_path}", "--device=cpu"])) == 0
    assert "bits per byte n/a: no tokenizer there\n" in capsys.readouterr()[0]


def test_a_damaged_tokenizer_of_the_models_is_not_none(trained, tmp_path, capsys):
    """It is what tells that data of as many tokens are others."""
    shutil.copytree(trained, tmp_path / "out")
    (tmp_path / "out" / "step-3" / "tokenizer.json").unlink(missing_ok=True)
    (tmp_path / "out" / "tokenizer.json").write_text("{")
    assert re.search(r"out/tokenizer\.json: .*offset 1", mistake(tmp_path / "out", capsys=capsys))


def test_a_mistake_of_one_process_does_not_leave_it_waiting_for_others(trained, monkeypatch):
    abandoned = []

    @contextmanager
    def abandoning(code):
        abandoned.append(code)
        yield

    monkeypatch.setattr(evaluate.distributed, "abandoning", abandoning)
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.command_line([str(trained), "--data=nowhere", "--device=cpu"]))
    assert abandoned == [2]


def test_damaged_checkpoints_are_refused(trained, tmp_path, capsys):
    copy = tmp_path / "step-3"
    copy.mkdir()
    for file in (trained / "step-3").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = bytearray((copy / checkpoint.MODEL).read_bytes())
    weights[-9] ^= 1
    (copy / checkpoint.MODEL).write_bytes(weights)
    assert re.search(r"tensor \S+ was altered", mistake(copy, capsys=capsys))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokens=-1"], "tokens=-1: must be at least 0"),
        (["--batch_size=0"], "batch_size=0: must be at least 1"),
        (["--block_size=8", "--stride=9"], "stride=9: must be at most block_size=8"),
        (["--block_size=17"], "block_size=17: .* has 16 positions"),
        (["--stride=17"], "stride=17: .* has 16 positions"),
        (["--split=test"], "split=test: expected one of train, val"),
        (["--data=nowhere"], "dataset=nowhere: "),
        (["--hellaswag=nowhere.jsonl"], "hellaswag=nowhere.jsonl: .*No such file"),
        (["--limits=3"], "unknown key --limits; did you mean --limit"),
        (["--kernels=triton"], "kernels=triton: "),
        (["--init_from=gpt3"], "init_from=gpt3: "),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(trained, capsys, argv, message):
    assert re.search(message, mistake(trained, *argv, capsys=capsys))


def test_data_of_other_tokens_is_refused(trained, data, tmp_path, capsys):
    np.arange(20, dtype=np.uint16).tofile(tmp_path / "val.bin")
    (tmp_path / "dataset.json").write_text('{"vocab_size": 20}')
    assert "a vocabulary of 20 tokens" in mistake(trained, f"--data={tmp_path}", capsys=capsys)
    (tmp_path / "dataset.json").write_text('{"vocab_size": 56}')
    tokenizer.save(CharTokenizer(LETTERS[::-1]), tmp_path)
    assert "its tokens are not those of" in mistake(trained, f"--data={tmp_path}", capsys=capsys)
    np.arange(1, dtype=np.uint16).tofile(tmp_path / "val.bin")
    tokenizer.save(CharTokenizer(LETTERS), tmp_path)
    assert "no token to predict" in mistake(trained, f"--data={tmp_path}", capsys=capsys)
    assert "no shard of the split train" in mistake(trained, f"--data={tmp_path}", "--split=train", capsys=capsys)


def test_r21_a_token_beyond_the_vocabulary_is_named(trained, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    tokens = np.fromfile(data / "val.bin", dtype=np.uint16)
    tokens[900:] = len(LETTERS)
    tokens.tofile(tmp_path / "data" / "val.bin")
    error = mistake(trained, f"--data={tmp_path / 'data'}", capsys=capsys)
    message = f"offset 1800: token {len(LETTERS)}, but the vocabulary has {len(LETTERS)}"
    assert error == f"evaluate: {tmp_path / 'data' / 'val.bin'}: {message}\n"
    assert figures(trained, f"--data={tmp_path / 'data'}", "--tokens=899", capsys=capsys)["tokens"] == 899


def gpt2_data(path, encoder, count=700):
    """GPT-2's tokens, some ends of documents among them; their text's bytes."""
    tokens = np.array(encoder.encode("Naïve café — 東京 [x] the<|endoftext|>" * 100)[:count], dtype=np.uint16)
    for split in ("train", "val"):
        tokens.tofile(path / f"{split}.bin")
    text = encoder.decode_bytes(tokens[1:].tolist())
    return len(text) - text.count(b"<|endoftext|>") * len("<|endoftext|>")


def test_gpt2_from_a_directory(gpt2, tmp_path, capsys):
    """The end of a document counts in the loss, and is no byte of the text."""
    (tmp_path / "data").mkdir()
    size = gpt2_data(tmp_path / "data", gpt2)
    config = transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=1, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    found = figures(f"--init_from={tmp_path / 'hf'}", f"--data={tmp_path / 'data'}", capsys=capsys)
    tokens = torch.from_numpy(np.fromfile(tmp_path / "data" / "val.bin", dtype=np.uint16).astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for i in range(0, 699, 32):
            logits = theirs(tokens[None, i : i + 32]).logits[0]
            nats += F.cross_entropy(logits[: 699 - i], tokens[i + 1 : i + 33], reduction="sum").item()
    assert found["tokens"] == 699
    assert found["loss"] == pytest.approx(nats / 699, rel=1e-5)
    assert found["bytes"] == size
    assert "names no dataset of its own; --data=DIR" in mistake(f"--init_from={tmp_path / 'hf'}", capsys=capsys)


@pytest.mark.parametrize("preset", ["eval_gpt2", "eval_gpt2_medium", "eval_gpt2_large", "eval_gpt2_xl"])
def test_presets_evaluate_the_hubs_models(preset, gpt2, tmp_path, monkeypatch, capsys):
    """Through a hub that holds small ones under the large ones' names."""
    name = preset.removeprefix("eval_").replace("_", "-")
    (tmp_path / "data").mkdir()
    gpt2_data(tmp_path / "data", gpt2)
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    hub = pretrained.HubModel(pretrained.HUB[name].repository, pretrained.HUB[name].revision, digest, 1, 2, 8)
    monkeypatch.setitem(pretrained.HUB, name, hub)
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, *_, **__: asked.append(repo) or str(file))
    keys = {"dataset": tmp_path / "data", "out_dir": tmp_path / "out", "n_layer": 1, "n_head": 2, "n_embd": 8, "device": "cpu"}
    keys |= {"block_size": 32}
    config = load(TrainConfig, [preset, *[f"--{key}={value}" for key, value in keys.items()]])
    assert (config.batch_size, config.eval_iters, config.eval_only, config.init_from) == (8, 500, True, name)
    assert train.main(config) == 0
    out, _ = capsys.readouterr()
    assert asked == [f"openai-community/{name}"]
    (val,) = re.findall(r"step 0: train loss [\d.]+, val loss ([\d.]+)\n", out)
    assert float(val) == pytest.approx(math.log(50257), abs=0.1)
    assert "tanh GELU" in out
    assert "evaluated after 0 updates" in out


def test_training_goes_on_as_if_nothing_had_been_scored(data, items, tmp_path, capsys):
    """Bitwise, with dropout: a random number drawn by the scoring, or a batch taken, would show."""
    keys = {"dropout": 0.1, "eval_interval": 5, "n_embd": 32}
    scoring = {"hellaswag": items, "eval_hellaswag_interval": 10}
    for name, more in (("without", {}), ("with", scoring)):
        assert train.main(load(TrainConfig, arguments(data, tmp_path / name, **keys, **more))) == 0
    assert losses(tmp_path / "without") == losses(tmp_path / "with")
    assert train.main(load(TrainConfig, arguments(data, tmp_path / "dry", **keys | {"dropout": 0.0}, max_iters=3))) == 0
    assert losses(tmp_path / "dry")[1:] != losses(tmp_path / "with")[1:3]  # dropout is back on after an evaluation
    for file in (checkpoint.MODEL, checkpoint.OPTIM):
        ours, theirs = ((tmp_path / name / "step-12" / file).read_bytes() for name in ("without", "with"))
        assert ours == theirs
    scored = {r["iter"]: r.get("hellaswag_acc_norm") for r in records(tmp_path / "with", "eval")}
    assert scored.keys() == {0, 5, 10, 12}
    assert scored.pop(5) is None
    alone = figures(tmp_path / "with", f"--hellaswag={items}", capsys=capsys)
    assert scored[12] == alone["hellaswag_acc_norm"]
    assert all(value * 9 == pytest.approx(round(value * 9)) for value in scored.values())
    keys |= scoring | {"init_from": "resume", "eval_only": True}
    assert train.main(load(TrainConfig, arguments(data, tmp_path / "with", **keys))) == 0
    found = re.search(r"step 12: .*, hellaswag acc (\S+), hellaswag acc norm (\S+)\n", capsys.readouterr()[0])
    assert [f"{alone[f'hellaswag_{name}']:.4f}" for name in ("acc", "acc_norm")] == list(found.groups())


def test_a_stop_ends_the_scoring_too(data, items, tmp_path, monkeypatch):
    rounds = []
    score = train.hellaswag.score

    def asked_in_the_third_round(model, task, batch_tokens, world, on_round):
        def then(done, total):
            rounds.append((done, total))
            if done == 3:
                train.distributed.os.kill(train.distributed.os.getpid(), train.distributed.signal.SIGTERM)
            return on_round(done, total)

        return score(model, task, 1, world, then)

    keys = {"hellaswag": items, "eval_hellaswag_interval": 5}
    with monkeypatch.context() as patch:
        patch.setattr(train.hellaswag, "score", asked_in_the_third_round)
        assert train.main(load(TrainConfig, arguments(data, tmp_path / "stopped", **keys))) == 0
    assert rounds == [(1, 36), (2, 36), (3, 36)]
    assert records(tmp_path / "stopped", "eval") == []
    assert train.main(load(TrainConfig, arguments(data, tmp_path / "stopped", init_from="resume", **keys))) == 0
    assert train.main(load(TrainConfig, arguments(data, tmp_path / "whole", **keys))) == 0
    measured = ("time", "spent")
    stopped, whole = (
        [{k: v for k, v in r.items() if k not in measured} for r in records(tmp_path / name, "eval")]
        for name in ("stopped", "whole")
    )
    assert stopped == whole


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hellaswag": "x.jsonl"}, "hellaswag=x.jsonl: set --eval_hellaswag_interval too"),
        ({"eval_hellaswag_interval": 5}, "eval_hellaswag_interval=5: set --hellaswag=FILE or --hellaswag=download too"),
        ({"hellaswag": "x.jsonl", "eval_hellaswag_interval": 7}, "must be a positive multiple of eval_interval=5"),
        ({"hellaswag": "x.jsonl", "eval_hellaswag_interval": -5}, "must be a positive multiple of eval_interval=5"),
    ],
    ids=["interval", "file", "multiple", "negative"],
)
def test_scoring_while_training_is_checked_ahead(data, tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        load(TrainConfig, arguments(data, tmp_path, **keys))
