"""
Word Counts

This file implements the first half of training, counting distinct pieces in bounded memory, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - BPE runs on a dictionary of
  words with their counts, not on the text

Every thread counts into a hash table of its own, without the interpreter lock; in the end the tables are added up.
A table that grows past its bound forgets its rarest words (lossy counting): memory stays bounded on any input, and on
ordinary text of a gigabyte the bound is never reached, so that the counts are exact.

Each component is explained with paper references for educational purposes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numba import njit

from phase1_foundation.project2_tokenizer.patterns import character_classes
from phase1_foundation.project2_tokenizer.scanner import scan
from phase1_foundation.project2_tokenizer.text_buffer import TextBuffer

CHUNK_CHARACTERS = 4 << 20  # of text handed to a thread at once
MAX_UNIQUE_WORDS = 5_000_000  # over all threads; about 600 bytes each at the peak of training
_HASH, _OFFSET, _LENGTH, _COUNT = range(4)  # columns of a table; offsets in words of eight bytes
_USED, _STORED, _DOCUMENT, _POSITION = range(4)  # a table's fill, its arena's fill, and where counting stopped
_MIX = np.uint64(0x9E3779B97F4A7C15)
_29, _8, _64 = np.uint64(29), np.uint64(8), np.uint64(64)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@njit(inline="always")
def _masked(eight, length):
    """The first `length` of eight bytes (1 to 8, or more for all of them)."""
    return eight if length >= 8 else eight & (_ALL >> (_64 - _8 * np.uint64(length)))


@njit(cache=True, nogil=True)
def _insert(table, arena, fill, hashed, words, start, step, length, count):
    """
    Add `count` to a word whose eight-byte words are `words[start], words[start + step], ...`.

    Returns False, with nothing changed, when the table is half full or the arena has no room for a new word.
    """
    mask = table.shape[0] - 1
    size = (length + 7) >> 3
    at = np.int64(hashed >> np.uint64(1)) & mask
    while table[at, _COUNT] != 0:
        if table[at, _HASH] == hashed and table[at, _LENGTH] == np.uint64(length):
            offset = np.int64(table[at, _OFFSET])
            k = 0
            while k < size and arena[offset + k] == _masked(words[start + k * step], length - 8 * k):
                k += 1
            if k == size:
                table[at, _COUNT] += np.uint64(count)
                return True
        at = (at + 1) & mask
    if 2 * fill[_USED] >= mask or fill[_STORED] + size > arena.size:
        return False
    table[at, _HASH] = hashed
    table[at, _OFFSET] = np.uint64(fill[_STORED])
    table[at, _LENGTH] = np.uint64(length)
    table[at, _COUNT] = np.uint64(count)
    for k in range(size):
        arena[fill[_STORED] + k] = _masked(words[start + k * step], length - 8 * k)
    fill[_USED] += 1
    fill[_STORED] += size
    return True


@njit(cache=True, nogil=True)
def count_pieces(data, eights, starts, lengths, classes, table_of_cuts, table, arena, fill):
    """
    Count the pieces of the documents in a buffer; returns False when the table must grow first, then call it again.

    PAPER: arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: The algorithm is run on the dictionary extracted from a text, each word weighted by its frequency.
    INTUITION: A hundred megabytes of English hold twenty million words, but only half a million different ones.
    IMPLEMENTATION: Open addressing by a 64-bit hash, then the bytes themselves are compared, eight at a time. The
        place to resume from is kept in `fill`, at the beginning of a piece, where the automaton may start again.
    WHY: This is all that ever reads the text; what follows depends on the number of distinct words alone.
    """
    ends = np.empty(4096, dtype=np.int64)
    while fill[_DOCUMENT] < starts.size:
        document = fill[_DOCUMENT]
        end = starts[document] + lengths[document]
        start = starts[document] + fill[_POSITION]
        position = start
        while position < end:
            pieces, position = scan(data, position, end, classes, table_of_cuts, ends)
            for p in range(pieces):
                length = ends[p] - start
                hashed = np.uint64(length)
                for k in range(0, length, 8):
                    hashed = (hashed ^ _masked(eights[start + k], length - k)) * _MIX
                    hashed ^= hashed >> _29
                if not _insert(table, arena, fill, hashed, eights, start, 8, length, 1):
                    fill[_POSITION] = start - starts[document]
                    return False
                start = ends[p]
        fill[_DOCUMENT] += 1
        fill[_POSITION] = 0
    return True


@njit(cache=True, nogil=True)
def _add_table(table, arena, fill, other, other_arena, at_least):
    """Add the words of another table that were counted often enough; there must be room."""
    added = 0
    for at in range(other.shape[0]):
        count = other[at, _COUNT]
        if count >= np.uint64(at_least) and count != 0:
            offset, length = np.int64(other[at, _OFFSET]), np.int64(other[at, _LENGTH])
            _insert(table, arena, fill, other[at, _HASH], other_arena, offset, 1, length, count)
            added += 1
    return added


class WordTable:
    """Distinct words (as bytes) with their counts; at most `max_words` of them."""

    def __init__(self, max_words: int, slots: int = 1 << 16):
        self.max_words = max_words
        self.dropped = 0  # words forgotten to stay within the bound
        self._allocate(slots, slots)

    def _allocate(self, slots: int, arena: int) -> None:
        self.table = np.zeros((slots, 4), dtype=np.uint64)
        self.arena = np.zeros(arena, dtype=np.uint64)
        self.fill = np.zeros(4, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.fill[_USED])

    def _rebuild(self, more_words: int, more_arena: int, at_least: int = 1) -> None:
        """Make room, keeping the words that were counted at least so often."""
        table, arena, resume = self.table, self.arena, self.fill[_DOCUMENT:].copy()
        kept = table[:, _COUNT] >= at_least
        stored = int(((table[kept, _LENGTH] + np.uint64(7)) >> np.uint64(3)).sum())
        words = int(np.count_nonzero(kept)) if at_least > 1 else len(self)
        slots = 1 << (2 * (words + more_words) + 1).bit_length()
        self._allocate(slots, stored + more_arena)
        _add_table(self.table, self.arena, self.fill, table, arena, at_least)
        self.fill[_DOCUMENT:] = resume

    def _grow(self, longest: int) -> None:
        """Twice the room, or, at the bound, at least half of the words forgotten, the rarest first."""
        at_least = 1
        if len(self) >= self.max_words // 2 and 2 * len(self) >= len(self.table) - 1:
            while np.count_nonzero(self.table[:, _COUNT] >= at_least) > self.max_words // 2:
                at_least += 1
        before = len(self)
        self._rebuild(min(len(self), self.max_words // 2) + 1, self.arena.size // 2 + longest, at_least)
        self.dropped += before - len(self)

    def count(self, chunk: TextBuffer) -> int:
        """Count all pieces of a chunk; returns its size in bytes."""
        self.fill[_DOCUMENT:] = 0
        arguments = chunk.data, chunk.eights, chunk.starts, chunk.lengths, character_classes(), chunk.transitions
        while not count_pieces(*arguments, self.table, self.arena, self.fill):
            self._grow(int(chunk.lengths.max(initial=0)) // 8 + 1)
        return len(chunk.data)

    def add(self, other: "WordTable") -> None:
        """Add the counts of another table."""
        self._rebuild(len(other), int(other.fill[_STORED]))
        _add_table(self.table, self.arena, self.fill, other.table, other.arena, 1)
        self.dropped += other.dropped

    def words(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All words: the bytes they lie in, their starts and lengths there, and their counts."""
        used = self.table[self.table[:, _COUNT] > 0].astype(np.int64)
        return self.arena.view(np.uint8), used[:, _OFFSET] * 8, used[:, _LENGTH], used[:, _COUNT]

    def as_dict(self) -> dict[bytes, int]:
        """Word -> count, for the reference and for tests."""
        data, starts, lengths, counts = self.words()
        return {data[s : s + n].tobytes(): int(c) for s, n, c in zip(starts, lengths, counts)}


