"""
Word Keys

This file implements words as numbers, for the hash tables of training and encoding, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - BPE works on distinct words

A word of up to 31 bytes fits into four 64-bit numbers, its length in the last byte. Comparing two words is then four
comparisons, and hashing one is four multiplications, without a loop and without a branch that depends on the length.

Each component is explained with paper references for educational purposes.
"""

import numpy as np
from numba import njit

KEY_BYTES = 31  # the longest word that is its own key
_8, _16, _24, _29, _32, _56 = (np.uint64(n) for n in (8, 16, 24, 29, 32, 56))
_MIX_1, _MIX_2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)  # odd constants with well mixed bits
_MIX_3, _MIX_4 = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)


def byte_masks() -> np.ndarray:
    """
    Row n keeps the first n of 32 bytes, as four little-endian 64-bit words.

    >>> [hex(word) for word in byte_masks()[9].tolist()]
    ['0xffffffffffffffff', '0xff', '0x0', '0x0']
    """
    kept = np.arange(32)[None, :] < np.arange(32)[:, None]
    return np.where(kept, np.uint8(0xFF), np.uint8(0)).view("<u8")


@njit(inline="always")
def word_key(eights, start, length, masks):
    """
    The key of the word at byte `start`; one longer than KEY_BYTES gets a key that no short word has.

    PAPER: arXiv:1508.07909, section 3.2 (a dictionary of words, each with its frequency).
    PAPER CONTEXT: BPE never looks across word boundaries, so equal words are treated equally.
    INTUITION: Computers compare numbers, not strings; so make the string a number.
    IMPLEMENTATION: `eights[i]` are the eight bytes from byte i on (up to 32 bytes are read); `masks` from `byte_masks`.
    WHY: Word lengths are random to a processor: a loop over them costs more in mispredictions than the work itself.
    """
    row = np.uint64(min(length, KEY_BYTES))
    first = np.uint64(start)  # unsigned indices save the check for negative ones
    a = eights[first] & masks[row, 0]
    b = eights[first + _8] & masks[row, 1]
    c = eights[first + _16] & masks[row, 2]
    d = (eights[first + _24] & masks[row, 3]) | (np.uint64(min(length, KEY_BYTES + 1)) << _56)
    return a, b, c, d


@njit(inline="always")
def hash_key(a, b, c, d):
    """A key's hash; 32 good bits."""
    h = a * _MIX_1 + b * _MIX_2 + c * _MIX_3 + d * _MIX_4
    return ((h ^ (h >> _29)) * _MIX_2) >> _32
