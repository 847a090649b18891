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
    colliding = {i * (2**61 - 1): 0 for i in range(1, 4)}  # all have the hash 0, as many as one likes
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
        "nested three deep": pickle.dumps({"merges": [[("a", "b")]]}),
        "nested through the memo": b"\x80\x04}(\x8c\x01a]\x94\x8c\x01b]h\x00au.",
        "a key nested 400,000 deep": b"\x80\x04}(" + b")" + b"\x85" * 400_000 + b"K\x01u.",
        "a pair nested 400,000 deep": b"\x80\x04}(NN" + b"\x86N" * 400_000 + b"\x86K\x01u.",
        "keys that collide": pickle.dumps({"inverse_vocab": colliding}),
        "an integer of 200 digits": pickle.dumps({"whole_pieces": 10**200}),
        "a million lists": b"\x80\x04}(" + b"]" * 1_000_000 + b"u.",
        "frame longer than any": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
        "itself": b"\x80\x04]\x94h\x00a.",
        "itself inside": b"\x80\x04}\x94\x8c\x01ah\x00s.",
        "stack underflow": b"\x80\x04u.",
        "nothing under the mark": b"\x80\x04(u.",
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


@pytest.mark.parametrize("name", ["os.system", "eval", "numpy array", "bytes", "persistent", "extension", "buffer"])
def test_what_could_do_more_than_plain_data_is_refused_by_its_opcode(name):
    with pytest.raises(UnsafePickleError, match=r"opcode \w+ can do more than plain data"):
        safe_pickle.read_plain(hostile("x")[name])


def test_deep_or_large_or_colliding_data_is_refused_for_what_it_is():
    for name, message in (
        ("nested 200,000 deep", "more than 64 dicts and lists"), ("a million lists", "more than 64 dicts and lists"),
        ("nested three deep", "nested more deeply"), ("nested through the memo", "nested more deeply"),
        ("a key nested 400,000 deep", "opcode EMPTY_TUPLE"), ("a pair nested 400,000 deep", "a pair of NoneType"),
        ("keys that collide", "a key of a dict is neither"), ("an integer of 200 digits", "an integer of 84 bytes"),
        ("itself inside", "nested more deeply"), ("string of 16 EB", "longer than it is"),
    ):  # fmt: skip
        with pytest.raises(UnsafePickleError, match=message):
            safe_pickle.loads(hostile("x")[name])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_read_as_the_standard_library_reads_it(protocol):
    numbers = [0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**63 - 1, -1, -(2**31), -(2**63)]
    shared = ("a", "\ud800é")
    fields = {"n": numbers, "pairs": [shared, shared], "none": None, "yes": True, "no": False, "text": "x" * 70_000}
    fields |= {"by id": {i: str(i) for i in range(3000)}, "empty": {}, "nothing": []}
    data = pickle.dumps(fields, protocol=protocol)
    assert repr(safe_pickle.loads(data)) == repr(pickle.loads(data)) == repr(fields)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    trained().save(tmp_path / "t.pkl")
    data = (tmp_path / "t.pkl").read_bytes()
    for size in [*range(0, 200), *range(200, len(data), 997)]:
        with pytest.raises(UnsafePickleError, match=r"cut off|damaged"):
            safe_pickle.loads(data[:size])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": {"a": "1"}}, "vocab must map str to int"), ({"merges": ["a"]}, "pairs of str"),
        ({"merges": [("Q", "Q")]}, "'QQ' is not in vocab"), ({"vocab": {"a": 1}}, "lacks 255 of the 256 bytes"),
        ({"rule": "other"}, "rule='other'"), ({"rule": 5}, "rule is int, expected str"), ({"pattern": "("}, "pattern="),
        ({"merges": [("t", "h"), ("t", "h")]}, "pair twice"), ({"special_tokens": {"<x>": 5}}, "an id of its own"),
        ({"special_tokens": {"<x>": -1}}, "from 0 up"), ({"normalization": "NFZ"}, "normalization='NFZ'"),
        ({"special_tokens": {"<x>": 10**12}}, "holds the id 1000000000000"), ({"kind": "char"}, "kind='char'"),
        ({"normalization": 1}, "normalization is int"), ({"always_matched": "<|pad|>"}, "must be a list of str"),
        ({"always_matched": ["the"]}, "'the', which is no special token"), ({"other_entries": []}, "other_entries is"),
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
    assert again == tokenizer and again.fingerprint == tokenizer.fingerprint


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


PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}  # as Qwen's <think>, NeoX's blanks


def with_plain_tokens(folder, form="NFC"):
    """A tokenizer.json with added tokens that are not special: found in any text, some of them after normalising."""
    content = json.loads(published(folder).read_text(encoding="utf-8"))
    added = [("<think>", False), ("   ", True), ("      ", True), ("<think>é", True), ("<|pad|>>", True)]
    tokens = [{"id": 900 + k, "content": token, "normalized": late, **PLAIN} for k, (token, late) in enumerate(added)]
    return published(folder, added_tokens=content["added_tokens"] + tokens, normalizer={"type": form} if form else None)


