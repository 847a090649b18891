"""Hugging Face's tokenizers reads what we write, and we what is published: identical ids, or a refusal that says why.

uv run python phase1_foundation/project2_tokenizer/test_huggingface_format.py
"""

import json
import os

import pytest

from common import DATA
from phase1_foundation.project2_tokenizer import patterns
from phase1_foundation.project2_tokenizer.test_safe_pickle import TEXTS, prose, trained
from phase1_foundation.project2_tokenizer.tokenizer import RULES, BPETokenizer

# --- both ways ---


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


# --- files as others write them ---


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


# --- what is refused ---


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


if __name__ == "__main__":
    for text in TEXTS[:3]:
        print(f"{text!r}: {trained().encode(text)}")
    raise SystemExit(pytest.main([__file__, "-q"]))
