"""
Pair Index

This file implements the books that training keeps: how often each pair occurs, where, and which is best, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - frequencies of symbol pairs
- "A New Algorithm for Data Compression" (Gage, 1994) - the most frequent pair is replaced

Most pairs are rare and will never be merged. So only pairs that occur at least `floor` times are kept, which is exact
as long as the best pair is that frequent: the count of a pair can only fall. Should the best fall below the floor, the
index is built again with a lower one.

Each component is explained with paper references for educational purposes.
"""

import numpy as np
from numba import njit

from phase1_foundation.project2_tokenizer.compiled import compiled

KEY, COUNT, FIRST, NUMBER = range(4)  # columns of the pair table
PAIRS, HEAP, POSITIONS, MERGES = range(4)  # how far each growing array is filled
_MIX = np.uint64(0x9E3779B97F4A7C15)
_32 = np.uint64(32)
_BUCKETS = 1 << 20  # pairs are first counted by hash: a pair in a rare bucket is rare


@njit(inline="always")
def pair_key(left, right):
    """Two token ids as one number; keys compare as pairs do."""
    return (np.int64(left) << 32) | np.int64(right)


@njit(inline="always")
def slot_of(pairs, key):
    """Where a pair is in the table, or the empty slot (key -1) where it would be."""
    mask = pairs.shape[0] - 1
    at = np.int64((np.uint64(key) * _MIX) >> _32) & mask
    while pairs[at, KEY] != key and pairs[at, KEY] != -1:
        at = (at + 1) & mask
    return at


@compiled
def empty_pairs(slots):
    """A pair table; `slots` is a power of two."""
    pairs = np.empty((slots, 4), dtype=np.int64)
    pairs[:, KEY] = -1
    return pairs


@compiled
def grown_pairs(pairs):
    """The pair table with twice as many slots."""
    bigger = empty_pairs(2 * pairs.shape[0])
    for at in range(pairs.shape[0]):
        if pairs[at, KEY] != -1:
            bigger[slot_of(bigger, pairs[at, KEY])] = pairs[at]
    return bigger


@njit(inline="always")
def _before(a_count, a_key, b_count, b_key):
    """The rule for ties: the higher count first, then the smaller pair of ids (left before right)."""
    return a_count > b_count or (a_count == b_count and a_key < b_key)


@compiled
def push(heap, size, count, key):
    """Add a pair to the queue of `size` entries."""
    i = size
    while i > 0:
        parent = (i - 1) >> 1
        if not _before(count, key, heap[parent, 0], heap[parent, 1]):
            break
        heap[i, 0] = heap[parent, 0]
        heap[i, 1] = heap[parent, 1]
        i = parent
    heap[i, 0] = count
    heap[i, 1] = key


@compiled
def sink(heap, size, count, key):
    """Put a pair in place of the first of `size` entries."""
    i = 0
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and _before(heap[child + 1, 0], heap[child + 1, 1], heap[child, 0], heap[child, 1]):
            child += 1
        if _before(count, key, heap[child, 0], heap[child, 1]):
            break
        heap[i, 0] = heap[child, 0]
        heap[i, 1] = heap[child, 1]
        i = child
    heap[i, 0] = count
    heap[i, 1] = key


@compiled
def best_pair(pairs, heap, fill, floor):
    """
    Take the most frequent pair off the queue; -1 where none occurs `floor` times.

    PAPER: arXiv:1508.07909, section 3.2, algorithm 1 (`best = max(pairs, key=pairs.get)`).
    PAPER CONTEXT: Each step merges the most frequent pair.
    INTUITION: Old prices are only ever too high: the first whose price still holds is the dearest of all.
    IMPLEMENTATION: A binary heap with the counts at the time of pushing. An entry whose count has fallen since goes
        back with its count of today, or is dropped below the floor. Ties: the smallest pair of ids.
    WHY: A merge changes hundreds of counts, and nearly none of them ever comes to the top: they are left alone.
    """
    while fill[HEAP] > 0:
        count, key = heap[0, 0], heap[0, 1]
        today = pairs[slot_of(pairs, key), COUNT]
        if today != count and today >= floor:
            sink(heap, fill[HEAP], today, key)
            continue
        fill[HEAP] -= 1
        sink(heap, fill[HEAP], heap[fill[HEAP], 0], heap[fill[HEAP], 1])
        if today == count:
            return key
    return np.int64(-1)


