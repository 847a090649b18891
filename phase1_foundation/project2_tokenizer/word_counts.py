"""
Word Counts

This file implements the first half of training, counting distinct pieces in bounded memory, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - BPE runs on a dictionary of
  words with their counts, not on the text

Every thread counts into a hash table of its own, without the interpreter lock; in the end the tables are added up.
A table that grows past its bounds, in words or in bytes of long words, forgets the rarest (lossy counting): memory is
bounded on any input, and on ordinary English of a gigabyte the bounds are never reached, so that the counts are exact.

Each component is explained with paper references for educational purposes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain

import numpy as np
from numba import njit

from phase1_foundation.project2_tokenizer.compiled import compiled
from phase1_foundation.project2_tokenizer.patterns import character_classes
from phase1_foundation.project2_tokenizer.scanner import scan
from phase1_foundation.project2_tokenizer.text_buffer import TextBuffer
from phase1_foundation.project2_tokenizer.word_keys import KEY_BYTES, byte_masks, hash_key, word_key

CHUNK_CHARACTERS = 4 << 20  # of text handed to a thread at once
_MASKS = byte_masks()
MAX_UNIQUE_WORDS = 5_000_000  # over all threads; about 400 bytes each at the peak of training
BYTES_PER_WORD = 16  # bytes of words kept for each of MAX_UNIQUE_WORDS: the bound where words are long
_KEY, _COUNT, _COLUMNS = 0, 4, 5  # a row of a table: four words of key, then the count (0: empty)
_USED, _STORED, _DOCUMENT, _POSITION = range(4)  # fill of table and arena, and where counting stopped
_LONG = 0xFF << 56  # marks the key of a long word: offset in the arena, hash, 0, length
_HASH, _LENGTH = 1, 3
_8, _29, _64 = np.uint64(8), np.uint64(29), np.uint64(64)
_MIX, _ALL, _LOW56 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64((1 << 56) - 1)
_LONG_MARK, _TOP = np.uint64(_LONG), np.uint64(56)


@compiled
def _find_short(table, a, b, c, d):
    """The row of a short word, or the empty row where it belongs."""
    mask = np.uint64(table.shape[0] - 1)
    at = hash_key(a, b, c, d) & mask
    while table[at, _COUNT] != 0 and not (
        table[at, 0] == a and table[at, 1] == b and table[at, 2] == c and table[at, 3] == d
    ):
        at = (at + np.uint64(1)) & mask
    return at


@njit(inline="always")
def _last_masked(eight, length):
    """The first `length` of eight bytes (1 to 8, or more for all of them)."""
    return eight if length >= 8 else eight & (_ALL >> (_64 - _8 * np.uint64(length)))


@compiled
def _find_long(table, arena, words, start, step, length):
    """The same for a word of any length, whose bytes lie in `words[start], words[start + step], ...`; and its hash."""
    hashed = _MIX
    for k in range((length + 7) >> 3):
        hashed = (hashed ^ _last_masked(words[start + k * step], length - 8 * k)) * _MIX
        hashed ^= hashed >> _29
    d = _LONG_MARK | np.uint64(length)
    mask = np.uint64(table.shape[0] - 1)
    at = hash_key(np.uint64(0), hashed, np.uint64(0), d) & mask
    while table[at, _COUNT] != 0:
        if table[at, _HASH] == hashed and table[at, _LENGTH] == d:
            offset, k = np.int64(table[at, _KEY]), 0
            while 8 * k < length and arena[offset + k] == _last_masked(words[start + k * step], length - 8 * k):
                k += 1
            if 8 * k >= length:
                break
        at = (at + np.uint64(1)) & mask
    return at, hashed


@compiled
def _enter_short(table, fill, at, a, b, c, d, count):
    """Make an empty row a short word's; False where the table is half full."""
    if 2 * fill[_USED] >= table.shape[0] - 1:
        return False
    table[at, 0], table[at, 1], table[at, 2], table[at, 3] = a, b, c, d
    table[at, _COUNT] = np.uint64(count)
    fill[_USED] += 1
    return True


@compiled
def _enter_long(table, arena, fill, at, hashed, words, start, step, length, count):
    """Make an empty row a long word's; False where table or arena has no room."""
    size = (length + 7) >> 3
    offset = fill[_STORED]
    if offset + size > arena.size or not _enter_short(
        table, fill, at, np.uint64(offset), hashed, np.uint64(0), _LONG_MARK | np.uint64(length), count
    ):
        return False
    for k in range(size):
        arena[offset + k] = _last_masked(words[start + k * step], length - 8 * k)
    fill[_STORED] += size
    return True


