"""
Fast Encoding

This file implements both encoding rules as compiled loops, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - apply the merges in order
- "Greed is All You Need: An Evaluation of Tokenizer Inference Methods" (Uzan et al., 2024) - longest match first

Text repeats itself: nine pieces of ten were seen before. So a piece is first looked up in a cache whose entries fill
exactly one cache line of the processor (64 bytes): the piece itself, up to 31 bytes long, and its token ids, up to 7.
Only what is not found there is encoded; the result replaces an older entry, so the cache never grows.

Each component is explained with paper references for educational purposes.
"""

import numpy as np
from numba import njit

from phase1_foundation.project2_tokenizer.scanner import scan

MISSING = np.uint64(0xFFFFFFFFFFFFFFFF)
_LOW32 = np.uint64(0xFFFFFFFF)
_32, _29, _56 = np.uint64(32), np.uint64(29), np.uint64(56)
_MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd constants with well mixed bits
_MIX_3, _MIX_4 = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)

MAX_CACHED_BYTES, MAX_CACHED_IDS = 31, 7
SHORT = 128  # bytes: up to here scanning for the best pair beats a heap
MERGES, WHOLE_THEN_MERGES, LONGEST_MATCH = 0, 1, 2


def byte_masks() -> np.ndarray:
    """Row n keeps the first n of 32 bytes, as four little-endian 64-bit words."""
    kept = np.arange(32)[None, :] < np.arange(32)[:, None]
    return np.where(kept, np.uint8(0xFF), np.uint8(0)).view("<u8")


@njit(cache=True, nogil=True)
def pair_key(left, right):
    """Two 32-bit numbers as one 64-bit key."""
    return (np.uint64(left) << _32) | np.uint64(right)


@njit(cache=True, nogil=True)
def lookup(table, key):
    """The value of a key in an open-addressing table of (key, value) rows, or MISSING."""
    mask = np.uint64(table.shape[0] - 1)
    at = ((key * _MIX_1) >> _32) & mask
    while table[at, 0] != key:
        if table[at, 0] == MISSING:
            return MISSING
        at = (at + np.uint64(1)) & mask
    return table[at, 1]


@njit(cache=True, nogil=True)
def store(table, key, value):
    """Add a key to a table with room for it; the first value of a key stays."""
    mask = np.uint64(table.shape[0] - 1)
    at = ((key * _MIX_1) >> _32) & mask
    while table[at, 0] != MISSING:
        if table[at, 0] == key:
            return
        at = (at + np.uint64(1)) & mask
    table[at, 0] = key
    table[at, 1] = value


@njit(cache=True, nogil=True)
def build_merge_table(table, left, right, merged):
    """(left id, right id) -> rank in the upper half, id of the merged token in the lower half."""
    for rank in range(left.size):
        store(table, pair_key(left[rank], right[rank]), pair_key(rank, merged[rank]))


@njit(cache=True, nogil=True)
def build_trie(table, data, starts, ids):
    """(node, byte) -> child node in the upper half, 1 + id of the token that ends there (0: none) in the lower."""
    nodes = 1
    for k in range(ids.size):
        node = np.uint64(0)
        for i in range(starts[k], starts[k + 1]):
            key = (node << _32) | np.uint64(data[i])
            value = lookup(table, key)
            if value == MISSING:
                value = np.uint64(nodes) << _32
                store(table, key, value)
                nodes += 1
            if i == starts[k + 1] - 1:
                _set_low(table, key, np.uint64(ids[k] + 1))
            node = value >> _32
    return nodes


@njit(cache=True, nogil=True)
def _set_low(table, key, low):
    mask = np.uint64(table.shape[0] - 1)
    at = ((key * _MIX_1) >> _32) & mask
    while table[at, 0] != key:
        at = (at + np.uint64(1)) & mask
    table[at, 1] |= low


