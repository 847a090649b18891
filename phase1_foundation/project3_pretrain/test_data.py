"""Data: tokens on disk are what was written, refused when damaged, and batches are pure functions."""

import io
import itertools
import json
import os
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import DATA
from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project2_tokenizer.bytes_alphabet import to_printable
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain import preparation, token_file
from phase1_foundation.project3_pretrain.data import Batches, TokenDataset, TokenFileError, TokenWriter, write_tokens
from phase1_foundation.project3_pretrain.download_data import articles
from phase1_foundation.project3_pretrain.hub_tokenizer import ForeignTokenizer
from phase1_foundation.project3_pretrain.preparation import find_inputs, is_held_out, load_tokenizer, prepare
from phase1_foundation.project3_pretrain.shuffle import mix, permute
from phase1_foundation.project3_pretrain.token_file import header_path, read_header, separator, token_bytes


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


# --- files ---


def test_tokens_and_header_are_what_was_written(tmp_path):
    texts = ["first text", "zw\u00f6lf \u2603", "last"]
    header = write_tokens(tmp_path / "a.bin", texts, BYTES, source="here", batch_bytes=5)
    expected = [token for text in texts for token in [256, *text.encode()]]
    dataset = TokenDataset(tmp_path / "a.bin", 4)
    assert dataset.tokens.tolist() == expected and dataset.tokens.dtype == np.uint16
    assert header["tokens"] == len(expected) and header["documents"] == 3
    assert header["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert (header["vocab_size"], header["tokenizer"], header["source"]) == (257, "bytes", "here")
    assert json.loads((tmp_path / "a.json").read_text())["dtype"] == "uint16"


def test_a_tokenizer_without_end_of_text_separates_by_newlines(tmp_path):
    tokenizer = CharTokenizer.from_text("abc\n")
    header = write_tokens(tmp_path / "c.bin", ["ab", "ca"], tokenizer)
    assert tokenizer.decode(TokenDataset(tmp_path / "c.bin", 2).tokens.tolist()) == "\nab\nca"
    assert header["text_bytes"] == 6 and separator(tokenizer) == tokenizer.encode("\n")


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Large(ByteTokenizer):
        vocab_size = 70_000

    with TokenWriter(tmp_path / "l.bin", Large()) as writer:
        writer.add([[1, 69_999, 65_536]])
    dataset = TokenDataset(tmp_path / "l.bin", 2)
    assert dataset.tokens.dtype == np.uint32 and dataset.tokens.tolist() == [256, 1, 69_999, 65_536]


def test_tokens_outside_the_vocabulary_are_refused_and_nothing_is_left(tmp_path):
    class Wrong(ByteTokenizer):
        def encode_batch(self, texts, num_threads=None):
            return [[300]]

    with pytest.raises(ValueError, match="do not fit vocab_size=257"):
        write_tokens(tmp_path / "x.bin", ["a"], Wrong())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    old = make(tmp_path / "a.bin").tokens.tolist()
    with pytest.raises(RuntimeError), TokenWriter(tmp_path / "a.bin", BYTES) as writer:  # noqa: PT012
        writer.add([[1, 2, 3]])
        raise RuntimeError("killed")
    assert TokenDataset(tmp_path / "a.bin", 8).tokens.tolist() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.json"]


def test_a_full_disk_is_said_clearly(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match=r"could not write .*a\.bin \(No space left\) after .* tokens: free some space"):
        make(tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


class FullDisk(io.FileIO):
    """A file on a disk that takes nothing."""

    def write(self, data):
        raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_at_the_end_leaves_nothing(tmp_path, monkeypatch):
    full = lambda path, mode: io.BufferedWriter(FullDisk(path, mode))  # noqa: E731 (the buffer fails when flushed)
    monkeypatch.setattr(token_file, "open", full, raising=False)
    message = r"could not write .*a\.bin \(No space left on device\) after 4 tokens: free some"
    with pytest.raises(OSError, match=message), TokenWriter(tmp_path / "a.bin", BYTES) as writer:
        writer.add([[1, 2, 3]])
    assert list(tmp_path.iterdir()) == []


def test_two_processes_and_one_that_was_killed_do_not_meet(tmp_path):
    old, young = tmp_path / ".a.bin.1.tmp", tmp_path / ".a.bin.2.tmp"
    for path in (old, young):
        path.write_bytes(b"of another process")
    os.utime(old, (1, 1))
    make(tmp_path / "a.bin")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.bin.2.tmp", "a.bin", "a.json"]


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def damage_content(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_header(path):
    header_path(path).write_text(header_path(path).read_text()[:-20])


def damage_other_json(path):
    header_path(path).write_text('{"weights": 3}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "truncated"),
        (damage_content, "is damaged"),
        (damage_header, "is not the header of a token file"),
        (damage_other_json, "is not the header of a token file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    make(tmp_path / "a.bin")
    damage(tmp_path / "a.bin")
    with pytest.raises(TokenFileError, match=message) as raised:
        TokenDataset(tmp_path / "a.bin", 8)
    assert "a." in str(raised.value) and "prepare_data.py" in str(raised.value)


def test_missing_short_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prepare_data\.py"):
        TokenDataset(tmp_path / "none.bin", 8)
    make(tmp_path / "a.bin")
    with pytest.raises(TokenFileError, match="another tokenizer"):
        TokenDataset(tmp_path / "a.bin", 8, "gpt2's")
    with pytest.raises(TokenFileError, match=r"too few for one window of block_size=100000"):
        TokenDataset(tmp_path / "a.bin", 100_000)


def test_token_bytes_counts_utf8(tmp_path):
    assert token_bytes(BYTES).tolist() == [1] * 256 + [0]
    assert token_bytes(CharTokenizer("a\u00e9\u2603\n")).tolist() == [1, 2, 3, 1]
    letters = {to_printable(bytes([i])): i for i in range(256)}
    thinking = BPETokenizer(letters, [], {"<|end|>": 256, "<th\u00efnk>": 257}, always_matched=["<th\u00efnk>"])
    assert token_bytes(thinking)[256:].tolist() == [0, 8]  # one is a mark, the other is text


@pytest.mark.parametrize("style", ["metaspace", "byte level"])
def test_token_bytes_of_a_librarys_tokenizer(style):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers

    if style == "metaspace":  # SentencePiece: a sign for the space, and bytes for what has no token
        words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "c", "a", "t", "s", "\u2581c"]
        model = models.BPE({word: i for i, word in enumerate(words)}, [("\u2581", "c")], byte_fallback=True)
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
    else:
        words = ["</s>", *pre_tokenizers.ByteLevel.alphabet(), "\u0120c"]
        model = models.BPE({word: i for i, word in enumerate(words)}, [("\u0120", "c")])
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["\u0439\u0439"])  # spelled as it is, whatever the others are written in
    foreign = ForeignTokenizer(tokenizer.to_str())
    text = "a cat's \u2603 cats, \u0439\u0439 \U0001f600"
    sizes, ids = token_bytes(foreign), foreign.encode(text)
    assert foreign.decode(ids) == text and sizes[ids].sum() == len(text.encode())
    assert sizes[words.index("</s>")] == 0 and len(sizes) == foreign.vocab_size
    for word, size in (("\u2581c", 2), ("<0x0A>", 1), ("\u0120c", 2)):
        assert word not in words or sizes[words.index(word)] == size


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


# --- preparation ---


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Settings of prepare_data.py for a small text, and the byte tokenizer in the place of a BPE one."""
    monkeypatch.setattr(preparation, "ensure_tokenizer", lambda settings, inputs: BYTES)
    monkeypatch.setattr(preparation, "BATCH_BYTES", 500)
    text = tmp_path / "corpus.txt"
    text.write_text("".join(f"document number {i}\n" for i in range(400)))
    return types.SimpleNamespace(
        TRAIN_DATA_PATH=str(text), DATA_DIR=str(tmp_path / "out"), TOKENIZER="bytes", VOCAB_SIZE=257,
        VAL_FRACTION=0.1, VAL_DATA_PATH=None, NUM_WORKERS=2, overrides={"TRAIN_DATA_PATH"},
    )  # fmt: skip


def documents_of(path):
    """The texts of a token file."""
    tokens = np.asarray(TokenDataset(path, 2).tokens)
    return [BYTES.decode(part.tolist()) for part in np.split(tokens, np.flatnonzero(tokens == 256))[1:]]


def test_tokens_that_stand_are_trained_on_unless_a_flag_names_a_text(plan, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preparation, "load_tokenizer", lambda spec: BYTES)
    prepare(plan)
    tokens = (tmp_path / "out" / "train.bin").read_bytes()
    plan.TRAIN_DATA_PATH, plan.overrides = str(tmp_path / "other.txt"), set()  # as if the default were another text
    (tmp_path / "other.txt").write_text("".join(f"another text {i}\n" for i in range(200)))
    assert prepare(plan) is BYTES and "tokens of corpus.txt" in capsys.readouterr().out
    assert (tmp_path / "out" / "train.bin").read_bytes() == tokens
    monkeypatch.setattr(preparation, "load_tokenizer", lambda spec: CharTokenizer("abc"))
    with pytest.raises(TokenFileError, match=r"another tokenizer than TOKENIZER=bytes: name theirs"):
        prepare(plan)
    assert (tmp_path / "out" / "train.bin").read_bytes() == tokens
    plan.overrides = {"TRAIN_DATA_PATH"}
    prepare(plan)
    assert (tmp_path / "out" / "train.bin").read_bytes() != tokens


def test_prepare_splits_by_document(plan, tmp_path):
    prepare(plan)
    train, val = (documents_of(tmp_path / "out" / name) for name in ("train.bin", "val.bin"))
    everything = [f"document number {i}" for i in range(400)]
    assert sorted(train + val) == sorted(everything)
    assert val == [text for text in everything if is_held_out(text, 0.1)] and 15 < len(val) < 75
    assert train == [text for text in everything if not is_held_out(text, 0.1)]  # order kept


def test_prepare_skips_what_stands_and_notices_changes(plan, tmp_path, capsys):
    prepare(plan)
    before = (tmp_path / "out" / "train.bin").stat().st_mtime_ns
    capsys.readouterr()
    prepare(plan)
    assert "already" in capsys.readouterr().out
    assert (tmp_path / "out" / "train.bin").stat().st_mtime_ns == before
    text = tmp_path / "corpus.txt"
    text.write_text(text.read_text().replace("number 7\n", "number x\n"))  # the same size
    prepare(plan)
    assert "already" not in capsys.readouterr().out
    plan.VAL_FRACTION = 0.2
    prepare(plan)
    assert "already" not in capsys.readouterr().out
    damage_content(tmp_path / "out" / "val.bin")
    prepare(plan, refresh=True)
    assert "already" not in capsys.readouterr().out
    assert read_header(tmp_path / "out" / "val.bin")["documents"] > 0


def test_no_edit_of_a_text_goes_unnoticed(plan, tmp_path, capsys):
    text = tmp_path / "corpus.txt"
    text.write_text("".join(f"document number {i:06d}\n" for i in range(100_000)))  # 2.3 MB
    prepare(plan)
    content = text.read_bytes()
    place = content.index(b"001000")
    stamp = text.stat().st_mtime_ns
    text.write_bytes(content[:place] + b"edited" + content[place + 6 :])
    os.utime(text, ns=(stamp, stamp))
    prepare(plan)
    assert "already" not in capsys.readouterr().out
    assert any("edited" in part for part in documents_of(tmp_path / "out" / "train.bin"))
    os.utime(text, ns=(stamp + 1, stamp + 1))  # a copy has another date
    prepare(plan)
    assert "already" in capsys.readouterr().out


def test_prepare_takes_several_files_and_a_held_out_text(plan, tmp_path):
    (tmp_path / "more.jsonl").write_text('{"text": "two\\nlines"}\n')
    (tmp_path / "held.txt").write_text("held out\nalso held out\n")
    plan.TRAIN_DATA_PATH = f"{tmp_path}/corp*.txt, {tmp_path}/more.jsonl"
    plan.VAL_DATA_PATH = str(tmp_path / "held.txt")
    prepare(plan)
    train = documents_of(tmp_path / "out" / "train.bin")
    assert len(train) == 401 and train[-1] == "two\nlines"
    assert documents_of(tmp_path / "out" / "val.bin") == ["held out", "also held out"]


def test_prepare_refuses_what_cannot_work(plan, tmp_path):
    (tmp_path / "one.txt").write_text("a single document\n")
    plan.TRAIN_DATA_PATH = str(tmp_path / "one.txt")
    with pytest.raises(ValueError, match=r"none of the 1 documents .*VAL_FRACTION=0\.1"):
        prepare(plan)
    assert not list((tmp_path / "out").iterdir())
    plan.TRAIN_DATA_PATH = str(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist: .*download_data\.py"):
        prepare(plan)
    with pytest.raises(ValueError, match=r"TOKENIZER=gpt5 is unknown: use gpt2, or"):
        load_tokenizer("gpt5")


def test_a_missing_vocabulary_is_learned_and_kept(tmp_path):
    text = tmp_path / "corpus.txt"
    text.write_text("".join(f"the cat sat on mat number {i}, h\u00e9las\n" for i in range(300)), encoding="utf-8")
    s = types.SimpleNamespace(
        TRAIN_DATA_PATH=str(text), DATA_DIR=str(tmp_path / "out"), TOKENIZER=str(tmp_path / "t" / "tokenizer.pkl"),
        VOCAB_SIZE=300, VAL_FRACTION=0.1, VAL_DATA_PATH=None, NUM_WORKERS=2, overrides={"TRAIN_DATA_PATH"},
    )  # fmt: skip
    tokenizer = prepare(s)
    dataset = TokenDataset(tmp_path / "out" / "train.bin", 16, prepare(s, only_load_tokenizer=True).fingerprint)
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if not is_held_out(line, 0.1)]
    assert tokenizer.decode(dataset.tokens.tolist()) == "".join("<|endoftext|>" + line for line in lines)
    assert dataset.header["text_bytes"] == sum(len(line.encode()) for line in lines)
    assert dataset.n_tokens < dataset.header["text_bytes"] / 2  # something was merged
    s.overrides, s.VOCAB_SIZE = {"TRAIN_DATA_PATH", "VOCAB_SIZE"}, 400
    with pytest.raises(ValueError, match=r"VOCAB_SIZE=400, but TOKENIZER=.* has 300 tokens"):
        prepare(s)
    s.overrides = {"VOCAB_SIZE"}  # no flag names a text: the tokens that stand would be taken
    with pytest.raises(ValueError, match=r"VOCAB_SIZE=400, but TOKENIZER=.* has 300 tokens"):
        prepare(s)
    s.VOCAB_SIZE = 300
    assert prepare(s).vocab_size == 300


def test_without_a_download_the_sample_is_taken(plan, tmp_path, capsys):
    plan.TRAIN_DATA_PATH, plan.overrides = str(tmp_path / "never_downloaded.txt"), set()
    assert preparation.training_text(plan) == [DATA / "sample_corpus.jsonl.xz"]
    assert "taking the bundled sample_corpus.jsonl.xz" in capsys.readouterr().out
    assert find_inputs([str(tmp_path / "corpus.txt")]) == [tmp_path / "corpus.txt"]


def test_the_split_depends_on_the_text_alone():
    texts = [f"text {i}" for i in range(5000)]
    held = [text for text in texts if is_held_out(text, 0.02)]
    assert 60 < len(held) < 140
    assert set(held) <= {text for text in texts if is_held_out(text, 0.05)}  # a larger part keeps the smaller one
    assert is_held_out("text 16", 0.02) == (("text 16") in held)


def test_wikitext_lines_become_articles():
    lines = [
        "",
        " = Valkyria = \n",
        "",
        " Body . \n",
        " = = Plot = = \n",
        " More . \n",
        " = E = mc2 = \n",
        " Physics . \n",
    ]
    assert [text for text in articles({"text": line} for line in lines) if text] == [
        " = Valkyria = \n Body . \n = = Plot = = \n More . \n",
        " = E = mc2 = \n Physics . \n",
    ]


if __name__ == "__main__":
    print("shuffled:", permute(np.arange(12), 12, key=1).tolist())
    print("held out:", [i for i in range(200) if is_held_out(f"text {i}", 0.02)])
    print("bytes of the tokens of a, \u00e9, \u2603:", token_bytes(CharTokenizer("a\u00e9\u2603")).tolist())
    raise SystemExit(pytest.main([__file__, "-q"]))
