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

from phase1_foundation.project2_tokenizer.compiled import compiled
from phase1_foundation.project2_tokenizer.scanner import scan
from phase1_foundation.project2_tokenizer.word_keys import KEY_BYTES, hash_key, word_key

MISSING = 0xFFFFFF  # no value: values have 24 bits
MAX_TOKENS, MAX_VALUES = 1 << 20, MISSING  # two token ids fill the 40 bits of a key
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
_1, _24, _32 = np.uint64(1), np.uint64(24), np.uint64(32)
_MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd constant with well mixed bits

MAX_CACHED_IDS = 7
SHORT = 96  # bytes: up to here a search for the best pair beats a heap
MERGES, WHOLE_THEN_MERGES, LONGEST_MATCH = 0, 1, 2


def empty_table(entries: int) -> np.ndarray:
    """An open-addressing table that is at most half full: each word a 40-bit key and a 24-bit value."""
    return np.full(1 << max(4, (2 * entries - 1).bit_length()), _EMPTY)


@njit(inline="always")
def lookup(table, key):
    """The value of a key, or MISSING (which is what the low bits of an empty entry read as)."""
    key = np.uint64(key)
    mask = np.uint64(table.size - 1)  # unsigned indices save the check for negative ones
    at = ((key * _MIX) >> _32) & mask
    entry = table[at]
    while entry != _EMPTY and entry >> _24 != key:
        at = (at + _1) & mask
        entry = table[at]
    return np.int64(entry & np.uint64(MISSING))


@compiled
def store(table, key, value):
    """Add a key to the table; the first value of a key stays."""
    key = np.uint64(key)
    mask = np.uint64(table.size - 1)
    at = ((key * _MIX) >> _32) & mask
    while table[at] != _EMPTY:
        if table[at] >> _24 == key:
            return
        at = (at + _1) & mask
    table[at] = (key << _24) | np.uint64(value)


@compiled
def copy_table(table, smaller):
    """Enter all that is in one table into another."""
    for entry in table:
        if entry != _EMPTY:
            store(smaller, np.int64(entry >> _24), np.int64(entry) & MISSING)


@compiled
def build_merge_table(table, left, right):
    """(left id, right id) -> rank, for all merges in order."""
    for rank in range(left.size):
        store(table, (np.int64(left[rank]) << 20) | np.int64(right[rank]), rank)


@compiled
def build_trie(table, node_token, data, starts, ids):
    """(node, byte) -> child node; `node_token[node]`: id of the token that ends there, or -1. Returns how many."""
    nodes = 1
    for k in range(ids.size):
        node = 0
        for i in range(starts[k], starts[k + 1]):
            key = (node << 8) | np.int64(data[i])
            child = lookup(table, key)
            if child == MISSING:
                child = nodes
                store(table, key, child)
                nodes += 1
            node = child
        node_token[node] = ids[k]
    return nodes


@compiled
def merge_short(table, merged, ids, ranks, n):
    """
    Apply merges to `ids[:n]` in place, lowest rank first and leftmost among equals; returns the new length.

    PAPER: arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: A new word is split into characters, and the learned merges are applied to it in order.
    INTUITION: Replay the training on one word.
    IMPLEMENTATION: `ranks[i]` belongs to the pair (i, i + 1); the smallest wins, `merged[rank]` takes its place, and
        only its two neighbours change. Quadratic in n, but n is a handful.
    WHY: For short words moving a few integers is cheaper than any structure that avoids it.
    """
    for i in range(n - 1):
        ranks[i] = lookup(table, (np.int64(ids[i]) << 20) | np.int64(ids[i + 1]))
    while n > 1:
        at = 0
        best = ranks[0]
        for i in range(1, n - 1):
            rank = ranks[i]
            if rank < best:
                best = rank
                at = i
        if best == MISSING:
            break
        n -= 1
        ids[at] = merged[best]
        for i in range(at + 1, n):
            ids[i] = ids[i + 1]
            ranks[i] = ranks[i + 1]
        if at > 0:
            ranks[at - 1] = lookup(table, (np.int64(ids[at - 1]) << 20) | np.int64(ids[at]))
        if at < n - 1:
            ranks[at] = lookup(table, (np.int64(ids[at]) << 20) | np.int64(ids[at + 1]))
    return n


@compiled
def heap_push(heap, size, item):
    """Add to a binary min-heap; returns the new size."""
    i = size
    while i > 0 and heap[(i - 1) >> 1] > item:
        heap[i] = heap[(i - 1) >> 1]
        i = (i - 1) >> 1
    heap[i] = item
    return size + 1


@compiled
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