@compiled
def _count_frequent(symbols, word_of, frequency, sizes, floor):
    """A table of the pairs that may occur `floor` times (and of some that do not), with their counts and numbers."""
    buckets = np.zeros(_BUCKETS, dtype=np.int64)
    pairs = empty_pairs(1 << 16)
    used = 0
    for counting_buckets in (True, False):
        for i in range(1, symbols.size - 1):
            if symbols[i] < 0:
                continue
            right = symbols[i + sizes[symbols[i]]]
            if right < 0:
                continue
            key = pair_key(symbols[i], right)
            bucket = np.int64((np.uint64(key) * _MIX) >> _32) & (_BUCKETS - 1)
            if counting_buckets:
                buckets[bucket] += frequency[word_of[i]]
            elif buckets[bucket] >= floor:
                at = slot_of(pairs, key)
                if pairs[at, KEY] == -1:
                    pairs[at, KEY] = key
                    pairs[at, COUNT] = pairs[at, NUMBER] = 0
                    used += 1
                pairs[at, COUNT] += frequency[word_of[i]]
                pairs[at, NUMBER] += 1
                if 2 * used > pairs.shape[0]:
                    pairs = grown_pairs(pairs)
    return pairs


@compiled
def build_index(symbols, word_of, frequency, sizes, floor, fill):
    """
    Index all pairs that occur at least `floor` times: returns pair table, queue and positions.

    PAPER: arXiv:1508.07909, section 3.2 (an index of symbol pairs makes the algorithm efficient).
    PAPER CONTEXT: The authors keep data structures that are updated instead of recounting all pairs.
    INTUITION: To change a word wherever it occurs, look it up in the index instead of reading the book.
    IMPLEMENTATION: `symbols[i]` is a token id at a token's first byte, negative elsewhere; `sizes` the bytes of tokens.
        Each pair's positions lie together in `positions`, ascending.
    WHY: At the floors that occur in practice this is a twentieth of all pairs, in memory and in time.
    """
    candidates = _count_frequent(symbols, word_of, frequency, sizes, floor)
    kept, total = 0, 0
    for at in range(candidates.shape[0]):
        if candidates[at, KEY] != -1 and candidates[at, COUNT] >= floor:
            kept += 1
            total += candidates[at, NUMBER]
    slots = 1 << 16
    while slots < 4 * kept:
        slots *= 2
    pairs, heap = empty_pairs(slots), np.empty((2 * kept + 16, 2), dtype=np.int64)
    fill[PAIRS], fill[HEAP], fill[POSITIONS] = kept, 0, 0
    for at in range(candidates.shape[0]):
        key, count = candidates[at, KEY], candidates[at, COUNT]
        if key != -1 and count >= floor:
            new = slot_of(pairs, key)
            pairs[new, KEY], pairs[new, COUNT] = key, count
            pairs[new, FIRST], pairs[new, NUMBER] = fill[POSITIONS], 0
            fill[POSITIONS] += candidates[at, NUMBER]
            push(heap, fill[HEAP], count, key)
            fill[HEAP] += 1
    positions = np.empty(total + total // 2 + 16, dtype=np.int32)
    for i in range(1, symbols.size - 1):
        if symbols[i] >= 0 and symbols[i + sizes[symbols[i]]] >= 0:
            at = slot_of(pairs, pair_key(symbols[i], symbols[i + sizes[symbols[i]]]))
            if pairs[at, KEY] != -1:
                positions[pairs[at, FIRST] + pairs[at, NUMBER]] = i
                pairs[at, NUMBER] += 1
    return pairs, heap, positions
