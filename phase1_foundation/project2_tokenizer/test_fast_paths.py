"""The fast paths are proven equal: the scanner to `regex`, training to the reference and to `tokenizers`, both rules.

uv run python phase1_foundation/project2_tokenizer/test_fast_paths.py
"""

import functools
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common import DATA, ROOT
from phase1_foundation.project2_tokenizer import fast_training, patterns, reference, word_counts
from phase1_foundation.project2_tokenizer.bytes_alphabet import BYTE_TO_CHAR, byte_order, encode_utf8, from_printable
from phase1_foundation.project2_tokenizer.fast_encoding import SHORT
from phase1_foundation.project2_tokenizer.patterns import PATTERNS, split
from phase1_foundation.project2_tokenizer.scanner import NO_CUTS, scan, transitions
from phase1_foundation.project2_tokenizer.text_buffer import TextBuffer
from phase1_foundation.project2_tokenizer.tokenizer import RULES, BPETokenizer

TRICKY = "aabcdlemrtvsSTLDMRVE''''   \n\n\r\t12٣½!?.é漢ſK\u00a0\u2003\u2028\x85\x1c\0\ud800\U0001f600\u0301"


@functools.cache
def corpus(characters: int = 300_000) -> list[str]:
    from common.download import read_documents

    texts, size = [], 0
    for text in read_documents(DATA / "sample_corpus.jsonl.xz"):
        texts.append(text)
        size += len(text)
        if size > characters:
            break
    return texts


def scanned(text: str, pattern: str) -> list[str]:
    """The pieces of a text by the automaton."""
    buffer = TextBuffer([text], pattern)
    ends, pieces, start, position = np.empty(16, dtype=np.int64), [], 0, 0
    size = int(buffer.lengths[0])
    while position < size:
        count, position = scan(buffer.data, position, size, patterns.character_classes(), buffer.transitions, ends)
        for end in ends[:count]:
            pieces.append(buffer.data[start:end].tobytes().decode("utf-8", "surrogatepass"))
            start = end
    return pieces


# --- pre-tokenisation ---


@pytest.mark.parametrize("name", PATTERNS)
@settings(deadline=None, max_examples=1500)
@given(text=st.text(TRICKY, max_size=40))
@example(text="\n  \n   x \n \t\r\ny  ")
@example(text="'l'll 'lx'L'LL'rE''ve'ſ")
def test_the_scanner_cuts_as_the_expression_does(name, text):
    assert scanned(text, PATTERNS[name]) == split(text, PATTERNS[name])


@pytest.mark.parametrize("name", PATTERNS)
def test_the_scanner_can_stop_and_go_on_anywhere(name):
    for before in range(40):  # `scanned` gives it room for a dozen pieces: every pause falls into the blanks once
        for tail in ("\n \n x", "\n\t\t\n\r x", "  \n  x", "   1", "'ll've"):
            text = "a1" * (before // 2) + "a" * (before % 2) + tail * 3
            assert scanned(text, PATTERNS[name]) == split(text, PATTERNS[name])


@pytest.mark.parametrize("name", PATTERNS)
def test_the_scanner_cuts_prose_as_the_expression_does(name):
    text = "\n\n".join(corpus())
    assert scanned(text, PATTERNS[name]) == split(text, PATTERNS[name])


@pytest.mark.parametrize("name", PATTERNS)
def test_the_scanner_knows_every_class_of_characters(name):
    edges = {c + d for c in np.flatnonzero(np.diff(patterns.character_classes()[:0x110000])) for d in (0, 1)}
    rng = random.Random(0)
    every = sorted(edges | {rng.randrange(0x110000) for _ in range(3000)})
    text = "".join(f" {chr(c)}a{chr(c)}1'{chr(c)}\n" for c in every)
    assert scanned(text, PATTERNS[name]) == split(text, PATTERNS[name])


def test_unicode_is_that_of_the_frozen_table():
    classes = patterns.character_classes()[:0x110000]
    assert int((classes <= patterns.UPPER_E).sum()) == 141_028  # letters of Unicode 16.0
    assert int((classes == patterns.NUMBER).sum()) == 1_911
    assert [int(c) for c in np.flatnonzero(np.isin(classes, patterns.BLANKS))][:6] == [9, 10, 11, 12, 13, 32]


def test_every_byte_sequence_is_scanned_in_bounds():
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 50, 5000):
        data = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        for table in (NO_CUTS, *(transitions(p) for p in PATTERNS.values())):
            buffer, ends = TextBuffer.of_pieces([data]), np.empty(size + 20, dtype=np.int64)
            count, position = scan(buffer.data, 0, size, patterns.character_classes(), table, ends)
            assert ends[count - 1] == size <= position


