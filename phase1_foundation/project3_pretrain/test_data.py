"""Data: shuffles visit everything once, batches are pure functions of the step, windows cover every target."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1_foundation.project3_pretrain.data import Batches, TokenDataset, TokenWriter, write_tokens
from phase1_foundation.project3_pretrain.shuffle import mix, permute


class ByteTokenizer:
    """One token a byte and <|endoftext|>: has the interface of a BPETokenizer, and nothing to learn."""

    vocab_size, eot_id, special_tokens, fingerprint = 257, 256, {"<|endoftext|>": 256}, "bytes"
    vocab = {chr(256 + i): i for i in range(256)} | {"<|endoftext|>": 256}

    def encode(self, text):
        return list(text.encode())

    def encode_batch(self, texts, num_threads=None):
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, tokens):
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


BYTES = ByteTokenizer()


@pytest.fixture
def dataset(tmp_path):
    """Numbers 0, 1, 2, ... as tokens: a window tells where it was cut."""
    path = tmp_path / "numbers.bin"

    class Numbers(ByteTokenizer):
        vocab_size, eot_id, special_tokens, vocab = 1000, None, {}, {}

        def encode(self, text):
            return []

    with TokenWriter(path, Numbers()) as writer:
        writer.add([range(1000)])
    return TokenDataset(path, 8)


def make(path, text="To be, or not to be.", n=30, block_size=8):
    write_tokens(path, [f"{text} {i}" for i in range(n)], BYTES)
    return TokenDataset(path, block_size, "bytes")


# --- order ---


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_visits_everything_once(size, key):
    order = permute(np.arange(size), size, key)
    assert sorted(order.tolist()) == list(range(size))
    some = np.array([0, size - 1, size // 2])
    assert permute(some, size, key).tolist() == order[some].tolist()  # any place alone gives the same


def test_permute_looks_shuffled():
    size = 5000
    order = permute(np.arange(size), size, 1)
    other = permute(np.arange(size), size, 2)
    for a, b in ((order, np.arange(size)), (order, other), (order[1:], order[:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(size)
    assert (order == other).sum() < 10  # about one expected
    assert permute(np.array([2**40]), 2**50, 3)[0] < 2**50


def test_the_order_is_the_same_on_every_machine():
    assert mix(1337, 0) == 5209204008403544149
    assert permute(np.arange(6), 6, 1337).tolist() == [4, 5, 0, 3, 1, 2]


# --- batches ---


def starts_of(batch):
    """Where the windows of a list of micro batches begin, in `numbers`."""
    return [int(row[0]) for tokens, _ in batch for row in tokens]


def test_targets_are_the_next_tokens(dataset):
    for tokens, targets in dataset.batches(0, 6, 4)[0]:
        assert tokens.dtype == targets.dtype == torch.int64 and tokens.device.type == "cpu"
        assert tokens.shape[1] == 8 and torch.equal(targets, tokens + 1)
        assert torch.equal(tokens, tokens[:, :1] + torch.arange(8))
    assert [len(tokens) for tokens, _ in dataset.batches(0, 6, 4)[0]] == [4, 2]


def test_batches_are_pure_functions_of_the_step(dataset):
    batches = dataset.batches(3, 4, 2)
    wanted = [starts_of(batches[i]) for i in range(40)]
    assert [starts_of(batches[i]) for i in (17, 3, 3, 39, 0)] == [wanted[i] for i in (17, 3, 3, 39, 0)]
    assert starts_of(dataset.batches(3, 4, 2)[39]) == wanted[39]
    assert starts_of(dataset.batches(4, 4, 2)[0]) != wanted[0]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_same_global_batch(dataset, world_size):
    for step in (0, 5, 31):
        whole = starts_of(dataset.batches(1, 12, 5)[step])
        shares = [starts_of(dataset.batches(1, 12, 2, rank, world_size)[step]) for rank in range(world_size)]
        assert [start for share in shares for start in share] == whole
        assert {len(share) for share in shares} == {12 // world_size}


def test_an_epoch_reads_every_window_once_and_borders_move(dataset):
    size = dataset.epoch_size
    assert size == (1000 - 8) // 8
    offsets = set()
    for epoch in range(6):
        batches = dataset.batches(7, 1, 1)
        starts = sorted(start for i in range(size) for start in starts_of(batches[epoch * size + i]))
        assert len(set(start % 8 for start in starts)) == 1
        assert all(b - a == 8 for a, b in itertools.pairwise(starts)) and starts[-1] + 9 <= 1000
        offsets.add(starts[0])
    assert len(offsets) > 2 and max(offsets) < 8


class Letters:
    """Five rows of two kinds, as a later project might train on: all that `Batches` asks for."""

    epoch_size = 5

    def rows(self, places, key):
        return torch.from_numpy(places), torch.from_numpy(places * 10), torch.full((len(places),), key % 1000)


def test_batches_of_anything_that_has_rows():
    batches = Batches(Letters(), seed=3, batch_size=4, micro_batch_size=3)
    first, second = batches[0]
    assert [len(column) for column in (*first, *second)] == [3, 3, 3, 1, 1, 1]
    seen = [int(place) for step in range(5) for micro in batches[step] for place in micro[0]]
    assert all(sorted(seen[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))  # four epochs, each read once
    assert len({tuple(seen[i : i + 5]) for i in range(0, 20, 5)}) > 1
    places, tens, _ = batches[1][0]
    assert torch.equal(tens, places * 10)


def test_a_batch_may_be_larger_than_an_epoch(tmp_path):
    dataset = make(tmp_path / "tiny.bin", n=1, block_size=16)
    assert dataset.epoch_size == 1
    tokens, _ = dataset.batches(0, 50, 50)[2][0]
    text = dataset.tokens.tolist()
    assert all(row in [text[i : i + 16] for i in range(len(text) - 16)] for row in tokens.tolist())
    exact = TokenDataset(dataset.path, dataset.n_tokens - 1)  # a single window fits
    assert exact.batches(0, 2, 2)[0][0][0].tolist() == [text[:-1]] * 2


def test_impossible_batches_are_refused(dataset):
    with pytest.raises(ValueError, match=r"batch_size=10 .* 4 processes: use a multiple of 4, such as 8"):
        dataset.batches(0, 10, 2, 0, 4)
    for arguments in ((0, 1), (4, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            dataset.batches(0, *arguments)
    with pytest.raises(IndexError):
        dataset.batches(0, 4, 4)[-1]
    with pytest.raises(TypeError):
        list(dataset.batches(0, 4, 4))


@given(n=st.integers(10, 200), block=st.integers(1, 9), batch=st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_windows_cover_every_target_once(tmp_path_factory, n, block, batch):
    path = tmp_path_factory.mktemp("w") / "a.bin"
    with TokenWriter(path, BYTES) as writer:
        writer.add([range(n)])
    dataset = TokenDataset(path, block)
    seen = []
    for tokens, targets in dataset.windows(batch):
        assert tokens.shape == targets.shape and tokens.shape == (min(batch, len(dataset)), block)
        counted = targets != -100
        assert torch.equal(tokens[counted][1:] + 1, targets[counted][1:])  # all but the mark, 256
        seen += targets[counted].tolist()
    assert seen == list(range(n))


def test_some_windows_are_spread_and_whole(dataset):
    some = [tokens for tokens, targets in dataset.windows(3, max_tokens=85)]
    starts = [int(row[0]) for tokens in some for row in tokens][:10]
    assert [len(tokens) for tokens in some] == [3, 3, 3, 3] and not some[3][1:].any()
    assert len(starts) == 10 and starts == sorted(starts) and starts[0] == 0 and starts[-1] > 850
    assert starts == [int(row[0]) for tokens, _ in dataset.windows(10, max_tokens=85) for row in tokens]


if __name__ == "__main__":
    print("shuffled:", permute(np.arange(12), 12, key=1).tolist())
    raise SystemExit(pytest.main([__file__, "-q"]))
