"""The order of samples, their contents, resumption at any point, and the fixed evaluation set."""

import json

import numpy as np
import pytest
import torch

from nanogpt.data import order
from nanogpt.data.loader import Loader, eval_batches
from nanogpt.data.shards import open_dataset, write_shard

B, T = 4, 8


def write(folder, counts, split="train"):
    """Shards whose token at p of shard s is 1000 * s + p, so that a window tells where it comes from."""
    folder.mkdir(exist_ok=True)
    for s, count in enumerate(counts):
        write_shard(folder / f"{split}_{s:06d}.bin", (1000 * s + np.arange(count)).astype(np.uint16))
    return folder


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data", [203, 5, 90, T + 1])


def batches(loader, n):
    try:
        return [next(loader) for _ in range(n)]
    finally:
        loader.close()


def starts(loader, n):
    """First tokens of the next n batches, one list."""
    return [int(row[0]) for x, _ in batches(loader, n) for row in x]


def test_permutation_is_one():
    for n in [*range(1, 150), 1000, 1023, 1024, 1025, 4999]:
        for seed in range(3):
            image = order.permute(np.arange(n), n, order.keys(seed))
            assert np.array_equal(np.sort(image), np.arange(n)), (n, seed)


def test_permutation_reaches_any_index_alone():
    n, key = 10**11 + 3, order.keys("x")
    image = order.permute(np.array([0, 1, n - 1, n // 2]), n, key)
    assert len(set(image.tolist())) == 4
    assert image.min() >= 0
    assert image.max() < n
    assert order.permute(np.array([n // 2]), n, key)[0] == image[3]


def test_permutations_look_random():
    """Every index reaches every place equally often (chi-square within 5 sigma), and neighbours do not stay neighbours."""
    n, draws = 37, 4000
    counts = np.zeros((n, n))
    for seed in range(draws):
        counts[np.arange(n), order.permute(np.arange(n), n, order.keys(seed))] += 1
    expected, free = draws / n, (n - 1) ** 2
    assert abs(((counts - expected) ** 2 / expected).sum() - free) < 5 * (2 * free) ** 0.5
    image = order.permute(np.arange(100_000), 100_000, order.keys("y"))
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02


def test_order_is_the_same_on_every_machine():
    """Frozen: a change here would silently change the data order of every run that resumes."""
    assert order.permute(np.arange(5), 1000, order.keys("epoch", 1337, 0)).tolist() == FROZEN


FROZEN = [253, 93, 406, 1, 915]


def test_batches_are_windows(data):
    for x, y in batches(Loader(data, "train", B, T), 30):
        assert x.shape == y.shape == (B, T)
        assert x.dtype == y.dtype == torch.int64
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert torch.equal(y, x + 1)  # no window crosses two shards
        assert torch.equal(x, x[:, :1] + torch.arange(T))


def test_each_window_once_an_epoch(data):
    loader = Loader(data, "train", 1, T)
    total = loader.windows.total
    assert total == (203 - T) // T + (90 - T) // T + 1  # of the last shard's one window; none of the second shard
    seen = starts(loader, 3 * total)
    orders, shifts = [], []
    for epoch in (seen[:total], seen[total : 2 * total], seen[2 * total :]):
        assert len(set(epoch)) == total
        assert {start // 1000 for start in epoch} == {0, 2, 3}
        first = [start for start in sorted(epoch) if start < 1000]
        assert set(np.diff(first).tolist()) == {T}  # windows do not overlap and leave no gap
        shifts.append(first[0])
        orders.append([start // T for start in epoch])
    assert orders[0] != orders[1] != orders[2]
    assert len(set(shifts)) > 1
    assert all(0 <= shift < 2 * T for shift in shifts)


def test_shifts_cover_the_whole_shard(tmp_path):
    """Over the epochs every token is seen, the first and the last too."""
    data = write(tmp_path, [61])
    loader = Loader(data, "train", 1, T)
    seen = {int(token) for x, y in batches(loader, 60 * loader.windows.total) for token in torch.cat((x, y), 1)[0]}
    assert seen == set(range(61))


def test_seed_changes_the_order(data):
    one, other = starts(Loader(data, "train", B, T, seed=1), 8), starts(Loader(data, "train", B, T, seed=2), 8)
    assert one != other
    assert one == starts(Loader(data, "train", B, T, seed=1), 8)


@pytest.mark.parametrize("sampling", ["epoch", "random"])
def test_ranks_share_one_sequence(data, sampling):
    alone = starts(Loader(data, "train", B, T, sampling=sampling), 18)
    for size in (2, 3):
        ranks = [Loader(data, "train", B, T, rank, size, sampling=sampling) for rank in range(size)]
        shared = [starts(loader, 18 // size) for loader in ranks]
        together = [s for step in range(18 // size) for rank in shared for s in rank[step * B : (step + 1) * B]]
        assert together == alone


def test_random_draws_as_nanogpt_does(tmp_path):
    """With replacement, every start that leaves a window equally likely: 0 .. tokens - T - 1."""
    data = write(tmp_path, [200 + T])
    loader = Loader(data, "train", 100, T, sampling="random")
    counts = np.bincount(starts(loader, 200), minlength=200)
    assert len(counts) == 200
    assert counts.min() > 0
    assert abs(((counts - 100) ** 2 / 100).sum() - 199) < 5 * (2 * 199) ** 0.5


@pytest.mark.parametrize("sampling", ["epoch", "random"])
@pytest.mark.parametrize("stop", [0, 1, 7, 40])
def test_resumes_exactly(data, sampling, stop):
    whole = starts(Loader(data, "train", B, T, sampling=sampling), 50)
    loader = Loader(data, "train", B, T, sampling=sampling)
    begun = [int(row[0]) for _ in range(stop) for row in next(loader)[0]]
    state = json.loads(json.dumps(loader.state()))
    assert state["position"] == stop * B
    next(loader)  # what comes after the snapshot does not count
    loader.close()
    again = Loader(data, "train", B, T, sampling=sampling)
    again.load_state(state)
    assert begun + starts(again, 50 - stop) == whole


def test_resumes_on_another_number_of_processes(data):
    whole = starts(Loader(data, "train", B, T), 12)
    pair = [Loader(data, "train", B, T, rank, 2) for rank in (0, 1)]
    for loader in pair:
        batches(loader, 3)
    assert pair[0].state() == pair[1].state()
    alone = Loader(data, "train", 2, T)
    alone.load_state(pair[0].state())
    assert starts(alone, 12) == whole[6 * B :]


@pytest.mark.parametrize(
    ("change", "field"), [({"seed": 5}, "seed"), ({"block_size": 4}, "block_size"), ({"sampling": "random"}, "sampling")]
)
def test_another_sequence_is_refused(data, change, field):
    state = Loader(data, "train", B, T).state()
    loader = Loader(data, **({"split": "train", "batch_size": B, "block_size": T} | change))
    with pytest.raises(ValueError, match=f"{field} was .* and is "):
        loader.load_state(state)


def test_other_data_are_refused(data, tmp_path):
    loader = Loader(data, "train", B, T)
    loader.close()  # it must not read the file that changes under it
    state = loader.state()
    tokens = (np.arange(203) + (np.arange(203) == 150)).astype(np.uint16)
    write_shard(data / "train_000000.bin", tokens)
    with pytest.raises(ValueError, match="fingerprint was"):
        Loader(data, "train", B, T).load_state(state)


@pytest.mark.parametrize("position", [-1, 1.5, None, "3"])
def test_a_bad_position_is_refused(data, position):
    loader = Loader(data, "train", B, T)
    with pytest.raises(ValueError, match="position"):
        loader.load_state(loader.state() | {"position": position})


def test_batches_in_hand_stay_as_they_are(data):
    loader = Loader(data, "train", B, T)
    held = [(x, x.clone()) for x, _ in batches(loader, 10)]
    assert all(torch.equal(x, copy) for x, copy in held)


def test_errors_of_the_thread_reach_the_caller(data):
    loader = Loader(data, "train", B, T)
    loader.shards = []
    with pytest.raises(IndexError):
        batches(loader, 3)


@pytest.mark.parametrize("sampling", ["epoch", "random"])
def test_too_short_data(tmp_path, sampling):
    data = write(tmp_path, [T, 3])
    with pytest.raises(ValueError, match=f"block_size={T} needs {T + 1} tokens in a row, not {T}"):
        Loader(data, "train", B, T, sampling=sampling)
    with pytest.raises(ValueError, match=f"block_size={T}"):
        list(eval_batches(open_dataset(data), "train", B, T, 1))


def test_unknown_sampling(data):
    with pytest.raises(ValueError, match="sampling=shuffle"):
        Loader(data, "train", B, T, sampling="shuffle")


def evaluated(data, n_batches, world_size=1, batch_size=B):
    parts = [
        list(eval_batches(open_dataset(data), "train", batch_size, T, n_batches, rank, world_size))
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1  # so that the ranks can vote after each
    for part in parts:
        assert all(x.shape == (batch_size, T) for x, _ in part[:-1])
        for x, y in part:
            assert torch.equal(y, x + 1)
            assert x.shape in ((batch_size, T), (0, T)) or len(part) == 1
    return [sorted(int(row[0]) for x, _ in part for row in x) for part in parts]


@pytest.mark.parametrize("n_batches", [1, 3, 1000])
def test_evaluation_set_is_the_same_at_any_world_size(data, n_batches):
    (alone,) = evaluated(data, n_batches)
    total = 202 // T + 0 + 89 // T + 1
    assert len(alone) == min(n_batches, total // B) * B
    assert len(set(alone)) == len(alone)
    for size in (2, 3, 5, 16):
        assert sorted(start for part in evaluated(data, n_batches, size) for start in part) == alone


def test_evaluation_set_is_spread_over_the_split(tmp_path):
    data = write(tmp_path, [T * 100 + 1])
    (chosen,) = evaluated(data, 5)
    assert set(np.diff(chosen).tolist()) == {5 * T}


def test_evaluation_takes_what_there_is(tmp_path):
    data = write(tmp_path, [T * 3 + 1])
    assert evaluated(data, 10, batch_size=64) == [[0, T, 2 * T]]


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", ["epoch", "random"])
def test_gpu_gets_the_same_batches(data, sampling):
    """While the GPU lags far behind, so that a buffer reused too early would show."""
    here = batches(Loader(data, "train", B, T, sampling=sampling), 50)
    loader = Loader(data, "train", B, T, sampling=sampling, device="cuda")
    kept = []
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(50):
        x, y = next(loader)
        busy = (busy @ busy).clamp(-1, 1)
        kept.append((x + 0, y + 0))
    loader.close()
    for (x, y), (gx, gy) in zip(here, kept):
        assert gx.device.type == "cuda"
        assert torch.equal(gx.cpu(), x)
        assert torch.equal(gy.cpu(), y)