@compiled
def count_pieces(data, eights, starts, lengths, classes, transitions, masks, table, arena, fill):
    """
    Count the pieces of the documents in a buffer; returns False when the table must grow first, then call it again.

    PAPER: arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: The algorithm is run on the dictionary extracted from a text, each word weighted by its frequency.
    INTUITION: A hundred megabytes of English hold twenty million words, but only some hundred thousand different ones.
    IMPLEMENTATION: Open addressing; short words are their own keys, long ones lie in an arena and are compared there.
        The place to resume from is kept in `fill`, at the beginning of a piece, where the automaton may start again.
    WHY: This is all that ever reads the text; what follows depends on the number of distinct words alone.
    """
    ends = np.empty(4096, dtype=np.int64)
    while fill[_DOCUMENT] < starts.size:
        document = fill[_DOCUMENT]
        end = starts[document] + lengths[document]
        start = starts[document] + fill[_POSITION]
        position = start
        while position < end:
            pieces, position = scan(data, position, end, classes, transitions, ends)
            for p in range(pieces):
                length = ends[p] - start
                if length <= KEY_BYTES:
                    a, b, c, d = word_key(eights, start, length, masks)
                    at = _find_short(table, a, b, c, d)
                    known = table[at, _COUNT] != 0 or _enter_short(table, fill, at, a, b, c, d, 0)
                else:
                    at, hashed = _find_long(table, arena, eights, start, 8, length)
                    known = table[at, _COUNT] != 0 or _enter_long(
                        table, arena, fill, at, hashed, eights, start, 8, length, 0
                    )
                if not known:
                    fill[_POSITION] = start - starts[document]
                    return False
                table[at, _COUNT] += np.uint64(1)
                start = ends[p]
        fill[_DOCUMENT] += 1
        fill[_POSITION] = 0
    return True


@compiled
def _add_table(table, arena, fill, other, other_arena, at_least, at_least_long):
    """Add the words of another table that were counted often enough; there must be room."""
    for row in range(other.shape[0]):
        count = other[row, _COUNT]
        a, b, c, d = other[row, 0], other[row, 1], other[row, 2], other[row, 3]
        if count == 0 or count < np.uint64(at_least_long if d >= _LONG_MARK else at_least):
            continue
        if d >= _LONG_MARK:
            offset, length = np.int64(a), np.int64(d & _LOW56)
            at, hashed = _find_long(table, arena, other_arena, offset, 1, length)
            if table[at, _COUNT] == 0:
                _enter_long(table, arena, fill, at, hashed, other_arena, offset, 1, length, 0)
        else:
            at = _find_short(table, a, b, c, d)
            if table[at, _COUNT] == 0:
                _enter_short(table, fill, at, a, b, c, d, 0)
        table[at, _COUNT] += count


@compiled
def _write_words(table, arena, data, starts, lengths, counts):
    """Write the bytes of all words one after the other; without `data` only their lengths and counts."""
    n = 0
    at = 0
    for row in range(table.shape[0]):
        if table[row, _COUNT] != 0:
            d = table[row, 3]
            long = d >= _LONG_MARK
            length = np.int64(d & _LOW56) if long else np.int64(d >> _TOP)
            offset = np.int64(table[row, _KEY]) if long else 0
            if data.size:
                for i in range(length):
                    eight = arena[offset + (i >> 3)] if long else table[row, i >> 3]
                    data[at + i] = (eight >> (_8 * np.uint64(i & 7))) & np.uint64(0xFF)
            starts[n], lengths[n], counts[n] = at, length, np.int64(table[row, _COUNT])
            at += length
            n += 1


