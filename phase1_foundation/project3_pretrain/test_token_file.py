"""Token files: what is on disk is what was written, refused when damaged; how many bytes each token stands for."""

import io
import json
import os

import numpy as np
import pytest

from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project2_tokenizer.bytes_alphabet import to_printable
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain import token_file
from phase1_foundation.project3_pretrain.data import TokenDataset, TokenFileError, TokenWriter, write_tokens
from phase1_foundation.project3_pretrain.hub_tokenizer import ForeignTokenizer
from phase1_foundation.project3_pretrain.test_data import BYTES, ByteTokenizer, make
from phase1_foundation.project3_pretrain.token_file import header_path, separator, token_bytes


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


if __name__ == "__main__":
    print("bytes of the tokens of a, \u00e9, \u2603:", token_bytes(CharTokenizer("a\u00e9\u2603")).tolist())
    raise SystemExit(pytest.main([__file__, "-q"]))
