"""The tokenizer as its users see it: any text comes back, GPT-2's ids are tiktoken's, files are safe.

uv run python phase1_foundation/project2_tokenizer/test_tokenizer.py
uv run python phase1_foundation/project2_tokenizer/test_tokenizer.py --interactive

The first shows some examples and runs the tests; the second colours the tokens of what you type.
"""

import copy
import functools
import gzip
import pickle
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import DATA, ROOT
from common.run import Run, ask
from phase1_foundation.project2_tokenizer import config, patterns
from phase1_foundation.project2_tokenizer.bytes_alphabet import from_printable
from phase1_foundation.project2_tokenizer.tokenizer import RULES, BPETokenizer

GPT2_FILES = DATA / "gpt2" / "encoder.json.gz", DATA / "gpt2" / "vocab.bpe.gz"
ANY_TEXT = st.text(st.characters(categories=("L", "M", "N", "P", "S", "Z", "C")), max_size=60)  # C: also Cs, surrogates
NASTY = "'s'S'LL'll're'Ve''d ſ'ſ 12345 ½٣ \t\n\r\n  \u00a0 \u3000x\u2028 é漢字!!! \ud800 \udfff \0 e\u0301 👩‍👩‍👧"


@functools.cache
def shakespeare() -> str:
    return (DATA / "shakespeare.txt").read_text(encoding="utf-8")


@functools.cache
def small(rule: str = "longest_match") -> BPETokenizer:
    return BPETokenizer.train([shakespeare()[:200_000]], 1000, ["<|endoftext|>", "<|pad|>"], rule=rule)


@functools.cache
def gpt2() -> BPETokenizer:
    return BPETokenizer.from_gpt2_files(*GPT2_FILES)


@pytest.fixture(scope="module")
def tiktoken_gpt2(tmp_path_factory):
    """tiktoken's encoding made of the bundled files (its own way of reading them, no network)."""
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder = tmp_path_factory.mktemp("gpt2")
    for path in GPT2_FILES:
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(folder / "vocab.bpe"), encoder_json_file=str(folder / "encoder.json")
    )
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=patterns.GPT2, mergeable_ranks=ranks, special_tokens=special)


# --- any text comes back ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "gpt2_digits", "gpt4_digits", r"\w+|\s"])
@settings(deadline=None, max_examples=150)
@given(text=ANY_TEXT)
def test_any_text_comes_back(rule, pattern, text):
    tokenizer = trained_with(pattern, rule)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, engine="reference") == ids


@functools.cache
def trained_with(pattern, rule):
    return BPETokenizer.train([shakespeare()[:30_000], NASTY * 20], 500, pattern=pattern, rule=rule)


@pytest.mark.parametrize(
    "text", ["", "\0", "\0\0a\0", "\ud800", "\udfff\ud800", "\U0010ffff", NASTY, "\x85\x1c", "a" * 300]
)
def test_texts_that_break_tokenizers(text):
    for tokenizer in (small(), small("merges"), gpt2()):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text, engine="reference") == tokenizer.encode(text)


def test_every_code_point_comes_back():
    text = "".join(map(chr, range(0x110000)))  # with all surrogates, in an order that pairs none of them up
    for tokenizer in (small(), gpt2()):
        assert tokenizer.decode(tokenizer.encode_to_array(text)) == text


def test_bytes_that_are_no_text_decode_to_the_replacement_character():
    tokenizer = small()
    half = tokenizer.encode("é")[:1] if len(tokenizer.encode("é")) > 1 else [tokenizer.vocab["Ã"]]
    assert tokenizer.decode([*half, *tokenizer.encode("a")]) == "\ufffda"
    assert tokenizer.decode_bytes(half) == b"\xc3"


def test_an_id_that_is_no_token_is_named():
    for bad in (-1, 10**9, small().vocab_size):
        with pytest.raises(ValueError, match=f"id {bad} is no token: ids go from 0 to 999"):
            small().decode([0, bad])


