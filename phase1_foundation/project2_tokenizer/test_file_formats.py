"""Files in and out: our pickle opens no door, Hugging Face's tokenizers reads what we write, scripts do what they say.

uv run python phase1_foundation/project2_tokenizer/test_file_formats.py
"""

import functools
import io
import json
import os
import pickle
import struct

import numpy as np
import pytest

from common import DATA
from phase1_foundation.project2_tokenizer import config, download_data, patterns, safe_pickle, train_tokenizer
from phase1_foundation.project2_tokenizer.corpus import Corpus
from phase1_foundation.project2_tokenizer.safe_pickle import UnsafePickleError
from phase1_foundation.project2_tokenizer.tokenizer import RULES, BPETokenizer

TEXTS = [
    "The quick brown fox's 3 friends, 12345 of them!  \n\n  They'll jump.",
    "naïve café 漢字 ½ ٣ 👩‍👩‍👧", "\t\r\n x\u00a0y\u2028z",
    "<|endoftext|>a<|pad|>", "", "def f(x):\n\treturn x**2  # squared\n", "aaaaaaaaaaaaaaaaaaaaaaaa" * 20,
]  # fmt: skip


@functools.cache
def prose() -> str:
    return (DATA / "shakespeare.txt").read_text(encoding="utf-8")[:150_000]


@functools.cache
def trained(rule: str = "merges", pattern: str = "gpt2") -> BPETokenizer:
    return BPETokenizer.train([prose(), *TEXTS * 3], 900, ["<|endoftext|>", "<|pad|>"], rule=rule, pattern=pattern)


# --- the pickle ---


def test_a_saved_tokenizer_is_plain_data(tmp_path):
    path = tmp_path / "deep" / "tokenizer.pkl"
    trained().save(path)
    fields = pickle.loads(path.read_bytes())
    assert all(type(k) is str and type(v) is int for k, v in fields["vocab"].items())
    assert fields["inverse_vocab"] == {i: token for token, i in fields["vocab"].items()}
    assert fields["merges"] == trained().merges and type(fields["merges"][0]) is tuple
    assert fields["rule"] == "merges" and fields["special_tokens"] == {"<|endoftext|>": 898, "<|pad|>": 899}
    assert kinds(fields) <= {dict, list, tuple, str, int}
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.pkl"]


def kinds(value) -> set[type]:
    """All types in a nested value."""
    inside = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return {type(value)}.union(*map(kinds, inside))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_saved_tokenizer_is_read_back(tmp_path, rule, protocol):
    tokenizer, path = trained(rule), tmp_path / "t.pkl"
    tokenizer.save(path)
    assert BPETokenizer.load(path) == tokenizer
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol=protocol))
    assert BPETokenizer.load(path) == tokenizer