# --- counting ---


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", r"\w+"])
@pytest.mark.parametrize("threads", [1, 3])
def test_words_are_counted_as_by_the_reference(pattern, threads, monkeypatch):
    rng = random.Random(3)
    texts = ["".join(rng.choices(TRICKY, k=rng.choice([0, 1, 9, 900]))) for _ in range(120)]
    texts += ["x" * 31, "x" * 32, "x" * 33, "y" * 70_001, "\0" * 40, "\0" * 9, *corpus(20_000)]
    monkeypatch.setattr(word_counts, "CHUNK_CHARACTERS", 5000)
    table = word_counts.count_words(texts, patterns.resolve_pattern(pattern), threads)
    assert table.as_dict() == dict(reference.count_words(texts, patterns.resolve_pattern(pattern)))
    assert table.dropped == 0


def test_beyond_the_bound_the_rarest_words_are_forgotten():
    rng = random.Random(0)
    frequent = [f"w{i}" for i in range(100)]
    texts = [" ".join(rng.choice([rng.choice(frequent), f"u{rng.random()}"]) for _ in range(500)) for _ in range(200)]
    table = word_counts.count_words(texts, patterns.GPT2, 2, max_unique_words=4000)
    exact, bounded = reference.count_words(texts, patterns.GPT2), table.as_dict()
    assert len(exact) > 40_000 and len(bounded) <= 4000 and table.dropped > 10_000
    assert table.table.nbytes <= 4 * 40 * 4000
    top = [word for word, count in exact.most_common() if count > 200]
    assert len(top) >= 100 and all(abs(bounded.get(word, 0) - exact[word]) < 0.1 * exact[word] for word in top)


def test_beyond_the_bound_in_bytes_long_words_that_are_rare_are_forgotten():
    rng = random.Random(0)

    def long_word():
        return "".join(rng.choices("abcdefghij", k=1000))

    frequent = [long_word() for _ in range(5)]
    texts = [f"{rng.choice(frequent)} short {long_word()} {long_word()}" for _ in range(600)]  # 1.8 MB
    table = word_counts.count_words(texts, patterns.GPT2, 2, max_unique_words=8000)
    exact, bounded = reference.count_words(texts, patterns.GPT2), table.as_dict()
    assert table.arena.nbytes < 3 * 16 * 8000 and table.dropped > 1000 and len(exact) > 1200  # 16 bytes a word
    assert sum(map(len, bounded)) < 2 * 16 * 8000
    assert bounded[b" short"] == 600  # no short word is forgotten for the sake of a long one
    assert sum(bounded[word.encode()] for word in frequent) == sum(exact[word.encode()] for word in frequent) == 600


def test_words_beyond_the_bound_in_bytes_are_left_out_of_training():
    words = {b"ab" * 20: 9, b"cd" * 400: 3, b"ef" * 20: 1, b"gh" * 400: 1, b"x": 10**6}
    data, lengths = np.frombuffer(b"".join(words), np.uint8), np.array([len(word) for word in words])
    arguments = data, np.cumsum([0, *lengths[:-1]]), lengths, np.array(list(words.values()))
    byte_ids = np.arange(256, dtype=np.int32)
    for max_bytes, kept in ((10**6, [9, 3, 1, 1]), (1000, [9, 3, 1]), (880, [9, 3]), (100, [9]), (10, [])):
        state = fast_training.lay_out(arguments, byte_ids, 50, max_bytes)
        assert state.frequency.tolist() == kept and state.symbols.size <= max_bytes + 1
    assert len(fast_training.lay_out(arguments, byte_ids, 10**9, 100).merges) == 39  # no more merges than symbols
    assert len(fast_training.learn_merges(fast_training.lay_out(arguments, byte_ids, 10**9, 100), 10**9)) == 6