def test_only_str_is_encoded():
    for allowed in ("none", "all"):
        with pytest.raises(TypeError, match="text is a bytes"):
            small().encode(b"bytes", allowed)
    with pytest.raises(TypeError, match="text is a int"):
        small().encode_batch(["a", 5])
    with pytest.raises(TypeError, match="texts is one str"):
        small().encode_batch("abc")
    with pytest.raises(ValueError, match="num_threads=-1 must be at least 1"):
        small().encode_batch(["abc"], num_threads=-1)
    with pytest.raises(ValueError, match="num_threads=-1 must be at least 1"):
        BPETokenizer.train(["abc"], 300, num_threads=-1)


# --- GPT-2's files give tiktoken's ids ---


def test_gpt2_ids_on_prose_and_code(tiktoken_gpt2):
    code = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py"))
    for text in (shakespeare(), code, code.replace("    ", "\t"), NASTY.replace("\ud800", "").replace("\udfff", "")):
        assert gpt2().encode(text) == tiktoken_gpt2.encode_ordinary(text)
    assert gpt2().vocab_size == tiktoken_gpt2.n_vocab == 50257
    assert gpt2().decode(gpt2().encode(code)) == code


def test_gpt2_ids_on_all_of_unicode(tiktoken_gpt2):
    every = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    if tiktoken_classes(tiktoken_gpt2, every) != our_classes(every):  # tiktoken moved on to a newer Unicode
        every = [c for c in every if ord(c) < 0x250]
    for template in ("{}a", " {}1"):
        text = "".join(template.replace("{}", c) for c in every)
        ours, theirs = gpt2().encode_to_array(text), np.array(tiktoken_gpt2.encode_ordinary(text))
        assert np.array_equal(ours, theirs), template


def tiktoken_classes(encoding, every):
    """What tiktoken takes for letters and numbers."""
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([b]): b for b in range(256)}
    found = []
    for expression in (r"\p{L}+", r"\p{N}+", r"\s+"):
        probe = tiktoken.Encoding("probe", pat_str=expression, mergeable_ranks=ranks, special_tokens={})
        found.append(set(bytes(probe.encode_ordinary("".join(every))).decode()))
    return found


def our_classes(every):
    classes = patterns.character_classes()
    groups = patterns.WORD_LETTERS, (patterns.NUMBER,), patterns.BLANKS
    return [{c for c in every if classes[ord(c)] in group} for group in groups]


@settings(deadline=None, max_examples=400)
@given(text=st.one_of(ANY_TEXT.map(lambda t: "".join(c for c in t if not "\ud800" <= c <= "\udfff")),
                      st.text("ab 's't'llre\n\t1A.é漢", max_size=80)))  # fmt: skip
def test_gpt2_ids_on_fuzzed_text(tiktoken_gpt2, text):
    assert gpt2().encode(text) == tiktoken_gpt2.encode_ordinary(text)


def test_gpt2_special_tokens_are_those_of_tiktoken(tiktoken_gpt2):
    text = "a<|endoftext|>b <|endoftext|><|endoftext|"
    assert gpt2().eot_id == 50256 and gpt2().special_tokens == {"<|endoftext|>": 50256}
    assert gpt2().encode(text) == tiktoken_gpt2.encode(text, disallowed_special=())
    assert gpt2().encode(text, "all") == tiktoken_gpt2.encode(text, allowed_special="all")
    assert gpt2().decode(gpt2().encode(text, "all")) == text