@compiled
def merge_long(table, merged, ids, n):
    """
    The same as `merge_short` in O(n log n), for a piece that may be a megabyte of one letter.

    PAPER: arXiv:1508.07909, section 3.2 (the result); the paper says nothing about the time it takes.
    PAPER CONTEXT: Merges are applied in the order in which they were learned.
    INTUITION: A queue of candidate pairs, ordered by (rank, position), instead of a search before every merge.
    IMPLEMENTATION: A linked list of tokens over the positions and a binary heap of `rank << 39 | position`; an entry
        whose pair has changed since it was pushed is stale and skipped.
    WHY: A hostile or broken input must cost time in proportion to its length, not to its square.
    """
    before = np.arange(-1, n - 1).astype(np.int64)
    after = np.arange(1, n + 1).astype(np.int64)  # n: nothing behind
    heap = np.empty(3 * n, dtype=np.int64)
    size = 0
    for i in range(n - 1):
        rank = lookup(table, (np.int64(ids[i]) << 20) | np.int64(ids[i + 1]))
        if rank != MISSING:
            size = heap_push(heap, size, (rank << 39) | i)
    while size:
        top = heap[0]
        size = heap_pop(heap, size)
        i = top & ((1 << 39) - 1)
        j = after[i]
        if ids[i] < 0 or j >= n:
            continue
        rank = lookup(table, (np.int64(ids[i]) << 20) | np.int64(ids[j]))
        if rank == MISSING or rank != top >> 39:
            continue  # stale
        ids[i] = merged[rank]
        ids[j] = -1
        after[i] = after[j]
        if after[i] < n:
            before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            if left >= 0 and right < n:
                rank = lookup(table, (np.int64(ids[left]) << 20) | np.int64(ids[right]))
                if rank != MISSING:
                    size = heap_push(heap, size, (rank << 39) | left)
    kept = 0
    for i in range(n):
        if ids[i] >= 0:
            ids[kept] = ids[i]
            kept += 1
    return kept


@compiled
def longest_match(trie, node_token, data, start, end, ids):
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
        node = 0
        best = -1
        best_end = start + 1
        i = start
        while i < end:
            node = lookup(trie, (node << 8) | np.int64(data[i]))
            if node == MISSING:
                break
            i += 1
            if node_token[node] >= 0:
                best = node_token[node]
                best_end = i
        ids[n] = best
        n += 1
        start = best_end
    return n


@compiled
def whole_token(trie, node_token, data, start, end):
    """The token that is exactly this piece, or -1."""
    node = 0
    for i in range(start, end):
        node = lookup(trie, (node << 8) | np.int64(data[i]))
        if node == MISSING:
            return -1
    return node_token[node]


@compiled
def encode_piece(data, start, end, rule, table, merged, byte_ids, trie, node_token, ranks, out, at):
    """Encode one piece without the cache; the ids go to `out[at:]`; returns how many."""
    n = end - start
    ids = out[at : at + n]
    if rule == LONGEST_MATCH:
        return longest_match(trie, node_token, data, start, end, ids)
    if rule == WHOLE_THEN_MERGES:
        token = whole_token(trie, node_token, data, start, end)
        if token >= 0:
            ids[0] = token
            return 1
    for i in range(n):
        ids[i] = byte_ids[data[start + i]]
    return merge_short(table, merged, ids, ranks, n) if n <= SHORT else merge_long(table, merged, ids, n)


@compiled
def encode_documents(
    data, eights, starts, lengths, classes, transitions, rule, table, merged, byte_ids, trie, node_token,
    keys, entries, masks, out, ends,
):  # fmt: skip
    """
    Encode documents of a buffer one after the other into `out`; `ends[d]` is where the ids of document d end.

    PAPER: "Language Models are Unsupervised Multitask Learners", section 2.2, and arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: Text is cut into pieces; each piece is encoded by itself.
    INTUITION: Because pieces are independent, an answer once found can be reused wherever the piece comes again.
    IMPLEMENTATION: `keys` (slots, 8) uint64 and `entries` (slots, 16) int32 are two views of one cache: words 0-3 the
        key (`word_keys.py`), then the count, then the ids. A piece has one slot; a newcomer evicts who is there.
        `out` has room for one id a byte and two more.
    WHY: A hit costs one comparison of 32 bytes, which is the size of almost every word there is.
    """
    piece_ends = np.empty(4096, dtype=np.int64)
    ranks = np.empty(SHORT, dtype=np.int64)
    slots = np.uint64(keys.shape[0] - 1)
    at = 0
    for document in range(starts.size):
        start = starts[document]
        end = start + lengths[document]
        position = start
        while position < end:
            pieces, position = scan(data, position, end, classes, transitions, piece_ends)
            for p in range(pieces):
                stop = piece_ends[p]
                n = stop - start
                a, b, c, d = word_key(eights, start, n, masks)
                slot = hash_key(a, b, c, d) & slots
                if keys[slot, 0] == a and keys[slot, 1] == b and keys[slot, 2] == c and keys[slot, 3] == d:
                    count = entries[slot, 8]
                    out[at] = entries[slot, 9]
                    out[at + 1] = entries[slot, 10]  # whether it counts or not: cheaper than to ask
                    for i in range(2, count):
                        out[at + i] = entries[slot, 9 + i]
                else:
                    count = encode_piece(
                        data, start, stop, rule, table, merged, byte_ids, trie, node_token, ranks, out, at
                    )
                    if n <= KEY_BYTES and count <= MAX_CACHED_IDS:
                        keys[slot, 0] = a
                        keys[slot, 1] = b
                        keys[slot, 2] = c
                        keys[slot, 3] = d
                        entries[slot, 8] = count
                        for i in range(count):
                            entries[slot, 9 + i] = out[at + i]
                at += count
                start = stop
        ends[document] = at
    return at
