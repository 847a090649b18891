"""The scripts do what they say: training, the corpus and what is held out of it, download; the config.

uv run python phase1_foundation/project2_tokenizer/test_scripts.py
"""

import json

import pytest

from phase1_foundation.project2_tokenizer import config, download_data, train_tokenizer
from phase1_foundation.project2_tokenizer.corpus import Corpus
from phase1_foundation.project2_tokenizer.test_safe_pickle import prose
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer


def test_training_as_a_script(tmp_path, capsys):
    data, out = tmp_path / "text.txt", tmp_path / "out" / "tokenizer.pkl"
    data.write_text("\n".join(prose().split("\n\n")[:400]), encoding="utf-8")
    flags = ["--vocab_size", "600", "--train_data_path", str(data), "--tokenizer_path", str(out)]
    train_tokenizer.main(flags)
    printed = capsys.readouterr().out
    assert "* VOCAB_SIZE" in printed and "longest_match" in printed and "100%" in printed
    tokenizer = BPETokenizer.load(out)
    assert tokenizer.vocab_size == 600 and tokenizer.rule == "longest_match" and tokenizer.eot_id == 596
    line = json.loads((out.parent / "metrics.jsonl").read_text(encoding="utf-8"))
    assert line["vocab_size"] == 600 and line["merges"]["round_trips"] == 1
    train_tokenizer.main([*flags, "--engine", "reference"])
    assert BPETokenizer.load(out) == tokenizer


def test_training_explains_what_is_wrong(tmp_path, capsys):
    for flags, message in (
        (["--vocab_size", "200"], "VOCAB_SIZE=200 minus NUM_SPECIAL_TOKENS=4 leaves 196"),
        (["--train_data_path", str(tmp_path / "none.txt")], "none.txt"),
        (["--rule", "any"], "RULE=any must be one of"),
    ):
        with pytest.raises(SystemExit) as stop:
            train_tokenizer.main(flags)
        assert stop.value.code == 2 and message in capsys.readouterr().err


def test_every_twentieth_document_is_held_out(tmp_path):
    path = tmp_path / "c.txt"
    path.write_text("\n".join(f"document {i}" for i in range(1, 101)), encoding="utf-8")
    corpus = Corpus(path)
    texts = list(corpus)
    assert corpus.held_out == [f"document {i}" for i in (20, 40, 60, 80, 100)]
    assert len(texts) == 95 and corpus.bytes == sum(map(len, texts))
    assert len(list(Corpus(path, max_bytes=50))) == 5


def test_wikitext_lines_become_articles():
    lines = ["", " = One = ", "", " first line ", " = = Part = = ", " second ", " = Two = ", " text "]
    assert list(download_data.articles({"text": line} for line in lines)) == [
        "= One = first line = = Part = = second", "= Two = text"
    ]  # fmt: skip


def test_without_a_connection_the_sample_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(download_data, "PATH", tmp_path / "wikipedia_train.txt")
    download_data.main(["--size", "small", "--source", "wikipedia"])
    assert "bundled" in capsys.readouterr().out
    assert (tmp_path / "wikipedia_train.txt").stat().st_size > 5_000_000
    (tmp_path / "wikipedia_train.txt").unlink()
    with pytest.raises(SystemExit) as stop:
        download_data.main(["--no_fallback"])
    assert stop.value.code == 1 and not (tmp_path / "wikipedia_train.txt").exists()


def test_special_tokens_follow_their_number():
    from common.settings import load

    assert config.special_tokens() == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    assert config.special_tokens(load(config, ["--num_special_tokens", "1"])) == ["<|endoftext|>"]
    assert config.special_tokens(load(config, ["--num_special_tokens", "6"]))[4:] == [
        "<|reserved_0|>",
        "<|reserved_1|>",
    ]
    for flags in (["--vocab_size", "259"], ["--num_special_tokens", "-1"], ["--special_tokens", "a", "a", "b", "c"]):
        with pytest.raises(ValueError, match=r"VOCAB_SIZE=259|NUM_SPECIAL_TOKENS=-1|SPECIAL_TOKENS="):
            load(config, flags)


if __name__ == "__main__":
    print("special tokens:", *config.special_tokens())
    raise SystemExit(pytest.main([__file__, "-q"]))
