"""
Fast Training

This file implements BPE training by incremental pair counts, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - the algorithm
- "A New Algorithm for Data Compression" (Gage, 1994) - replace the most frequent pair, again and again

The paper's code recounts after every merge what the merge has changed. Here all distinct words lie in one array, each
pair knows the positions at which it occurs, and a queue knows the most frequent pair. A merge then costs time in
proportion to its own occurrences, and all merges together little more than the number of bytes in the word list.

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

from phase1_foundation.project2_tokenizer.compiled import compiled

_KEY, _COUNT, _FIRST, _NUMBER = range(4)  # columns of the pair table
_PAIRS, _HEAP, _POSITIONS, _MERGES = range(4)  # how far each growing array is filled
_BOUNDARY, _INSIDE = -1, -2  # symbols: between words; second half of a token, no symbol of its own
_MIX = np.uint64(0x9E3779B97F4A7C15)
_32 = np.uint64(32)


class State(NamedTuple):
    """Everything training knows; arrays that grow are replaced in a new State."""

    symbols: np.ndarray  # (N,) int32: token id at the position of the token's first byte
    first_of: np.ndarray  # (N,) int32: at a token's last byte, the position of its first
    word_of: np.ndarray  # (N,) int32: which word a position is in
    frequency: np.ndarray  # (words,) int64
    sizes: np.ndarray  # (vocabulary,) int32: bytes in each token
    pairs: np.ndarray  # (slots, 4) int64 hash table: left << 32 | right, count, first of its positions, number of them
    heap: np.ndarray  # (n, 2) int64: count when pushed, pair; the best at index 0
    positions: np.ndarray  # (n,) int32: positions of pairs, each pair's together and ascending
    merges: np.ndarray  # (vocabulary, 2) int32
    fill: np.ndarray  # (4,) int64


@njit(inline="always")
def _slot(pairs, key):
    """Where a pair is in the table, or would be."""
    mask = pairs.shape[0] - 1
    at = np.int64((np.uint64(key) * _MIX) >> _32) & mask
    while pairs[at, _KEY] != key and pairs[at, _KEY] != -1:
        at = (at + 1) & mask
    return at


@compiled
def _grown_pairs(pairs):
    """The pair table with twice as many slots."""
    bigger = np.empty((2 * pairs.shape[0], 4), dtype=np.int64)
    bigger[:, _KEY] = -1
    for at in range(pairs.shape[0]):
        if pairs[at, _KEY] != -1:
            bigger[_slot(bigger, pairs[at, _KEY])] = pairs[at]
    return bigger


@njit(inline="always")
def _before(a_count, a_key, b_count, b_key):
    """The rule for ties: the higher count first, then the smaller pair of ids (left before right)."""
    return a_count > b_count or (a_count == b_count and a_key < b_key)


@compiled
def _push(heap, size, count, key):
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
def _sink(heap, size, count, key):
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


@compiled
def _count_pairs(symbols, word_of, frequency, counts, numbers):
    """How often each pair of bytes occurs in the text (`counts`) and in the word list (`numbers`)."""
    for i in range(1, symbols.size - 1):
        if symbols[i] >= 0 and symbols[i + 1] >= 0:
            counts[symbols[i], symbols[i + 1]] += frequency[word_of[i]]
            numbers[symbols[i], symbols[i + 1]] += 1


@compiled
def _index_pairs(symbols, counts, numbers, min_frequency, pairs, heap, positions, fill):
    """Enter the pairs of bytes into table and queue, and write down where each of them occurs."""
    next_position = np.zeros((256, 256), dtype=np.int64)
    total = 0
    for a in range(256):
        for b in range(256):
            if counts[a, b] > 0:
                key = (np.int64(a) << 32) | b
                at = _slot(pairs, key)
                pairs[at, _KEY] = key
                pairs[at, _COUNT] = counts[a, b]
                pairs[at, _FIRST] = total
                pairs[at, _NUMBER] = numbers[a, b]
                next_position[a, b] = total
                total += numbers[a, b]
                fill[_PAIRS] += 1
                if counts[a, b] >= min_frequency:
                    _push(heap, fill[_HEAP], counts[a, b], key)
                    fill[_HEAP] += 1
    for i in range(1, symbols.size - 1):
        if symbols[i] >= 0 and symbols[i + 1] >= 0:
            positions[next_position[symbols[i], symbols[i + 1]]] = i
            next_position[symbols[i], symbols[i + 1]] += 1
    fill[_POSITIONS] = total


def start(data, starts, lengths, counts, byte_ids, n_merges: int, min_frequency: int) -> State:
    """Lay out the words and index their pairs of bytes."""
    total = int(lengths.sum()) + len(lengths) + 1
    if total >= 2**31:
        raise ValueError(f"the distinct words hold {total:,} bytes, and 2,147,483,648 is the limit: train on less text")
    symbols, first_of, word_of = (np.empty(total, dtype=np.int32) for _ in range(3))
    _lay_out(data, starts, lengths, byte_ids, symbols, first_of, word_of)
    pair_counts, numbers = np.zeros((256, 256), dtype=np.int64), np.zeros((256, 256), dtype=np.int64)
    _count_pairs(symbols, word_of, counts, pair_counts, numbers)
    pairs = np.full((1 << 18, 4), -1, dtype=np.int64)
    heap, fill = np.empty((1 << 17, 2), dtype=np.int64), np.zeros(4, dtype=np.int64)
    positions = np.empty(max(16, total), dtype=np.int32)
    _index_pairs(symbols, pair_counts, numbers, min_frequency, pairs, heap, positions, fill)
    sizes = np.ones(256 + n_merges, dtype=np.int32)
    merges = np.empty((n_merges, 2), dtype=np.int32)
    return State(symbols, first_of, word_of, counts, sizes, pairs, heap, positions, merges, fill)


@compiled
def _best_pair(pairs, heap, fill, min_frequency):
    """
    Take the most frequent pair off the queue; -1 where none is left.

    Counts in the queue are those at the time of pushing. A count can only fall after that, so the first entry that is
    still true is the best of all; one that is not goes back with its count of today.
    """
    while fill[_HEAP] > 0:
        count, key = heap[0, 0], heap[0, 1]
        today = pairs[_slot(pairs, key), _COUNT]
        if today == count:
            fill[_HEAP] -= 1
            _sink(heap, fill[_HEAP], heap[fill[_HEAP], 0], heap[fill[_HEAP], 1])
            return key
        if today >= min_frequency:
            _sink(heap, fill[_HEAP], today, key)
        else:
            fill[_HEAP] -= 1
            _sink(heap, fill[_HEAP], heap[fill[_HEAP], 0], heap[fill[_HEAP], 1])
    return np.int64(-1)


@compiled
def _replace(state, key, new, gains, losses, neighbours, places):
    """
    Replace every occurrence of a pair by the token `new`, and note what that does to the pairs around it.

    `gains[0, x]`: new pairs (x, new), `gains[1, y]`: new pairs (new, y); `losses`: the pairs (x, left) and (right, y)
    that are gone. `neighbours[side, k]` and `places[side, k]` list the new pairs one by one; returns how many.
    """
    symbols, first_of, sizes = state.symbols, state.first_of, state.sizes
    left, right = key >> 32, key & 0xFFFFFFFF
    at = _slot(state.pairs, key)
    n_left = 0
    n_right = 0
    for p in range(state.pairs[at, _FIRST], state.pairs[at, _FIRST] + state.pairs[at, _NUMBER]):
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
def _lower(pairs, key, loss, merged):
    """Take a loss off the count of a pair (the merged pair itself is finished and stays as it is)."""
    if key != merged and loss > 0:
        pairs[_slot(pairs, key), _COUNT] -= loss


@compiled
def _enter(
    pairs, heap, positions, fill, side, new, left_or_right, key, min_frequency, n, gains, losses, found, scratch
):
    """Enter the new pairs on one side of the merge; `found` = (neighbours, places), `scratch` (vocabulary,) zeros."""
    neighbours, places = found
    for k in range(n):
        scratch[neighbours[k]] += 1
    for k in range(n):  # each distinct neighbour once: make its pair and reserve the room for its positions
        z = np.int64(neighbours[k])
        number = scratch[z]
        if number <= 0:
            continue
        scratch[z] = -1 - fill[_POSITIONS]
        _lower(pairs, (z << 32) | left_or_right if side == 0 else (left_or_right << 32) | z, losses[z], key)
        if gains[z] > 0:
            made = (z << 32) | new if side == 0 else (new << 32) | z
            at = _slot(pairs, made)
            pairs[at, _KEY] = made
            pairs[at, _COUNT] = gains[z]
            pairs[at, _FIRST] = fill[_POSITIONS]
            pairs[at, _NUMBER] = number
            fill[_PAIRS] += 1
            if gains[z] >= min_frequency:
                _push(heap, fill[_HEAP], gains[z], made)
                fill[_HEAP] += 1
        fill[_POSITIONS] += number
        gains[z] = 0
        losses[z] = 0
    for k in range(n):  # distribute the positions, in order
        z = neighbours[k]
        positions[-1 - scratch[z]] = places[k]
        scratch[z] -= 1
    for k in range(n):
        scratch[neighbours[k]] = 0


@compiled
def _with_room(state, pairs_wanted, positions_wanted):
    """A State whose arrays have room for so many more entries."""
    fill = state.fill
    pairs, heap, positions = state.pairs, state.heap, state.positions
    while 2 * (fill[_PAIRS] + pairs_wanted) > pairs.shape[0]:
        pairs = _grown_pairs(pairs)
    if fill[_HEAP] + pairs_wanted > heap.shape[0]:
        bigger = np.empty((2 * (fill[_HEAP] + pairs_wanted), 2), dtype=np.int64)
        bigger[: fill[_HEAP]] = heap[: fill[_HEAP]]
        heap = bigger
    if fill[_POSITIONS] + positions_wanted > positions.size:
        more = np.empty((fill[_POSITIONS] + positions_wanted) * 3 // 2, dtype=np.int32)
        more[: fill[_POSITIONS]] = positions[: fill[_POSITIONS]]
        positions = more
    return State(
        state.symbols, state.first_of, state.word_of, state.frequency, state.sizes, pairs, heap, positions,
        state.merges, fill,
    )  # fmt: skip


@compiled
def train_steps(state, steps, min_frequency):
    """
    Learn up to `steps` more merges; returns the new state and whether there may be more.

    PAPER: arXiv:1508.07909, section 3.2, algorithm 1; Gage, 1994.
    PAPER CONTEXT: Count all pairs, merge the most frequent into a new symbol, repeat.
    INTUITION: A merge changes only the pairs that touch it; keep the books instead of counting anew.
    IMPLEMENTATION: `_best_pair`, `_replace`, then the pairs on both sides are lowered and entered. A pair comes into
        being in one step only (that of its younger half), so its positions lie together and its count only falls.
    WHY: Thirty-two thousand merges over half a million words take about two seconds instead of days.
    """
    size = state.sizes.size
    gains, losses = np.zeros((2, size), dtype=np.int64), np.zeros((2, size), dtype=np.int64)
    scratch = np.zeros(size, dtype=np.int64)
    fill = state.fill
    for _ in range(steps):
        key = _best_pair(state.pairs, state.heap, fill, min_frequency)
        if key < 0:
            return state, False
        left, right = key >> 32, key & 0xFFFFFFFF
        new = 256 + fill[_MERGES]
        state.merges[fill[_MERGES], 0] = left
        state.merges[fill[_MERGES], 1] = right
        state.sizes[new] = state.sizes[left] + state.sizes[right]
        fill[_MERGES] += 1
        number = state.pairs[_slot(state.pairs, key), _NUMBER]
        neighbours, places = np.empty((2, number), dtype=np.int32), np.empty((2, number), dtype=np.int32)
        n_left, n_right = _replace(state, key, new, gains, losses, neighbours, places)
        distinct = min(n_left, size) + min(n_right, size)
        state = _with_room(state, distinct, n_left + n_right)
        for side in range(2):
            _enter(
                state.pairs, state.heap, state.positions, fill, side, new, left if side == 0 else right, key,
                min_frequency, n_left if side == 0 else n_right, gains[side], losses[side],
                (neighbours[side], places[side]), scratch,
            )  # fmt: skip
    return state, True


def learn_merges(
    data: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    counts: np.ndarray,
    byte_ids: np.ndarray,
    n_merges: int,
    min_frequency: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[tuple[int, int]]:
    """
    The first `n_merges` merges of a word list, as pairs of ids (bytes are 0-255 in GPT-2's order, merges follow).

    Fewer where the words are used up: a pair must occur at least `min_frequency` times.
    `progress(done, total)` is called every thousand merges.
    """
    kept = lengths > 1  # a word of one byte has no pair
    state = start(data, starts[kept], lengths[kept], counts[kept], byte_ids, n_merges, max(1, min_frequency))
    more = True
    if progress:
        progress(0, n_merges)
    while more and state.fill[_MERGES] < n_merges:
        state, more = train_steps(state, min(1000, n_merges - int(state.fill[_MERGES])), max(1, min_frequency))
        if progress:
            progress(int(state.fill[_MERGES]), n_merges)
    return [tuple(pair) for pair in state.merges[: state.fill[_MERGES]].tolist()]
