"""
Noise by counting

This file implements random numbers that depend on nothing but their place following:
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - drawing from what is left of the distribution

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's
_MASK = (1 << 64) - 1


def _signed(x: int) -> int:
    """The int64 with these 64 bits."""
    x &= _MASK
    return x - (1 << 64) if x >> 63 else x


def scramble(x: int) -> int:
    """splitmix64's output function on a Python int: every bit of the result depends on every bit of x.

    >>> hex(scramble(0x9E3779B97F4A7C15))    # the first number of splitmix64 from seed 0
    '0xe220a8397b1dcdaf'
    """
    x &= _MASK
    x = (x ^ (x >> 30)) * _FIRST & _MASK
    x = (x ^ (x >> 27)) * _SECOND & _MASK
    return x ^ (x >> 31)


def noise_keys(seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    """One int64 for each (seed, position)."""
    return keys_at(np.array([stem(seed) for seed in seeds], dtype=np.uint64), np.array(positions)).tolist()


def stem(seed: int) -> int:
    """What all keys of a seed grow from: 64 bits."""
    return scramble(seed + _GOLDEN)


def keys_at(stems: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The keys of many (stem, position) at once: `scramble(stem + position * golden)`, (R,) int64."""
    x = stems + positions.astype(np.uint64) * np.uint64(_GOLDEN)  # modulo 2^64, as all that follows
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return (x ^ (x >> np.uint64(31))).view(np.int64)


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise for some tokens: keys (R, 1) int64, tokens (n,) or (R, n) int64 -> (R, n) float32.

    PAPER: drawing as in "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3; the noise is
        splitmix64 by counter, and the Gumbel-max trick: practice rather than a paper.
    PAPER CONTEXT: the next token is a draw from a distribution.
    INTUITION: every token is dealt a lucky number; the likely ones need less luck. Who deals, and to how many others at
        once, changes nothing.
    IMPLEMENTATION: hash (key, token) to 40 bits, u in (0, 1); -log(-log(1 - u)). The largest logit + noise is a draw
        from softmax. Small u win, where float32 is finest. Shifts of int64 carry the sign, so bits are masked.
    WHY: a generator's state would tie a request's text to its neighbours in the batch, and to being preempted.
    """
    u = (_bits(keys, tokens).float() + 0.5) * 2.0**-40
    return -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))


def uniform(keys: Tensor) -> Tensor:
    """A number in (0, 1) for each key (R, 1) int64 -> (R, 1) float32: 23 bits, never 0 or 1.

    >>> [round(u, 4) for u in uniform(torch.tensor([[1], [2]])).flatten().tolist()]
    [0.5666, 0.5912]
    """
    return ((_bits(keys, torch.zeros_like(keys)) >> 17).float() + 0.5) * 2.0**-23


def _bits(keys: Tensor, tokens: Tensor) -> Tensor:
    """The hash: 40 bits for each (key, token)."""
    x = keys + (tokens + 1) * _signed(_GOLDEN)
    x = (x ^ ((x >> 30) & (_MASK >> 30))) * _signed(_FIRST)
    x = (x ^ ((x >> 27) & (_MASK >> 27))) * _signed(_SECOND)
    x = x ^ ((x >> 31) & (_MASK >> 31))
    return (x >> 24) & (_MASK >> 24)
