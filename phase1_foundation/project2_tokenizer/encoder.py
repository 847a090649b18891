"""
Encoder

This file implements the engine behind `BPETokenizer.encode`, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - the rule `merges`
- "Greed is All You Need: An Evaluation of Tokenizer Inference Methods" (Uzan et al., 2024) - the rule `longest_match`

It turns a vocabulary into the flat arrays that `fast_encoding.py` reads, and hands each call a cache of its own, so
that any number of threads can encode at the same time.

Each component is explained with paper references for educational purposes.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from phase1_foundation.project2_tokenizer import fast_encoding
from phase1_foundation.project2_tokenizer.patterns import character_classes
from phase1_foundation.project2_tokenizer.text_buffer import TextBuffer
from phase1_foundation.project2_tokenizer.word_keys import byte_masks

CACHE_SLOTS = 1 << 18  # of 64 bytes: 16 MiB for each thread that encodes
BATCH_CHARACTERS = 1 << 20  # of text encoded by one call of the compiled loop
_MASKS = byte_masks()


def _empty_cache() -> np.ndarray:
    """A cache that knows nothing; its pages take no memory until they are written."""
    return np.zeros((CACHE_SLOTS, 8), dtype=np.uint64)


class Encoder:
    """
    A vocabulary compiled for encoding.

    PAPER: arXiv:1508.07909, section 3.2; arXiv:2403.01289, section 2.
    PAPER CONTEXT: The same vocabulary serves both inference methods.
    INTUITION: Look words up instead of working them out again.
    IMPLEMENTATION: `tokens` are (bytes, id), `merges` are (left id, right id, merged id) in order, ids below 2**20. The
        cache begins with the encodings of all tokens, which are the most frequent words there are.
    WHY: Caches are lent to a call and given back, so no lock is held while text is encoded.
    """

    def __init__(self, tokens: list[tuple[bytes, int]], merges: list[tuple[int, int, int]], pattern: str, rule: int):
        if len(tokens) > fast_encoding.MAX_TOKENS or max(i for _, i in tokens) >= fast_encoding.MAX_TOKENS:
            raise ValueError(
                f"the vocabulary has ids up to {max(i for _, i in tokens):,}: the fast engine stops at "
                f'{fast_encoding.MAX_TOKENS:,}, use engine="reference"'
            )
        self.pattern, self.rule = pattern, rule
        self.byte_ids = np.zeros(256, dtype=np.int32)
        for token, i in tokens:
            if len(token) == 1:
                self.byte_ids[token[0]] = i
        columns = np.array(merges if rule != fast_encoding.LONGEST_MATCH else [], dtype=np.int32).reshape(-1, 3)
        self.merged = np.ascontiguousarray(columns[:, 2])
        self.table = fast_encoding.empty_table(len(columns))
        fast_encoding.build_merge_table(
            self.table, np.ascontiguousarray(columns[:, 0]), np.ascontiguousarray(columns[:, 1])
        )
        self._build_trie(tokens if rule != fast_encoding.MERGES else [])
        self._integers = np.arange(max(i for _, i in tokens) + 1).astype(object)
        self._classes = character_classes()
        self._words = TextBuffer.of_pieces([token for token, _ in sorted(tokens, key=lambda item: -item[1])])
        self._idle: list[np.ndarray] = []
        self.forget()

    def _build_trie(self, tokens: list[tuple[bytes, int]]) -> None:
        """The trie of all tokens, where the rule looks whole tokens up."""
        starts = np.cumsum([0, *(len(token) for token, _ in tokens)], dtype=np.int64)
        data = np.frombuffer(b"".join(token for token, _ in tokens) + b"\0", dtype=np.uint8)
        ids = np.array([i for _, i in tokens], dtype=np.int32)
        if starts[-1] >= fast_encoding.MAX_VALUES:
            raise ValueError(f"the tokens hold {starts[-1]:,} bytes: the limit is {fast_encoding.MAX_VALUES:,}")
        self.node_token = np.full(int(starts[-1]) + 1, -1, dtype=np.int32)
        roomy = fast_encoding.empty_table(int(starts[-1]))
        nodes = fast_encoding.build_trie(roomy, self.node_token, data, starts, ids)
        self.node_token = self.node_token[:nodes].copy()
        self.trie = fast_encoding.empty_table(nodes)  # tokens share their beginnings: a third of the room is enough
        fast_encoding.copy_table(roomy, self.trie)

    def _encode(self, buffer: TextBuffer, cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All ids of a buffer, and where each of its documents ends among them."""
        out = np.empty(len(buffer.data), dtype=np.int32)  # one id a byte at most; pages never written cost nothing
        ends = np.empty(len(buffer.starts), dtype=np.int64)
        count = fast_encoding.encode_documents(
            buffer.data, buffer.eights, buffer.starts, buffer.lengths, self._classes, buffer.transitions,
            self.rule, self.table, self.merged, self.byte_ids, self.trie, self.node_token,
            cache, cache.view(np.int32), _MASKS, out, ends,
        )  # fmt: skip
        return out[:count], buffer.document_ends(ends)

    def forget(self, also_vocabulary: bool = False) -> None:
        """
        Forget all text that was encoded, as if just loaded: one cache is left, which knows the vocabulary's own tokens.

        With `also_vocabulary` not even these, so that every word there is has to be worked out once.
        """
        self._idle = [_empty_cache()]
        if not also_vocabulary:
            self._encode(self._words, self._idle[0])

    def encode_texts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """
        The ids of texts one after the other (int32), and where each text's ids end (int64).

        Safe to call from several threads at once: the compiled loop does not hold the interpreter lock.
        """
        try:
            cache = self._idle.pop()
        except IndexError:
            cache = _empty_cache()  # as many as there are calls at the same time
        try:
            return self._encode(TextBuffer(texts, self.pattern), cache)
        finally:
            self._idle.append(cache)

    def as_list(self, ids: np.ndarray) -> list[int]:
        """`ids.tolist()`, but all equal ids share one int object, which is faster and takes a fifth of the memory."""
        return self._integers.take(ids, mode="clip").tolist()  # clip: all are within, so nothing needs checking

    def encode_batch(self, texts: list[str], num_threads: int | None = None) -> list[np.ndarray]:
        """One array of ids per text, on `num_threads` threads (default: all processors)."""
        batches, size = [[]], 0
        for text in texts:
            if size >= BATCH_CHARACTERS:
                batches.append([])
                size = 0
            batches[-1].append(text)
            size += len(text)
        threads = min(num_threads or os.cpu_count() or 1, len(batches))
        if threads == 1:
            results = map(self._encode_list, batches)
            return [ids for batch in results for ids in batch]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for batch in pool.map(self._encode_list, batches) for ids in batch]

    def _encode_list(self, texts: list[str]) -> list[np.ndarray]:
        """One array per text; all are views of one array."""
        ids, ends = self.encode_texts(texts)
        ids = ids.copy()  # let go of the room for one id a byte
        return [ids[start:end] for start, end in zip([0, *ends[:-1].tolist()], ends.tolist())]
