"""Preparation: texts are split by document, tokenised once and again when something changed; articles of wikitext."""

import os
import types

import numpy as np
import pytest

from common import DATA
from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project3_pretrain import preparation
from phase1_foundation.project3_pretrain.data import TokenDataset, TokenFileError
from phase1_foundation.project3_pretrain.download_data import articles
from phase1_foundation.project3_pretrain.preparation import find_inputs, is_held_out, load_tokenizer, prepare
from phase1_foundation.project3_pretrain.test_data import BYTES
from phase1_foundation.project3_pretrain.test_token_file import damage_content
from phase1_foundation.project3_pretrain.token_file import read_header


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
    print("held out:", [i for i in range(200) if is_held_out(f"text {i}", 0.02)])
    raise SystemExit(pytest.main([__file__, "-q"]))
