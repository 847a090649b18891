"""
Fast Training

This file implements BPE training by incremental pair counts, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - the algorithm
- "A New Algorithm for Data Compression" (Gage, 1994) - replace the most frequent pair, again and again

All distinct words lie in one array, each frequent pair knows the positions at which it occurs, and a queue knows the
most frequent of them (`pair_index.py`). A merge then costs time in proportion to its own occurrences, and all merges
together little more than the number of bytes in the word list.

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from phase1_foundation.project2_tokenizer import word_counts
from phase1_foundation.project2_tokenizer.bytes_alphabet import byte_order
from phase1_foundation.project2_tokenizer.compiled import compiled
from phase1_foundation.project2_tokenizer.pair_index import (
    COUNT,
    FIRST,
    HEAP,
    KEY,
    MERGES,
    NUMBER,
    PAIRS,
    POSITIONS,
    best_pair,
    build_index,
    grown_pairs,
    pair_key,
    push,
    slot_of,
)

_BOUNDARY, _INSIDE = -1, -2  # symbols: between words; where an earlier token begins no more
_FIRST_FLOOR = 160  # the first floor is the average share of a merge in all bytes, divided by this
_LOWER = 8  # how far the floor falls when it is reached
_MOST_BYTES = 2**31 - 2  # of all words: positions are int32


class State(NamedTuple):
    """Everything training knows; arrays that grow are replaced in a new State."""

    symbols: np.ndarray  # (N,) int32: token id at the position of the token's first byte
    first_of: np.ndarray  # (N,) int32: at a token's last byte, the position of its first
    word_of: np.ndarray  # (N,) int32: which word a position is in
    frequency: np.ndarray  # (words,) int64
    sizes: np.ndarray  # (vocabulary,) int32: bytes in each token
    pairs: np.ndarray  # (slots, 4) int64 hash table: pair, count, first of its positions, number of them
    heap: np.ndarray  # (n, 2) int64: count when pushed, pair; the best at index 0
    positions: np.ndarray  # (n,) int32: positions of pairs, each pair's together and ascending
    merges: np.ndarray  # (vocabulary, 2) int32
    fill: np.ndarray  # (4,) int64: used pairs, heap entries, positions, merges


@compiled
def _lay_out(data, starts, lengths, byte_ids, symbols, first_of, word_of):
    """Write all words into one array, a boundary before and after each; boundaries point at themselves."""
    at = 0
    for word in range(starts.size):
        symbols[at] = _BOUNDARY
        first_of[at] = at
        at += 1
        for i in range(lengths[word]):
            symbols[at] = byte_ids[data[starts[word] + i]]
            first_of[at] = at
            word_of[at] = word
            at += 1
    symbols[at] = _BOUNDARY
    first_of[at] = at


def _fitting(lengths: np.ndarray, counts: np.ndarray, max_bytes: int) -> np.ndarray:
    """Which words to keep: those with a pair, without the rarest (and of equally rare ones the longest) of too many."""
    kept = lengths > 1  # a word of one byte has no pair
    sizes = np.where(kept, lengths + 1, 0)  # with a boundary
    if sizes.sum() > max_bytes:
        order = np.lexsort((lengths, -counts))  # the most frequent first, then the shortest
        kept[order[np.cumsum(sizes[order]) > max_bytes]] = False
    return kept


def lay_out(words: tuple[np.ndarray, ...], byte_ids: np.ndarray, n_merges: int, max_bytes: int = _MOST_BYTES) -> State:
    """The state before the first merge, without an index; `words` as from `WordTable.words`.

    Words of more than `max_bytes` are too many for the memory: the rarest are left out.
    """
    data, starts, lengths, counts = words
    kept = _fitting(lengths, counts, max_bytes)
    starts, lengths = starts[kept], lengths[kept]
    n_merges = min(n_merges, int((lengths - 1).sum()))  # each takes at least one symbol away
    total = int(lengths.sum()) + len(lengths) + 1
    symbols, first_of, word_of = (np.empty(total, dtype=np.int32) for _ in range(3))
    _lay_out(data, starts, lengths, byte_ids, symbols, first_of, word_of)
    sizes, merges = np.ones(256 + n_merges, dtype=np.int32), np.empty((n_merges, 2), dtype=np.int32)
    nothing = np.empty((0, 4), dtype=np.int64), np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.int32)
    return State(symbols, first_of, word_of, counts[kept], sizes, *nothing, merges, np.zeros(4, dtype=np.int64))


@compiled
def _replace(state, key, new, gains, losses, neighbours, places):
    """
    Replace every occurrence of a pair by the token `new`, and note what that does to the pairs around it.

    `gains[0, x]`: new pairs (x, new), `gains[1, y]`: new pairs (new, y); `losses`: the pairs (x, left) and (right, y)
    that are gone. `neighbours[side, k]` and `places[side, k]` list the new pairs one by one; returns how many.
    """
    symbols, first_of, sizes = state.symbols, state.first_of, state.sizes
    left, right = key >> 32, key & 0xFFFFFFFF
    at = slot_of(state.pairs, key)
    n_left = 0
    n_right = 0
    for p in range(state.pairs[at, FIRST], state.pairs[at, FIRST] + state.pairs[at, NUMBER]):
        i = np.int64(state.positions[p])
        j = i + sizes[left]
        if symbols[i] != left or symbols[j] != right:
            continue  # an earlier merge took one of the two
        weight = state.frequency[state.word_of[i]]
        behind = j + sizes[right]
        previous = first_of[i - 1]
        x, y = symbols[previous], symbols[behind]
        if x >= 0:
            gains[0, x] += weight
            if x == new:
                gains[1, left] -= weight  # (new, left), noted one occurrence ago, has become (new, new)
            else:
                losses[0, x] += weight
            neighbours[0, n_left] = x
            places[0, n_left] = previous
            n_left += 1
        if y >= 0:
            gains[1, y] += weight
            losses[1, y] += weight
            neighbours[1, n_right] = y
            places[1, n_right] = i
            n_right += 1
        symbols[i] = new
        symbols[j] = _INSIDE
        first_of[behind - 1] = i
    return n_left, n_right


@compiled
def _enter(state, floor, key, new, side, n, gains, losses, neighbours, places, numbers, next_place):
    """
    Lower the old and enter the new pairs on one side of the merge; all but `state` is for that side alone.

    `numbers` (vocabulary,): how often each neighbour occurs; zeros before and after, as in `gains` and `losses`.
    `next_place` (vocabulary,): where a neighbour's next position goes; -1 for a pair too rare to be followed.
    """
    pairs, heap, positions, fill = state.pairs, state.heap, state.positions, state.fill
    for k in range(n):
        numbers[neighbours[k]] += 1
    for k in range(n):
        z = np.int64(neighbours[k])
        if numbers[z] == 0:
            continue  # each distinct neighbour once
        if losses[z] > 0:
            old = pair_key(z, key >> 32) if side == 0 else pair_key(key & 0xFFFFFFFF, z)
            at = slot_of(pairs, old)
            if old != key and pairs[at, KEY] != -1:
                pairs[at, COUNT] -= losses[z]
        next_place[z] = -1
        if gains[z] >= floor:
            made = pair_key(z, new) if side == 0 else pair_key(new, z)
            at = slot_of(pairs, made)
            pairs[at, KEY], pairs[at, COUNT] = made, gains[z]
            pairs[at, FIRST], pairs[at, NUMBER] = fill[POSITIONS], numbers[z]
            push(heap, fill[HEAP], gains[z], made)
            fill[PAIRS] += 1
            fill[HEAP] += 1
            next_place[z] = fill[POSITIONS]
            fill[POSITIONS] += numbers[z]
        gains[z] = 0
        losses[z] = 0
        numbers[z] = 0
    for k in range(n):  # hand the positions out, in order
        z = neighbours[k]
        if next_place[z] >= 0:
            positions[next_place[z]] = places[k]
            next_place[z] += 1


@compiled
def _with_room(state, pairs_wanted, positions_wanted):
    """A State whose arrays have room for so many more entries."""
    fill = state.fill
    pairs, heap, positions = state.pairs, state.heap, state.positions
    while 2 * (fill[PAIRS] + pairs_wanted) > pairs.shape[0]:
        pairs = grown_pairs(pairs)
    if fill[HEAP] + pairs_wanted > heap.shape[0]:
        longer = np.empty((2 * (fill[HEAP] + pairs_wanted), 2), dtype=np.int64)
        longer[: fill[HEAP]] = heap[: fill[HEAP]]
        heap = longer
    if fill[POSITIONS] + positions_wanted > positions.size:
        more = np.empty((fill[POSITIONS] + positions_wanted) * 3 // 2, dtype=np.int32)
        more[: fill[POSITIONS]] = positions[: fill[POSITIONS]]
        positions = more
    return _with_index(state, pairs, heap, positions)


@compiled
def _with_index(state, pairs, heap, positions):
    """The state with another index."""
    return State(
        state.symbols, state.first_of, state.word_of, state.frequency, state.sizes, pairs, heap, positions,
        state.merges, state.fill,
    )  # fmt: skip


@compiled
def _most_pairs(gains, neighbours, n, floor):
    """An upper bound on the number of pairs that will be entered for one side."""
    count = 0
    for k in range(n):
        count += gains[neighbours[k]] >= floor
    return min(count, gains.size)


@compiled
def train_steps(state, steps, floor):
    """
    Learn up to `steps` more merges of pairs that occur `floor` times; returns the new state and whether there are more.

    PAPER: arXiv:1508.07909, section 3.2, algorithm 1; Gage, 1994.
    PAPER CONTEXT: Count all pairs, merge the most frequent into a new symbol, repeat.
    INTUITION: A merge changes only the pairs that touch it; keep the books instead of counting anew.
    IMPLEMENTATION: `best_pair`, `_replace`, then the pairs on both sides are lowered and entered. A pair comes into
        being in one step only (that of its younger half), so its positions lie together and its count only falls.
    WHY: Thirty-two thousand merges over half a million words take about a second instead of days.
    """
    size = state.sizes.size
    gains, losses = np.zeros((2, size), dtype=np.int64), np.zeros((2, size), dtype=np.int64)
    numbers, next_place = np.zeros(size, dtype=np.int64), np.empty(size, dtype=np.int64)
    fill = state.fill
    for _ in range(steps):
        key = best_pair(state.pairs, state.heap, fill, floor)
        if key < 0:
            return state, False
        left, right = key >> 32, key & 0xFFFFFFFF
        new = 256 + fill[MERGES]
        state.merges[fill[MERGES], 0] = left
        state.merges[fill[MERGES], 1] = right
        state.sizes[new] = state.sizes[left] + state.sizes[right]
        fill[MERGES] += 1
        number = state.pairs[slot_of(state.pairs, key), NUMBER]
        neighbours, places = np.empty((2, number), dtype=np.int32), np.empty((2, number), dtype=np.int32)
        counts = _replace(state, key, new, gains, losses, neighbours, places)
        for side in range(2):
            n, near = counts[side], neighbours[side]
            state = _with_room(state, _most_pairs(gains[side], near, n, floor), n)
            _enter(state, floor, key, new, side, n, gains[side], losses[side], near, places[side], numbers, next_place)
    return state, True


def learn_merges(
    state: State, n_merges: int, min_frequency: int = 1, progress: Callable[[int, int], None] | None = None
) -> list[tuple[int, int]]:
    """
    The first `n_merges` merges of a word list (from `lay_out`), as pairs of ids.

    Fewer where the words are used up: a pair must occur at least `min_frequency` times.
    `progress(done, total)` is called every thousand merges.
    """
    min_frequency, n_merges = max(1, min_frequency), min(n_merges, len(state.merges))
    lengths = np.diff(np.flatnonzero(state.symbols == _BOUNDARY)) - 1
    floor = max(min_frequency, int((state.frequency * lengths).sum()) // max(1, _FIRST_FLOOR * n_merges))
    more = False
    if progress:
        progress(0, n_merges)
    while state.fill[MERGES] < n_merges and (more or floor >= min_frequency):
        if not more:  # at the beginning, and when no pair reaches the floor any more
            index = build_index(state.symbols, state.word_of, state.frequency, state.sizes, floor, state.fill)
            state = _with_index(state, *index)
        state, more = train_steps(state, min(1000, n_merges - int(state.fill[MERGES])), floor)
        if progress:
            progress(int(state.fill[MERGES]), n_merges)
        if not more:
            floor = max(min_frequency, floor // _LOWER) if floor > min_frequency else 0
    return [tuple(pair) for pair in state.merges[: state.fill[MERGES]].tolist()]


def train_merges(
    texts: Iterable[str], pattern: str, n_merges: int, min_frequency: int, num_threads: int | None,
    max_unique_words: int | None, progress: Callable[[str, int, int], None] | None,
) -> list[tuple[int, int]]:  # fmt: skip
    """From texts to merges: count words on all processors, then learn (arguments as in `BPETokenizer.train`)."""
    max_unique_words = max_unique_words or word_counts.MAX_UNIQUE_WORDS
    counting = progress and (lambda done: progress("count", done, 0))
    words = word_counts.count_words(texts, pattern, num_threads, max_unique_words, counting).words()
    byte_ids = np.argsort(np.array(byte_order())).astype(np.int32)
    max_bytes = min(word_counts.BYTES_PER_WORD * max_unique_words, _MOST_BYTES)
    state = lay_out(words, byte_ids, n_merges, max_bytes)
    del words
    merging = progress and (lambda done, total: progress("merge", done, total))
    return learn_merges(state, n_merges, min_frequency, merging)
