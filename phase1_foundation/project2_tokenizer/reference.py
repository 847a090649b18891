"""
Reference BPE

This file implements byte-pair encoding as the papers describe it, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - learning and applying merges
- "Greed is All You Need: An Evaluation of Tokenizer Inference Methods" (Uzan et al., 2024) - longest match first

Slow and short: read this first. `fast_training.py` and `fast_encoding.py` give the same results, which tests prove.

Each component is explained with paper references for educational purposes.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from phase1_foundation.project2_tokenizer.bytes_alphabet import byte_order, encode_utf8
from phase1_foundation.project2_tokenizer.patterns import split


def count_words(texts: Iterable[str], pattern: str) -> dict[bytes, int]:
    """How often each piece occurs; from here on only the distinct ones are looked at."""
    return Counter(encode_utf8(piece) for text in texts for piece in split(text, pattern))


def replace_pair(symbols: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """
    Replace every occurrence of a pair, from left to right.

    >>> replace_pair((1, 1, 1, 2), (1, 1), 9)
    (9, 1, 2)
    """
    out, i = [], 0
    while i < len(symbols):
        if symbols[i : i + 2] == pair:
            out.append(new)
            i += 2
        else:
            out.append(symbols[i])
            i += 1
    return tuple(out)


def learn_merges(word_counts: dict[bytes, int], n_merges: int, min_frequency: int = 1) -> list[tuple[int, int]]:
    """
    Learn merges: find the most frequent pair of neighbours, make it one symbol, repeat.

    PAPER: arXiv:1508.07909, section 3.2, algorithm 1.
    PAPER CONTEXT: Starting from characters, iteratively merge the most frequent pair; frequent words become one symbol.
    INTUITION: Give the sequences that you write most often a name of their own.
    IMPLEMENTATION: Symbols are ids; 0-255 are the bytes in GPT-2's order, merge k makes symbol 256 + k. Among equally
        frequent pairs the smallest pair of ids wins (the paper leaves this open; Hugging Face's trainer does the same).
        Stops early when no pair occurs `min_frequency` times.
    WHY: The vocabulary size is the number of merges plus 256: one dial between characters and words.

    >>> ids = {chr(b): i for i, b in enumerate(byte_order())}
    >>> learn_merges({b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}, 2) == [(ids["e"], ids["s"]), (ids["t"], 256)]
    False
    >>> learn_merges({b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}, 2) == [(ids["e"], ids["s"]), (256, ids["t"])]
    True
    """
    id_of_byte = {byte: i for i, byte in enumerate(byte_order())}
    words = [(tuple(id_of_byte[b] for b in word), count) for word, count in word_counts.items()]
    merges: list[tuple[int, int]] = []
    while len(merges) < n_merges:
        pairs: Counter[tuple[int, int]] = Counter()
        for symbols, count in words:
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # most frequent; ties: smallest ids
        if pairs[best] < min_frequency:
            break
        words = [(replace_pair(symbols, best, 256 + len(merges)), count) for symbols, count in words]
        merges.append(best)
    return merges


def apply_merges(piece: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """
    Encode one piece by the rule `merges`: replay the training.

    PAPER: arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: At test time a word is split into characters and the learned operations are applied to it.
    INTUITION: Of all pairs that may be merged, the one learned first goes first.
    IMPLEMENTATION: `ranks[left, right]` is a merge's position in the list; one merge at a time, the leftmost first.
    WHY: This is what tiktoken and Hugging Face do, so models trained elsewhere see the ids they know.

    >>> apply_merges(b"lowest", {(b"e", b"s"): 0, (b"es", b"t"): 1, (b"l", b"o"): 2, (b"lo", b"w"): 3})
    [b'low', b'est']
    """
    parts = [bytes([b]) for b in piece]
    while len(parts) > 1:
        candidates = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not candidates:
            break
        _, i = min(candidates)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def longest_match(piece: bytes, vocabulary: set[bytes] | dict[bytes, int]) -> list[bytes]:
    """
    Encode one piece by the rule `longest_match`: the longest token that fits, from left to right.

    PAPER: arXiv:2403.01289, section 2 (greedy inference, longest prefix).
    PAPER CONTEXT: The vocabulary of BPE can be used without its merges; greedy cuts follow word structure well.
    INTUITION: Read as far as any token reaches.
    IMPLEMENTATION: Try all ends, the farthest first; single bytes are always tokens, so something fits.
    WHY: It often needs fewer tokens than the merges do, and needs no order of merges at all.

    >>> longest_match(b"lowest", {b"lo", b"low", b"owest", *(bytes([b]) for b in b"lowest")})
    [b'low', b'e', b's', b't']
    """
    longest = max(map(len, vocabulary))
    parts, start = [], 0
    while start < len(piece):
        end = min(len(piece), start + longest)
        while piece[start:end] not in vocabulary:
            end -= 1
        parts.append(piece[start:end])
        start = end
    return parts
