"""
Shuffling without a list

This file implements the order in which training windows are read, following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - training on windows of one long stream
- "Scaling Data-Constrained Language Models" (Muennighoff et al., 2023) - whole epochs over limited data

Each component is explained with paper references for educational purposes.
"""

import numpy as np

ROUNDS = 6  # of the Feistel network; four are enough to pass for random, six for small sizes, too
_MASK = (1 << 64) - 1


def mix(*numbers):
    """A 64-bit hash of whole numbers: the same on every machine and in every process.

    >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
    (True, False)
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = int(_scramble(np.array([(state ^ (number & _MASK)) & _MASK], dtype=np.uint64))[0])
        state = (state + 0x9E3779B97F4A7C15) & _MASK
    return state


def _scramble(x):
    """Multiply and shift until each bit of a uint64 array depends on all the others (wraps around by intention)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices, size, key):
    """
    A pseudo-random permutation of 0 ... size - 1, evaluated at any places without writing the list down

    PAPER: "Scaling Data-Constrained Language Models" (Muennighoff et al., 2023), arXiv:2305.16264. The network itself
        is textbook cryptography, not that paper's.
    PAPER CONTEXT: when data are scarce they are repeated in epochs, each one reading everything once.
    INTUITION: a cipher maps every number to another and none twice, so encrypting 0, 1, 2, ... is a shuffled deck.
    IMPLEMENTATION: a balanced Feistel network on 2k bits, the smallest even number that holds `size`: halve the bits,
        xor one half with a hash of the other, swap, `ROUNDS` times. What lands outside 0 ... size - 1 is encrypted
        again until it lands inside (cycle walking), which keeps the map one to one.
    WHY: sampling with replacement misses a third of the data in an epoch; a shuffled list of a large corpus costs
        memory and makes resuming slow. This costs neither, and place i is a pure function of (key, i).

    Args:
        indices: places in the shuffled deck, each at least 0 and below `size`.
        size: how many there are.
        key: chooses the permutation; any whole number.

    Returns:
        int64 array, shaped like `indices`.

    >>> sorted(permute(np.arange(10), 10, key=7).tolist()) == list(range(10))
    True
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [np.uint64(mix(key, turn)) for turn in range(ROUNDS)]
    x = np.asarray(indices, dtype=np.uint64).copy()
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        x[outside] = _encrypt(x[outside], np.uint64(half), keys)
        outside = x >= np.uint64(size)
    return x.astype(np.int64)


def _encrypt(x, half, keys):
    """One pass through the network: a one-to-one map of the numbers of 2 * half bits."""
    low = np.uint64((1 << int(half)) - 1)
    left, right = x >> half, x & low
    for key in keys:
        left, right = right, left ^ (_scramble(right ^ key) & low)
    return (left << half) | right