def chunks(texts: Iterable[str], pattern: str) -> Iterator[TextBuffer]:
    """Texts gathered into buffers of some megabytes."""
    documents, size = [], 0
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"texts holds a {type(text).__name__}: give an iterable of str, one document each")
        documents.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield TextBuffer(documents, pattern)
            documents, size = [], 0
    if documents:
        yield TextBuffer(documents, pattern)


def count_words(
    texts: Iterable[str],
    pattern: str,
    num_threads: int | None = None,
    max_unique_words: int = MAX_UNIQUE_WORDS,
    progress: Callable[[int], None] | None = None,
) -> WordTable:
    """
    Count the distinct pieces of all texts on all processors.

    PAPER: arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: For efficiency, pairs that cross word boundaries are not considered.
    INTUITION: Deal the text out in chunks like cards, let everyone count, add up.
    IMPLEMENTATION: Chunk i goes to table i modulo `num_threads`, so the result does not depend on timing. At most two
        chunks wait for each thread. `progress` is called with the bytes read so far.
    WHY: Reading is bound by the processor, not the disk, and two tables need no lock.
    """
    count = max(1, num_threads or min(os.cpu_count() or 1, 8))
    tables = [WordTable(max(16, max_unique_words // count)) for _ in range(count)]
    pools = [ThreadPoolExecutor(1) for _ in range(count)]
    waiting: list[list[Future]] = [[] for _ in range(count)]
    done = 0
    try:
        for i, chunk in enumerate(chunks(texts, pattern)):
            mine = waiting[i % count]
            mine.append(pools[i % count].submit(tables[i % count].count, chunk))
            if len(mine) > 2:
                done += mine.pop(0).result()
                if progress:
                    progress(done)
        for future in sum(waiting, []):
            done += future.result()
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
    for other in tables[1:]:
        tables[0].add(other)
    return tables[0]