@pytest.mark.parametrize("form", ["NFC", ""])
def test_added_tokens_that_are_not_special_are_found_in_any_text(tmp_path, form):
    path = with_plain_tokens(tmp_path, form)
    theirs, ours = read_by_huggingface(path), BPETokenizer.from_huggingface(path)
    again = BPETokenizer.from_huggingface(ours.to_huggingface(tmp_path / "again.json"))
    saved = tmp_path / "t.pkl"
    ours.save(saved)
    assert ours == again == BPETokenizer.load(saved) and ours.always_matched == {
        "<think>", "   ", "      ", "<think>é", "<|pad|>>"
    }  # fmt: skip
    flags = [{(t["id"], t["content"], t["special"], t["normalized"])
              for t in json.loads(p.read_text(encoding="utf-8"))["added_tokens"]}
             for p in (path, tmp_path / "again.json")]  # fmt: skip
    assert flags[0] == flags[1]
    texts = [*TEXTS, "<think>e\u0301 a<think>\u0338b", "x       y\n    z", "<|pad|>><think>é<|pad|>", "<thi<think>"]
    for text in texts:
        theirs.encode_special_tokens = True  # special ones are plain text
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == again.encode(text) == ours.encode(text, engine="reference") == ids, text
        assert ours.encode_to_array(text).tolist() == ids
        theirs.encode_special_tokens = False
        assert ours.encode(text, "all") == theirs.encode(text, add_special_tokens=False).ids, text
    for threads in (1, 2):
        assert [ids.tolist() for ids in ours.encode_batch(texts, threads)] == [ours.encode(text) for text in texts]
    assert ours.encode_batch([]) == [] and 900 in ours.encode("<think>") and ours.decode([900]) == "<think>"


def test_an_added_token_that_is_not_in_normal_form_is_refused(tmp_path):
    token = {"id": 900, "content": "e\u0301", "normalized": True, **PLAIN}
    with pytest.raises(ValueError, match="normalized=true and is not in NFC"):
        BPETokenizer.from_huggingface(published(tmp_path, added_tokens=[token], normalizer={"type": "NFC"}))


def test_what_encode_does_not_follow_is_written_back(tmp_path):
    begin = {"id": "<|endoftext|>", "ids": [898], "tokens": ["<|endoftext|>"]}
    template = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    others = {
        "post_processor": {"type": "TemplateProcessing", "single": template, "pair": template,
                           "special_tokens": {"<|endoftext|>": begin}},
        "truncation": {"direction": "Right", "max_length": 7, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 899,
                    "pad_type_id": 0, "pad_token": "<|pad|>"},
    }  # fmt: skip
    path = published(tmp_path, **others)
    ours = BPETokenizer.from_huggingface(path)
    ours.save(tmp_path / "t.pkl")
    again = BPETokenizer.load(tmp_path / "t.pkl").to_huggingface(tmp_path / "again.json")
    written = json.loads(again.read_text(encoding="utf-8"))
    assert {key: written[key] for key in others} == others
    text = "to be or not to be, that is it"
    assert read_by_huggingface(again).encode(text).ids == read_by_huggingface(path).encode(text).ids
    assert (
        ours == trained() and ours.encode(text)[0] != 898 and len(ours.encode(text)) > 9
    )  # nothing added, nothing cut
    broken = BPETokenizer.from_dict(ours.to_dict() | {"other_entries": "[1"})
    with pytest.raises(ValueError, match="other_entries is"):
        broken.to_huggingface(again)
    assert json.loads(again.read_text(encoding="utf-8")) == written


def test_an_export_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = trained().to_huggingface(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"'\\ud800' holds a lone surrogate.*rename"):
        BPETokenizer.train(["abc"], 300, ["\ud800"]).to_huggingface(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        trained("longest_match").to_huggingface(tmp_path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model=[1]), "model is a list"), (lambda c: c["model"].pop("vocab"), "vocab is None"),
        (lambda c: c["model"].update(vocab=[1]), r"vocab is \[1\]"), (lambda c: c["model"].pop("merges"), "merges is"),
        (lambda c: c["model"]["vocab"].update(a="1"), "holds the id '1'"),
        (lambda c: c["model"]["vocab"].update(a=True), "holds the id True"),
        (lambda c: c["model"].update(merges=[5]), "merges holds 5"),
        (lambda c: c["model"].update(merges=["a b c"]), "merges holds 'a b c'"),
        (lambda c: c["model"].update(merges=[["a", 1]]), "merges holds"),
        (lambda c: c.update(added_tokens=[{"content": "<x>"}]), "id is None"),
        (lambda c: c.update(added_tokens=[{"id": 1}]), "content is None"),
        (lambda c: c.update(added_tokens={"id": 1}), "added_tokens is"),
        (lambda c: c.update(added_tokens=[7]), "added_tokens is"), (lambda c: c.update(normalizer="NFC"), "normalizer"),
        (lambda c: c.update(normalizer={"type": "Sequence"}), None),
        (lambda c: c.update(normalizer={"type": ["NFC"]}), "normalizer"), (lambda c: c.update(pre_tokenizer=3), "pre_"),
        (lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": 3}), "pretokenizers is 3"),
        (lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split"}, {"type": "ByteLevel", "use_regex": False}]}), "supported are"),
        (lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": 5}, "behavior": "Isolated"},
            {"type": "ByteLevel", "use_regex": False}]}), "Regex is 5"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_explained(tmp_path, change, message):
    path = published(tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    if message is None:  # unusual, but sound
        assert BPETokenizer.from_huggingface(path) == trained()
        return
    with pytest.raises(ValueError, match=message) as error:
        BPETokenizer.from_huggingface(path)
    assert "tokenizer.json" in str(error.value)


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