@njit(cache=True, nogil=True)
def merge_short(table, ids, ranked, n):
    """
    Apply merges to `ids[:n]` in place, lowest rank first and leftmost among equals; returns the new length.

    PAPER: arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: A new word is split into characters, and the learned merges are applied to it in order.
    INTUITION: Replay the training on one word.
    IMPLEMENTATION: `ranked[i]` holds rank and result of the pair (i, i + 1); the smallest wins; only its two neighbours
        change. Quadratic in n, but n is a handful.
    WHY: For short words moving a few integers is cheaper than any structure that avoids it.
    """
    for i in range(n - 1):
        ranked[i] = lookup(table, pair_key(ids[i], ids[i + 1]))
    while n > 1:
        at = 0
        best = ranked[0]
        for i in range(1, n - 1):
            if ranked[i] < best:
                best = ranked[i]
                at = i
        if best == MISSING:
            break
        n -= 1
        ids[at] = np.int32(best & _LOW32)
        for i in range(at + 1, n):
            ids[i] = ids[i + 1]
            ranked[i] = ranked[i + 1]
        if at > 0:
            ranked[at - 1] = lookup(table, pair_key(ids[at - 1], ids[at]))
        if at < n - 1:
            ranked[at] = lookup(table, pair_key(ids[at], ids[at + 1]))
    return n


@njit(cache=True, nogil=True)
def heap_push(heap, size, item):
    """Add to a binary min-heap; returns the new size."""
    i = size
    while i > 0 and heap[(i - 1) >> 1] > item:
        heap[i] = heap[(i - 1) >> 1]
        i = (i - 1) >> 1
    heap[i] = item
    return size + 1


@njit(cache=True, nogil=True)
def heap_pop(heap, size):
    """Remove the smallest, which the caller has read at index 0; returns the new size."""
    size -= 1
    item = heap[size]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= item:
            break
        heap[i] = heap[child]
        i = child
    heap[i] = item
    return size


@njit(cache=True, nogil=True)
def merge_long(table, ids, n):
    """
    The same as `merge_short` in O(n log n), for a piece that may be a megabyte of one letter.

    PAPER: arXiv:1508.07909, section 3.2 (the result); the paper says nothing about the time it takes.
    PAPER CONTEXT: Merges are applied in the order in which they were learned.
    INTUITION: A queue of candidate pairs, ordered by (rank, position), instead of a search before every merge.
    IMPLEMENTATION: A linked list of tokens over the positions and a binary heap; an entry whose pair has changed since
        it was pushed is stale and skipped.
    WHY: A hostile or broken input must cost time in proportion to its length, not to its square.
    """
    before = np.arange(-1, n - 1).astype(np.int64)
    after = np.arange(1, n + 1).astype(np.int64)  # n: nothing behind
    heap = np.empty(3 * n, dtype=np.uint64)
    size = 0
    for i in range(n - 1):
        value = lookup(table, pair_key(ids[i], ids[i + 1]))
        if value != MISSING:
            size = heap_push(heap, size, pair_key(value >> _32, i))
    while size:
        top = heap[0]
        size = heap_pop(heap, size)
        i = np.int64(top & _LOW32)
        j = after[i]
        if ids[i] < 0 or j >= n:
            continue
        value = lookup(table, pair_key(ids[i], ids[j]))
        if value == MISSING or (value >> _32) != (top >> _32):
            continue  # stale
        ids[i] = np.int32(value & _LOW32)
        ids[j] = -1
        after[i] = after[j]
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < n:
                before[right] = left
                value = lookup(table, pair_key(ids[left], ids[right]))
                if value != MISSING:
                    size = heap_push(heap, size, pair_key(value >> _32, left))
    kept = 0
    for i in range(n):
        if ids[i] >= 0:
            ids[kept] = ids[i]
            kept += 1
    return kept


@njit(cache=True, nogil=True)
def longest_match(trie, data, start, end, ids):
    """
    Take the longest token that the rest of the piece begins with, again and again; returns how many.

    PAPER: arXiv:2403.01289, section 2 (greedy inference, longest prefix).
    PAPER CONTEXT: How a vocabulary was learned and how text is cut with it are separate choices.
    INTUITION: Read as far as any token reaches, write it down, go on from there.
    IMPLEMENTATION: Walk a trie of all tokens; remember the last node at which a token ended.
    WHY: It needs no merges and no ranks, and every token of the vocabulary can be reached.
    """
    n = 0
    while start < end:
        node = np.uint64(0)
        best = np.int64(0)
        best_end = start
        i = start
        while i < end:
            value = lookup(trie, (node << _32) | np.uint64(data[i]))
            if value == MISSING:
                break
            i += 1
            token = np.int64(value & _LOW32)
            if token:
                best = token
                best_end = i
            node = value >> _32
        ids[n] = np.int32(best - 1)
        n += 1
        start = best_end
    return n