def test_gpt2_files_may_be_plain_or_compressed(tmp_path):
    for path in GPT2_FILES:
        (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    plain = BPETokenizer.from_gpt2_files(tmp_path / "encoder.json", str(tmp_path / "vocab.bpe"))
    assert plain == gpt2() and plain.fingerprint == gpt2().fingerprint and plain.rule == "merges"


def test_gpt2_files_that_do_not_match_are_refused(tmp_path):
    (tmp_path / "encoder.json").write_text('{"a": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"lacks 255 of the 256 bytes|not in the 256-character|not in vocab"):
        BPETokenizer.from_gpt2_files(tmp_path / "encoder.json", GPT2_FILES[1])
    (tmp_path / "encoder.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"encoder\.json is not JSON"):
        BPETokenizer.from_gpt2_files(tmp_path / "encoder.json", GPT2_FILES[1])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json does not exist"):
        BPETokenizer.from_gpt2_files(tmp_path / "nowhere.json", GPT2_FILES[1])


# --- special tokens ---


def test_special_tokens_are_plain_text_unless_allowed():
    tokenizer, text = small(), "x<|pad|>y<|endoftext|>"
    pad, end = tokenizer.special_tokens["<|pad|>"], tokenizer.special_tokens["<|endoftext|>"]
    assert (end, pad) == (998, 999) and tokenizer.eot_id == end
    assert not {pad, end} & set(tokenizer.encode(text))
    assert {pad, end} <= set(tokenizer.encode(text, "all"))
    assert pad in tokenizer.encode(text, {"<|pad|>"}) and end not in tokenizer.encode(text, {"<|pad|>"})
    for allowed in ("none", "all", set(), {"<|pad|>"}):
        assert tokenizer.decode(tokenizer.encode(text, allowed)) == text
        assert tokenizer.encode(text, allowed, engine="reference") == tokenizer.encode(text, allowed)
    assert tokenizer.encode(text, None) == tokenizer.encode(text)
    with pytest.raises(ValueError, match=r"allowed_special=.*nothing_such"):
        tokenizer.encode(text, {"nothing_such"})
    with pytest.raises(ValueError, match="allowed_special='some'"):
        tokenizer.encode(text, "some")


def test_the_longest_of_several_special_tokens_wins():
    tokenizer = BPETokenizer.train(["abc"], 258, ["<a>", "<a><b>"])
    assert tokenizer.encode("<a><b><a>", "all") == [257, 256]


def test_special_tokens_must_be_usable():
    with pytest.raises(ValueError, match='holds ""'):
        BPETokenizer.train(["a"], 300, [""])
    with pytest.raises(ValueError, match="'a' is also an ordinary token"):
        BPETokenizer.train(["a"], 300, ["a"])


# --- training, seen from outside ---


def test_a_vocabulary_has_bytes_then_merges_then_special_tokens():
    tokenizer = BPETokenizer.train(["aaa bbb aaa"] * 5, 260, ["<|endoftext|>"])
    assert tokenizer.vocab["!"] == 0 and tokenizer.vocab["Ġ"] == 220
    assert tokenizer.merges == [("a", "a"), ("b", "b"), ("aa", "a")]  # counts 20, 10, 10: ties go to smaller ids
    assert tokenizer.vocab["aa"] == 256 and tokenizer.special_tokens == {"<|endoftext|>": 259}
    assert tokenizer.vocab_size == len(tokenizer) == 260
    assert tokenizer.inverse_vocab[259] == "<|endoftext|>" and len(tokenizer.inverse_vocab) == 260


def test_a_small_text_gives_a_small_vocabulary():
    tokenizer = BPETokenizer.train(["ab ab"], 50_000, min_frequency=2)
    assert tokenizer.merges == [("a", "b")] and tokenizer.vocab_size == 258
    assert BPETokenizer.train([], 300).merges == [] == BPETokenizer.train(["", "a"], 300).merges
    assert BPETokenizer.train("one text, not its letters", 300).merges
    assert len(BPETokenizer.train(["abc abc"] * 3, 1_000_000_000).merges) == 3  # takes memory for three, too


@pytest.mark.parametrize("size", [256, -5, 0])
def test_a_vocabulary_needs_room_for_the_bytes(size):
    with pytest.raises(ValueError, match=f"vocab_size={size} minus 1 special tokens.*use vocab_size=257 or more"):
        BPETokenizer.train(["abc"], size)


def test_wrong_arguments_are_explained():
    for arguments, message in (
        ({"engine": "slow"}, "engine='slow' is unknown"), ({"rule": "best"}, "rule='best' is unknown"),
        ({"pattern": "gpt5"}, "pattern='gpt5' is unknown"), ({"pattern": "(a"}, "no regular expression"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            BPETokenizer.train(["abc"], 300, **arguments)
    with pytest.raises(TypeError, match="texts holds a bytes"):
        BPETokenizer.train([b"abc"], 300)


# --- encoding in bulk and in parallel ---


def test_a_batch_is_its_texts_one_by_one():
    rng = random.Random(0)
    texts = [shakespeare()[(at := rng.randrange(10**6)) : at + rng.choice([0, 1, 50, 3000])] for _ in range(2000)] + [
        ""
    ]
    for tokenizer in (small(), gpt2()):
        for threads in (1, 2, 5, None):
            batch = tokenizer.encode_batch(texts, num_threads=threads)
            assert len(batch) == len(texts) and all(ids.dtype == np.int32 for ids in batch)
            assert all(ids.tolist() == tokenizer.encode(text) for ids, text in zip(batch[:50], texts))
            assert sum(map(len, batch)) == sum(map(len, map(tokenizer.encode, texts)))
    assert small().encode_batch([]) == []


def test_a_batch_with_a_foreign_pattern():
    tokenizer = trained_with(r"\w+|\s", "merges")
    texts = ["", "a b", "", "one, two!", "", ""]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]


def test_many_threads_share_a_tokenizer():
    tokenizer = BPETokenizer.from_dict(small().to_dict())
    texts = [shakespeare()[i * 5000 : (i + 1) * 5000] for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(tokenizer.encode, texts))
    assert results == [small().encode(text) for text in texts]


def test_results_do_not_depend_on_what_was_encoded_before():
    tokenizer, rng = BPETokenizer.from_dict(small("merges").to_dict()), random.Random(1)
    words = ["".join(rng.choices("abcdefgh'é漢 ", k=rng.randint(1, 40))) for _ in range(300)]
    first = [tokenizer.encode(word) for word in words]
    tokenizer.encode(" ".join("".join(rng.choices("abcdefghijklmnop", k=7)) for _ in range(400_000)))  # evicts all
    assert [tokenizer.encode(word) for word in words] == first


def test_a_long_piece_is_not_taken_for_its_beginning():
    for size in (1, 30, 31, 32, 33, 62, 63, 64, 95, 255, 256, 287, 543):  # the cache holds pieces of up to 31 bytes
        for text in ("-" * size, "ab" * (size // 2) + "c" * (size % 2)):  # dashes: long tokens, so few that they fit
            for tokenizer in (gpt2(), small()):
                assert tokenizer.encode(text) == tokenizer.encode(text, engine="reference")


# --- as a value ---


def test_copies_and_pickles_are_equal():
    for tokenizer in (small(), gpt2()):
        for again in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer)),
                      BPETokenizer.from_dict(tokenizer.to_dict())):  # fmt: skip
            assert again == tokenizer and again.fingerprint == tokenizer.fingerprint
            assert again.encode("all the same") == tokenizer.encode("all the same")


def test_the_fingerprint_sees_everything_that_changes_ids():
    fields = small("merges").to_dict()
    others = [
        fields | {"rule": "longest_match"}, fields | {"pattern": "gpt4"}, fields | {"normalization": "NFC"},
        fields | {"merges": fields["merges"][:-1]}, fields | {"whole_pieces": 1},
        fields | {"always_matched": ["<|pad|>"]}, fields | {"matched_late": ["<|pad|>"]},
    ]  # fmt: skip
    prints = {BPETokenizer.from_dict(f).fingerprint for f in [fields, *others]}
    assert len(prints) == 8 and small() != "something else"
    assert small("merges").with_rule("longest_match").fingerprint == BPETokenizer.from_dict(others[0]).fingerprint
    assert BPETokenizer.from_dict(others[0] | {"merges": []}) == BPETokenizer.from_dict(others[0])  # it asks for none
    assert BPETokenizer.from_dict(fields | {"other_entries": "{}"}) == small("merges")


def test_merges_that_are_not_known_are_not_made_up():
    without = BPETokenizer.from_dict(small().to_dict() | {"merges": []})
    with pytest.raises(ValueError, match="rule='merges' needs merges, and this tokenizer has none"):
        without.with_rule("merges")
    assert without.with_rule("longest_match") == without
    assert BPETokenizer.train([], 257).with_rule("merges").encode("a") == [64]  # bytes alone need none


def test_importing_the_tokenizer_is_quick():
    code = (
        "import sys, phase1_foundation.project2_tokenizer.tokenizer as t; "
        "print([m for m in ('numba', 'torch', 'tokenizers', 'tiktoken') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.strip() == "[]"


# --- as a script ---


def answers(monkeypatch, *lines):
    """Types these lines, then presses Ctrl-C."""
    left = list(lines)

    def typed(question):
        if left:
            return left.pop(0)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("Ctrl-C did not interrupt input()")

    monkeypatch.setattr("builtins.input", typed)


def test_ctrl_c_leaves_the_dialogue_at_once(monkeypatch, capsys, tmp_path):
    small().save(tmp_path / "t.pkl")
    answers(monkeypatch, "a \x1b[31mred\x07 word")
    before = signal.getsignal(signal.SIGINT)
    main(["--interactive", "--tokenizer_path", str(tmp_path / "t.pkl")])  # returns: status 0
    printed = capsys.readouterr().out
    assert printed.endswith("\n") and "bytes per token" in printed and signal.getsignal(signal.SIGINT) is before
    assert "\x1b" not in printed and "\x07" not in printed and r"\x1b" in printed  # shown, not obeyed


def test_a_tokenizer_that_was_asked_for_must_exist(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["--interactive", "--tokenizer_path", str(tmp_path / "none.pkl")])
    assert stop.value.code == 2 and "none.pkl" in capsys.readouterr().err


def colour(tokenizer, text):
    """The tokens of a text on coloured grounds, and a table of ids and bytes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grounds = ("#7a3b3b", "#3b5f7a", "#3b7a4a", "#6a5a2a", "#5b3b7a")
    console, ids, line = Console(), tokenizer.encode(text, "all"), Text()
    table = Table("token", "id", "bytes", "hex", box=None)
    for k, i in enumerate(ids):
        data = tokenizer.decode_bytes([i])
        part = data.decode("utf-8", "backslashreplace")  # part of a character: its bytes
        part = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in part)  # no escape acts
        shown = Text(part, style=f"white on {grounds[k % len(grounds)]}")
        line.append_text(shown)
        table.add_row(shown, str(i), str(len(data)), data.hex(" "))
    console.print(line)
    console.print(table)
    size = len(tokenizer.decode_bytes(ids))
    console.print(f"{len(ids)} tokens, {size} bytes, {size / max(1, len(ids)):.2f} bytes per token")


def interactive(run):
    """Ask for text until an empty line, and show its tokens."""
    path = Path(run.settings.TOKENIZER_PATH)
    own = path.is_file() or "TOKENIZER_PATH" in run.settings.overrides  # what was asked for, or an error
    tokenizer = BPETokenizer.load(path) if own else gpt2()
    run.print(f"{path if own else 'GPT-2 (train_tokenizer.py makes one of your own)'}: {tokenizer!r}")
    while text := ask("text> "):
        colour(tokenizer, text)


def examples():
    """A few things to look at."""
    for name, tokenizer in (("trained on Shakespeare, longest match", small()), ("GPT-2, merges", gpt2())):
        for text in ("To be, or not to be", "unbelievably naïve", "\ud800\0"):
            ids = tokenizer.encode(text)
            print(f"{name}: {text!r} -> {ids} -> {tokenizer.pieces(text)} -> {tokenizer.decode(ids)!r}")
    assert from_printable("Ġ") == b" "


def main(argv=None):
    """Show examples and run the tests, or colour what is typed."""
    with Run(config, argv, sections=("Interactive", "System"), description=__doc__, quiet=True) as run:
        if run.settings.INTERACTIVE:
            interactive(run)
            return
        examples()
    raise SystemExit(pytest.main([__file__, "-q"]))


if __name__ == "__main__":
    main()