class Payload:
    """Runs a command when unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(marker) -> dict[str, bytes]:
    """Pickles that run code, reach outside, or eat the machine."""
    command = f"touch {marker}"
    deep = b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."
    return {
        "os.system": pickle.dumps({"vocab": Payload(os.system, command)}),
        "os.system, protocol 0": pickle.dumps(Payload(os.system, command), protocol=0),
        "os.system, protocol 2": pickle.dumps([Payload(os.system, command)], protocol=2),
        "eval": pickle.dumps({"a": {"b": [Payload(eval, f"open({str(marker)!r}, 'w')")]}}),
        "inst": b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'touch x'\no.",
        "numpy array": pickle.dumps({"vocab": np.zeros(3)}),
        "numpy scalar": pickle.dumps(np.float64(1)),
        "a class of ours": pickle.dumps(safe_pickle.UnsafePickleError("x")),
        "an object": pickle.dumps(io.BytesIO(b"x")),
        "a function": pickle.dumps(len),
        "a float": pickle.dumps({"vocab": 1.5}),
        "bytes": pickle.dumps({"vocab": b"x"}),
        "None": pickle.dumps(None),
        "persistent": b"\x80\x04\x8c\x01xQ.",
        "extension": b"\x80\x02\x82\x01.",
        "buffer": b"\x80\x05\x97.",
        "memo index of 4 billion": b"\x80\x04}r\xff\xff\xff\xff.",
        "string of 4 GB": b"\x80\x04X\xff\xff\xff\xff.",
        "string of 16 EB": b"\x80\x04\x8d" + struct.pack("<Q", 2**64 - 1) + b".",
        "frame beyond the end": b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.",
        "nested 200,000 deep": deep,
        "itself": b"\x80\x04]\x94h\x00a.",
        "stack underflow": b"\x80\x04u.",
        "unhashable key": b"\x80\x04}]]s.",
        "memo never written": b"\x80\x04h\x05.",
        "no stop": b"\x80\x04}",
        "nothing": b"",
        "text": b"hello, world",
        "zeros": bytes(1000),
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, name):
    marker, path = tmp_path / "ran", tmp_path / "bad.pkl"
    path.write_bytes(hostile(marker)[name])
    with pytest.raises(ValueError, match=r"bad\.pkl (is refused|is damaged|is no tokenizer)"):
        BPETokenizer.load(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["memo index of 4 billion", "string of 4 GB", "string of 16 EB", "os.system", "bytes"])
def test_what_could_eat_the_machine_is_refused_before_anything_is_executed(name):
    with pytest.raises(UnsafePickleError, match=r"reaches beyond the file|can do more than plain data"):
        safe_pickle.check(hostile("x")[name])


def test_nothing_that_the_scan_lets_through_can_import():
    """The second wall by itself: the unpickler refuses classes and outside objects."""
    for data in (pickle.dumps(os.system), b"\x80\x04\x8c\x01xQ."):
        with pytest.raises(UnsafePickleError):
            safe_pickle._PlainUnpickler(io.BytesIO(data)).load()


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    trained().save(tmp_path / "t.pkl")
    data = (tmp_path / "t.pkl").read_bytes()
    for size in [*range(0, 200), *range(200, len(data), 997)]:
        with pytest.raises(UnsafePickleError, match=r"cut off|damaged|beyond"):
            safe_pickle.loads(data[:size])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": {"a": "1"}}, "vocab must map str to int"), ({"merges": [("a",)]}, "pairs of str"),
        ({"merges": [("Q", "Q")]}, "'QQ' is not in vocab"), ({"vocab": {"a": 1}}, "lacks 255 of the 256 bytes"),
        ({"rule": "other"}, "rule='other'"), ({"rule": 5}, "rule is int, expected str"), ({"pattern": "("}, "pattern="),
        ({"merges": [("t", "h"), ("t", "h")]}, "pair twice"), ({"special_tokens": {"<x>": 5}}, "an id of its own"),
        ({"special_tokens": {"<x>": -1}}, "from 0 up"), ({"normalization": "NFZ"}, "normalization='NFZ'"),
    ],
)  # fmt: skip
def test_plain_data_that_is_no_tokenizer_is_refused(tmp_path, change, message):
    path = tmp_path / "t.pkl"
    path.write_bytes(pickle.dumps(trained().to_dict() | change))
    with pytest.raises(ValueError, match=message) as error:
        BPETokenizer.load(path)
    assert "t.pkl is no tokenizer" in str(error.value)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        BPETokenizer.load(tmp_path / "none.pkl")


# --- Hugging Face ---


def read_by_huggingface(path):
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
@pytest.mark.parametrize("rule", RULES)
def test_huggingface_reads_what_we_write(tmp_path, rule, pattern):
    tokenizer = trained(rule, pattern)
    path = tokenizer.to_huggingface(tmp_path)
    assert path == tmp_path / "tokenizer.json"
    theirs = read_by_huggingface(path)
    for text in [*TEXTS, prose()[-20_000:]]:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == tokenizer.encode(text, "all"), text
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.get_vocab_size() == tokenizer.vocab_size and theirs.token_to_id("<|pad|>") == 899


@pytest.mark.parametrize("pattern", patterns.PATTERNS)
@pytest.mark.parametrize("rule", RULES)
def test_what_we_write_we_read_back(tmp_path, rule, pattern):
    tokenizer = trained(rule, pattern)
    again = BPETokenizer.from_huggingface(tokenizer.to_huggingface(tmp_path / "mine.json"))
    assert again.vocab == tokenizer.vocab and again.special_tokens == tokenizer.special_tokens
    assert again.pattern == tokenizer.pattern and again.rule == rule
    assert again.merges == (tokenizer.merges if rule == "merges" else [])  # a longest match needs none
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_gpt2_goes_to_huggingface_and_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    gpt2 = BPETokenizer.from_gpt2_files(DATA / "gpt2" / "encoder.json.gz", DATA / "gpt2" / "vocab.bpe.gz")
    gpt2.to_huggingface(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in [*TEXTS, prose()[:20_000]]:
        assert theirs.encode(text) == gpt2.encode(text, "all")
    assert BPETokenizer.from_huggingface(tmp_path) == gpt2


def published(folder, **changes):
    """A tokenizer.json with some entries changed, as other tools write them."""
    path = trained().to_huggingface(folder / "tokenizer.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key] |= value
        else:
            content[key] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},  # Qwen
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}},
        {"model": {"ignore_merges": True}},  # Llama 3
        {"model": {"unk_token": "<|endoftext|>"}},  # GPT-2 as published: never used
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": r"\p{Lu}?\p{L}+|[^\p{L}]"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": patterns.GPT4_DIGITS}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}},
    ],
    ids=["NFC", "NFKC", "ignore_merges", "unk_token", "an expression of its own", "removed"],
)  # fmt: skip
def test_published_variants_give_huggingfaces_ids(tmp_path, changes):
    path = published(tmp_path, **changes)
    theirs, ours = read_by_huggingface(path), BPETokenizer.from_huggingface(path)
    for text in [*TEXTS, "e\u0301 ﬁ ① \u1100\u1161", prose()[:5000]]:
        assert ours.encode(text, "all") == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.encode(text, "all", engine="reference") == ours.encode(text, "all")
    again = tmp_path / "again.json"
    ours.to_huggingface(again)
    assert BPETokenizer.from_huggingface(again) == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "Unigram"}}, "its model is Unigram; BPE is supported"),
        ({"model": {"type": "WordPiece", "continuing_subword_prefix": "##"}}, "its model is WordPiece"),
        ({"model": {"byte_fallback": True}}, "byte_fallback=True"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix='</w>'"),
        ({"pre_tokenizer": None}, "must end with ByteLevel"),
        ({"pre_tokenizer": {"add_prefix_space": True}}, "without a prefix space"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, {"type": "ByteLevel"}]}},
         "supported are ByteLevel"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer .*Lowercase"),
        ({"added_tokens": [{"id": 898, "content": "<|endoftext|>", "lstrip": True}]}, "lstrip=true"),
        ({"model": {"vocab": {"▁the": 0}}}, "'▁the' is not written in the byte alphabet"),
        ({"model": None}, "its model is None"),
    ],
)  # fmt: skip
def test_files_that_we_could_not_reproduce_are_refused(tmp_path, changes, message):
    path = published(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        BPETokenizer.from_huggingface(path)


# --- scripts and config ---


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
    for name, data in hostile("/dev/null").items():
        try:
            safe_pickle.loads(data, name)
            print(f"{name}: plain data")
        except UnsafePickleError as error:
            print(error)
    raise SystemExit(pytest.main([__file__, "-q"]))