class WordTable:
    """
    Distinct words (as bytes) with their counts; at most about `max_words` of them, long ones of 16 bytes each in all.

    PAPER: arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: The dictionary of a corpus is all that BPE needs of it.
    INTUITION: A full page is copied to a larger one; when there is no larger one, the rarest words are crossed out.
    IMPLEMENTATION: Arrays that double; at `max_words` the rarer half is dropped, at a full arena the rarer half of the
        long words (`dropped` says how many in all). A word's count is then too low by what it had when dropped.
    WHY: Names, numbers and typing errors grow with the text without end; the words that merges come from do not.
    """

    def __init__(self, max_words: int, slots: int = 1 << 16):
        self.max_words = max_words
        self.max_stored = BYTES_PER_WORD * max_words // 8  # entries of the arena
        self.dropped = 0  # words forgotten to stay within the bound
        self._allocate(slots, slots)

    def _allocate(self, slots: int, arena: int) -> None:
        self.table = np.zeros((slots, _COLUMNS), dtype=np.uint64)
        self.arena = np.zeros(arena, dtype=np.uint64)
        self.fill = np.zeros(4, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.fill[_USED])

    def _rebuild(self, room_words: int, room_arena: int, at_least: int = 1, at_least_long: int = 1) -> None:
        """New arrays with at least so much room in all, keeping the words that were counted at least so often."""
        table, arena, resume = self.table, self.arena, self.fill[_DOCUMENT:].copy()
        self._allocate(1 << (2 * room_words + 1).bit_length(), room_arena)
        _add_table(self.table, self.arena, self.fill, table, arena, at_least, at_least_long)
        self.fill[_DOCUMENT:] = resume

    def _grow(self, longest: int) -> None:
        """Make room; where a bound is reached, forget the rarest words (of all, or of the long ones), at least half."""
        words, stored, at_least, at_least_long = len(self), int(self.fill[_STORED]), 1, 1
        if words >= self.max_words:
            at_least = int(np.partition(self.table[:, _COUNT], -(self.max_words // 2))[-(self.max_words // 2)]) + 1
        if stored + longest > self.max_stored:
            at_least_long = self._often_enough(self.max_stored // 2)
        room_arena = min(2 * stored, self.max_stored) + longest
        self._rebuild(min(2 * words + 16, self.max_words), room_arena, at_least, max(at_least, at_least_long))
        self.dropped += words - len(self)

    def _often_enough(self, room: int) -> int:
        """The least count at which all long words that occur as often or oftener fit into `room` entries."""
        long = self.table[(self.table[:, _COUNT] != 0) & (self.table[:, _LENGTH] >= _LONG_MARK)]
        order = np.argsort(long[:, _COUNT])[::-1]  # the most frequent first
        counts, sizes = long[order, _COUNT], ((long[order, _LENGTH] & _LOW56).astype(np.int64) + 7) >> 3
        first_out = int(np.searchsorted(np.cumsum(sizes), room, side="right"))
        return int(counts[first_out]) + 1 if first_out < len(counts) else 1

    def count(self, chunk: TextBuffer) -> int:
        """Count all pieces of a chunk; returns its size in bytes."""
        self.fill[_DOCUMENT:] = 0
        text = chunk.data, chunk.eights, chunk.starts, chunk.lengths, character_classes(), chunk.transitions, _MASKS
        while not count_pieces(*text, self.table, self.arena, self.fill):
            self._grow(int(chunk.lengths.max(initial=0)) // 8 + 16)
        return len(chunk.data)

    def add(self, other: "WordTable") -> None:
        """Add the counts of another table."""
        self._rebuild(len(self) + len(other), int(self.fill[_STORED] + other.fill[_STORED]))
        _add_table(self.table, self.arena, self.fill, other.table, other.arena, 1, 1)
        self.dropped += other.dropped

    def words(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """All words: the bytes they lie in, their starts and lengths there, and their counts."""
        starts, lengths, counts = (np.empty(len(self), dtype=np.int64) for _ in range(3))
        _write_words(self.table, self.arena, np.empty(0, dtype=np.uint8), starts, lengths, counts)
        data = np.empty(int(lengths.sum()), dtype=np.uint8)
        _write_words(self.table, self.arena, data, starts, lengths, counts)
        return data, starts, lengths, counts

    def as_dict(self) -> dict[bytes, int]:
        """Word -> count, for tests."""
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
    if progress:
        progress(0)
    try:
        for i, chunk in enumerate(chunks(texts, pattern)):
            mine = waiting[i % count]
            mine.append(pools[i % count].submit(tables[i % count].count, chunk))
            if len(mine) > 2:
                done += mine.pop(0).result()
                if progress:
                    progress(done)
        for future in chain.from_iterable(waiting):
            done += future.result()
            if progress:
                progress(done)
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
    total = tables.pop(0)
    while tables:
        total.add(tables.pop(0))  # and let go of it
    return total