# --- training ---


@settings(deadline=None, max_examples=150)
@given(st.lists(st.text("aab cé\ud800'", max_size=30), max_size=8), st.integers(0, 60), st.integers(1, 3))
def test_training_is_the_reference(texts, merges, min_frequency):
    arguments = {"vocab_size": 256 + merges, "special_tokens": (), "min_frequency": min_frequency}
    fast, slow = (BPETokenizer.train(texts, engine=engine, **arguments) for engine in ("fast", "reference"))
    assert fast.merges == slow.merges and fast == slow


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_on_prose_is_the_reference(pattern):
    fast, slow = (BPETokenizer.train(corpus(40_000), 400, pattern=pattern, engine=e) for e in ("fast", "reference"))
    assert fast == slow and len(fast.merges) == 143


def train_huggingface(texts, vocab_size, pattern=patterns.GPT2, min_frequency=0):
    """Merges of Hugging Face's trainer on the same texts; its ties, too, go to the smallest pair of ids."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    step = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == patterns.GPT2)
    if pattern != patterns.GPT2:
        cut = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        step = tokenizers.pre_tokenizers.Sequence([cut, step])
    tokenizer.pre_tokenizer = step
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    alphabet = [token for token, i in sorted(model["vocab"].items(), key=lambda item: item[1]) if 0 < i <= 256]
    assert alphabet == [
        BYTE_TO_CHAR[b] for b in byte_order()
    ]  # the ids of bytes are ours, shifted by one special token
    return [tuple(merge) for merge in model["merges"]]


@pytest.mark.parametrize(("pattern", "size"), [("gpt2", 8000), ("gpt4", 3000), ("gpt4_digits", 1000)])
def test_merges_are_those_of_huggingface(pattern, size):
    texts = corpus(1_000_000)
    ours = BPETokenizer.train(texts, size, pattern=pattern)
    assert ours.merges == train_huggingface(texts, size, PATTERNS[pattern])


def test_merges_are_those_of_huggingface_to_the_last_pair():
    rng = random.Random(5)  # few letters and long runs: overlapping pairs, and ties everywhere
    for letters in ("a", "ab", "abc"):
        texts = ["".join(rng.choices(letters + " ", [3, *[1] * len(letters)], k=400)) for _ in range(5)]
        for frequency in (0, 2):
            ours = BPETokenizer.train(texts, 5000, min_frequency=max(1, frequency))
            assert ours.merges == train_huggingface(texts, 5000, min_frequency=frequency)


# --- encoding ---


@functools.cache
def trained(rule: str) -> BPETokenizer:
    return BPETokenizer.train(corpus(), 3000, rule=rule)


@pytest.mark.parametrize("rule", RULES)
def test_encoding_prose_is_the_reference(rule):
    text = corpus()[-1][:20_000] + TRICKY
    assert trained(rule).encode(text) == trained(rule).encode(text, engine="reference")


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=200)
@given(text=st.one_of(st.text(TRICKY), st.text("abcdefgh", min_size=20, max_size=200), st.text("aab", max_size=300)))
def test_encoding_is_the_reference(rule, text):
    tokenizer = trained_on_runs(rule)
    assert tokenizer.encode(text) == tokenizer.encode(text, engine="reference")


@functools.cache
def trained_on_runs(rule: str) -> BPETokenizer:
    rng = random.Random(7)
    texts = ["".join(rng.choices("aaabbcdefgh", k=rng.randint(1, 60))) for _ in range(2000)]
    return BPETokenizer.train(texts, 800, rule=rule)


def test_short_and_long_pieces_are_merged_alike():
    tokenizer, rng = trained_on_runs("merges"), random.Random(2)
    for size in (SHORT - 1, SHORT, SHORT + 1, 3 * SHORT):
        for letters in ("a", "ab", "aaab", "abcdefgh"):
            text = "".join(rng.choices(letters, k=size))
            assert tokenizer.encode(text) == tokenizer.encode(text, engine="reference"), text


@pytest.mark.parametrize("rule", RULES)
def test_a_megabyte_of_one_letter_takes_no_quadratic_time(rule):
    tokenizer = trained_on_runs(rule)
    ids = tokenizer.encode("a" * 1_000_000)  # a quadratic algorithm would sit here for hours
    assert tokenizer.decode(ids) == "a" * 1_000_000 and len(ids) < 500_000


def test_pieces_that_are_tokens_need_no_merges_where_a_file_says_so():
    fields = trained("merges").to_dict()
    broken = fields | {"merges": fields["merges"][:100]}  # most tokens cannot be reached by merges any more
    for whole in (0, 1):
        tokenizer = BPETokenizer.from_dict(broken | {"whole_pieces": whole})
        text = corpus()[0][:3000]
        ids = tokenizer.encode(text)
        assert ids == tokenizer.encode(text, engine="reference")
        in_one = [i for piece in split(text, patterns.GPT2) if (i := tokens_of(tokenizer).get(encode_utf8(piece)))]
        assert (len(in_one) > 100) and (set(in_one) <= set(ids)) == bool(whole)


def tokens_of(tokenizer):
    return {data: i for i, data in tokenizer.token_bytes.items()}


def test_a_merge_of_an_untrained_order_is_followed_to_the_letter():
    letters = {BYTE_TO_CHAR[b]: i for i, b in enumerate(byte_order())}
    vocab = letters | {"bc": 256, "ab": 257, "abc": 258, "cd": 259}
    tokenizer = BPETokenizer(vocab, [("b", "c"), ("a", "b"), ("a", "bc"), ("c", "d")], rule="merges")
    for text in ("abc", "abcd", "ab", "abcabcd", "a" + "bc" * 100):
        assert tokenizer.encode(text) == tokenizer.encode(text, engine="reference")
    assert tokenizer.pieces("abcd") == ["abc", "d"] and from_printable("abc") == b"abc"


# --- the cache on disk ---

USE_A_LOOP = """
import numpy as np
from phase1_foundation.project2_tokenizer import pair_index
print(pair_index.empty_pairs(16).shape, sum(pair_index.empty_pairs.stats.cache_misses.values()))
"""


def test_a_damaged_cache_is_compiled_anew(tmp_path):
    def run():
        environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", USE_A_LOOP]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment).stdout

    assert run() == "(16, 4) 1\n"  # compiled
    for pattern, damage in (("*.nbc", lambda data: data[: len(data) // 2]), ("*.nbi", lambda data: data[:-5])):
        for path in tmp_path.rglob(pattern):
            path.write_bytes(damage(path.read_bytes()))
        assert run() == "(16, 4) 1\n"  # compiled again
    assert run() == "(16, 4) 0\n"  # loaded


# --- memory ---

TRAIN_ON_RANDOM_WORDS = """
import random, re
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
BPETokenizer.train(["compile first"], 300)
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
rng = random.Random(0)
def texts():
    for _ in range({documents}):
        yield " ".join("".join(rng.choices("abcdefghij", k={length})) for _ in range(100_000 // {length}))
BPETokenizer.train(texts(), 1000, max_unique_words=200_000, num_threads=2)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("length", [12, 1000])
def test_memory_does_not_grow_with_the_text(length):
    used = []
    for documents in (100, 800):  # 10 and 80 MB, each word new
        code = TRAIN_ON_RANDOM_WORDS.format(documents=documents, length=length)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
        used.append(int(result.stdout) / 1024)
    assert used[1] < used[0] + 40 and used[1] < 400, used  # megabytes


if __name__ == "__main__":
    for pattern_name in PATTERNS:
        print(f"{pattern_name:<12} {scanned(chr(10).join(['I cant', '  2024!!', '', 'ok']), PATTERNS[pattern_name])}")
    raise SystemExit(pytest.main([__file__, "-q"]))