@njit(cache=True, nogil=True)
def encode_piece(data, start, end, table, trie, byte_ids, rule, ranked, ids):
    """Encode one piece without the cache; returns how many ids were written to `ids`."""
    n = end - start
    if rule == LONGEST_MATCH:
        return longest_match(trie, data, start, end, ids)
    if rule == WHOLE_THEN_MERGES:
        node = np.uint64(0)
        value = np.uint64(0)
        for i in range(start, end):
            value = lookup(trie, (node << _32) | np.uint64(data[i]))
            if value == MISSING:
                break
            node = value >> _32
        if value != MISSING and value & _LOW32:
            ids[0] = np.int32((value & _LOW32) - np.uint64(1))
            return 1
    for i in range(n):
        ids[i] = byte_ids[data[start + i]]
    return merge_short(table, ids, ranked, n) if n <= SHORT else merge_long(table, ids, n)


@njit(cache=True, nogil=True)
def encode_documents(
    data, eights, starts, lengths, classes, scanner, table, trie, byte_ids, rule, keys, entries, masks, out, ends
):
    """
    Encode documents of a buffer one after the other into `out`; `ends[d]` is where the ids of document d end.

    PAPER: "Language Models are Unsupervised Multitask Learners", section 2.2, and arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: Text is cut into pieces; each piece is encoded by itself.
    INTUITION: Because pieces are independent, an answer once found can be reused wherever the piece comes again.
    IMPLEMENTATION: `keys` (slots, 8) uint64 and `entries` (slots, 16) int32 are two views of one cache: words 0-3 the
        bytes of the piece with its length on top, then the count, then the ids. Two slots for a piece.
    WHY: A hit costs one comparison of 32 bytes, which is the size of almost every word there is.
    """
    piece_ends = np.empty(4096, dtype=np.int64)
    ranked = np.empty(SHORT, dtype=np.uint64)
    slots = np.uint64(keys.shape[0] - 1)
    at = 0
    for d in range(starts.size):
        start = starts[d]
        end = start + lengths[d]
        position = start
        while position < end:
            pieces, position = scan(data, eights, position, end, classes, scanner, piece_ends)
            for p in range(pieces):
                stop = piece_ends[p]
                n = stop - start
                if n > MAX_CACHED_BYTES:
                    at += encode_piece(data, start, stop, table, trie, byte_ids, rule, ranked, out[at:])
                    start = stop
                    continue
                a = eights[start] & masks[n, 0]
                b = eights[start + 8] & masks[n, 1]
                c = eights[start + 16] & masks[n, 2]
                e = (eights[start + 24] & masks[n, 3]) | (np.uint64(n) << _56)
                h = a * _MIX_1 + b * _MIX_2 + c * _MIX_3 + e * _MIX_4
                h = (h ^ (h >> _29)) * _MIX_2
                slot = (h >> _32) & slots
                if keys[slot, 0] != a or keys[slot, 1] != b or keys[slot, 2] != c or keys[slot, 3] != e:
                    other = slot ^ np.uint64(1)
                    if keys[slot, 3] == 0:
                        fill = True
                    else:
                        slot = other
                        fill = keys[slot, 0] != a or keys[slot, 1] != b or keys[slot, 2] != c or keys[slot, 3] != e
                    if fill:
                        count = encode_piece(data, start, stop, table, trie, byte_ids, rule, ranked, out[at:])
                        if count <= MAX_CACHED_IDS:
                            keys[slot, 0] = a
                            keys[slot, 1] = b
                            keys[slot, 2] = c
                            keys[slot, 3] = e
                            entries[slot, 8] = count
                            for i in range(count):
                                entries[slot, 9 + i] = out[at + i]
                        at += count
                        start = stop
                        continue
                count = entries[slot, 8]
                for i in range(count):
                    out[at + i] = entries[slot, 9 + i]
                at += count
                start = stop
        ends[d] = at
    return at
