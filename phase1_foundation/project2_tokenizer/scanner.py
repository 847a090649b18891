r"""
Scanner

This file implements pre-tokenisation as a hand-written automaton over UTF-8 bytes, following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - the pattern it recognises

A regular-expression engine tries alternatives and backtracks. But the first character, and sometimes the second,
already tells which alternative will win, and where a run of letters ends is a matter of one table look-up a byte.

Each component is explained with paper references for educational purposes.
"""

import numpy as np
from numba import njit

from phase1_foundation.project2_tokenizer.patterns import (
    BLANK,
    GPT2,
    GPT2_DIGITS,
    GPT4,
    GPT4_DIGITS,
    LETTER,
    LINE_END,
    NUMBER,
    VISIBLE,
)

WHOLE = 0  # no scanner: every document is one piece (already cut by `patterns.split`)
AS_GPT2, AS_GPT2_DIGITS, AS_GPT4, AS_GPT4_DIGITS = 1, 2, 3, 4
SCANNERS = {GPT2: AS_GPT2, GPT2_DIGITS: AS_GPT2_DIGITS, GPT4: AS_GPT4, GPT4_DIGITS: AS_GPT4_DIGITS}
PADDING = 40  # zero bytes that must follow the text, so that looking ahead never leaves the buffer
_SPACE, _APOSTROPHE = 0x20, 0x27
_ONE, _ONES, _HIGH = np.uint64(1), np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
_CASE, _LOW = np.uint64(0x2020202020202020), np.uint64(0x7F7F7F7F7F7F7F7F)
_FROM_A, _PAST_Z = np.uint64(0x1F1F1F1F1F1F1F1F), np.uint64(0x0505050505050505)  # 0x80 - "a", 0x80 - "z" - 1
_TOP_BYTE = np.uint64(56)


def padded(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The buffer as bytes, zeros behind it, and as a view in which item `i` is the eight bytes from `i` on."""
    buffer = data + bytes(PADDING)
    eights = np.ndarray((len(buffer) - 7,), dtype="<u8", buffer=buffer, strides=(1,))
    return np.frombuffer(buffer, dtype=np.uint8), eights


@njit(cache=True, nogil=True)
def ascii_letters_end(eights, i):
    """
    Where the run of ASCII letters that begins at byte `i` ends, eight bytes at a time and without a branch a byte.

    Each byte of `folded` is a letter in lower case or not a letter; adding `0x80 - "a"` sets its highest bit if it is
    at least "a", adding `0x80 - "z" - 1` if it is beyond "z". The lowest byte that is no letter ends the run.
    """
    while True:
        folded = (eights[i] | _CASE) & _LOW
        letters = (folded + _FROM_A) & ~(folded + _PAST_Z) & ~eights[i] & _HIGH
        others = letters ^ _HIGH
        if others:
            below = (others & -others) - _ONE  # all bits under the first byte that is no letter
            return i + np.int64(((below & _ONES) * _ONES) >> _TOP_BYTE) - 1
        i += 8


@njit(cache=True, nogil=True)
def class_at(data, i, classes):
    """Class and length in bytes of the character at byte `i`."""
    b = data[i]
    if b < 0x80:
        return classes[b], 1
    if b < 0xE0:
        return classes[((b & 0x1F) << 6) | (data[i + 1] & 0x3F)], 2
    if b < 0xF0:
        return classes[((b & 0x0F) << 12) | ((data[i + 1] & 0x3F) << 6) | (data[i + 2] & 0x3F)], 3
    high = ((b & 0x07) << 18) | ((data[i + 1] & 0x3F) << 12)
    return classes[high | ((data[i + 2] & 0x3F) << 6) | (data[i + 3] & 0x3F)], 4


@njit(cache=True, nogil=True)
def run_end(data, i, end, classes, wanted):
    """Where the run of characters whose class is in the mask `wanted` ends."""
    while i < end:
        b = data[i]
        if b < 0x80:
            if not classes[b] & wanted:
                break
            i += 1
        else:
            kind, length = class_at(data, i, classes)
            if not kind & wanted:
                break
            i += length
    return i


@njit(cache=True, nogil=True)
def blanks_end(data, i, end, classes, leave_last):
    r"""`\s+(?!\S)|\s+`: all blanks, but the last one is left to the word behind it, unless it is the only one."""
    last = i
    j = i
    while j < end:
        kind, length = class_at(data, j, classes)
        if not kind & (BLANK | LINE_END):
            if leave_last and last > i and not (leave_last == 2 and kind == NUMBER):
                return last
            return j
        last = j
        j += length
    return j


@njit(cache=True, nogil=True)
def contraction_end(data, i, end, any_case):
    r"""After an apostrophe at `i`: the end of 's 't 'd 'm 'll 've 're, or `i` where there is none."""
    if i + 1 >= end:
        return i
    b = data[i + 1]
    if any_case and b == 0xC5 and data[i + 2] == 0xBF:
        return i + 3  # U+017F, the long s, is an s to a case-insensitive expression
    fold = 0x20 if any_case and 0x41 <= b <= 0x5A else 0
    b = b | fold
    if b == 0x73 or b == 0x64 or b == 0x6D or b == 0x74:  # s d m t
        return i + 2
    if i + 2 >= end:
        return i
    c = data[i + 2]
    c = c | (0x20 if any_case and 0x41 <= c <= 0x5A else 0)
    if (b == 0x6C and c == 0x6C) or ((b == 0x76 or b == 0x72) and c == 0x65):  # ll, ve, re
        return i + 3
    return i


@njit(cache=True, nogil=True)
def gpt2_piece(data, i, end, classes, single_digits):
    """The end of the GPT-2 piece that begins at byte `i`."""
    b = data[i]
    if b == _APOSTROPHE:
        j = contraction_end(data, i, end, False)
        if j > i:
            return j
    start = i + 1 if b == _SPACE and i + 1 < end else i  # ` ?`: one space may lead
    kind, length = class_at(data, start, classes)
    if kind == NUMBER and single_digits:
        return start + length if start == i else start
    if kind & (LETTER | NUMBER | VISIBLE):
        return run_end(data, start + length, end, classes, kind)
    return blanks_end(data, i, end, classes, 2 if single_digits else 1)


@njit(cache=True, nogil=True)
def blank_lines_end(data, i, end, classes):
    r"""`\s*[\r\n]+|\s+(?!\S)|\s+`: up to the last line end among the blanks, else as in GPT-2."""
    j = i
    after_line_end = i
    while j < end:
        kind, length = class_at(data, j, classes)
        if not kind & (BLANK | LINE_END):
            break
        j += length
        if kind == LINE_END:
            after_line_end = j
    return after_line_end if after_line_end > i else blanks_end(data, i, end, classes, 1)


@njit(cache=True, nogil=True)
def gpt4_piece(data, i, end, classes, max_digits):
    """The end of the GPT-4 piece that begins at byte `i`."""
    b = data[i]
    if b == _APOSTROPHE:
        j = contraction_end(data, i, end, True)
        if j > i:
            return j
    kind, length = class_at(data, i, classes)
    if kind == LETTER:
        return run_end(data, i + length, end, classes, LETTER)
    if kind == NUMBER:
        j = i
        for _ in range(max_digits):  # \p{N}{1,3}
            kind, length = class_at(data, j, classes)
            if j >= end or kind != NUMBER:
                break
            j += length
        return j
    j = i + length
    if j < end:
        following, length = class_at(data, j, classes)
        if kind != LINE_END and following == LETTER:  # [^\r\n\p{L}\p{N}]?\p{L}+
            return run_end(data, j + length, end, classes, LETTER)
        if b == _SPACE and following == VISIBLE:  # the optional space of ` ?[^\s\p{L}\p{N}]+`
            kind = following
    if kind == VISIBLE:
        j = run_end(data, j, end, classes, VISIBLE)
        return run_end(data, j, end, classes, LINE_END)  # [\r\n]*
    return blank_lines_end(data, i, end, classes)


@njit(cache=True, nogil=True)
def next_piece(data, i, end, classes, scanner):
    """
    The end of the piece that begins at byte `i` of a UTF-8 text that ends at `end` (`i < end`).

    PAPER: "Language Models are Unsupervised Multitask Learners", section 2.2.
    PAPER CONTEXT: Text is cut by character category before any merge.
    INTUITION: Look at one or two characters, know the alternative, then run to the end of the run.
    IMPLEMENTATION: `data` uint8 with `PADDING` bytes behind the text; `classes` from `patterns.character_classes`;
        `scanner` one of `SCANNERS`. Lone surrogates (as three bytes) count as visible characters.
    WHY: No backtracking and no decoding of ASCII: about two nanoseconds a byte.
    """
    if scanner == AS_GPT2:
        return gpt2_piece(data, i, end, classes, False)
    if scanner == AS_GPT2_DIGITS:
        return gpt2_piece(data, i, end, classes, True)
    if scanner == AS_GPT4:
        return gpt4_piece(data, i, end, classes, 3)
    if scanner == AS_GPT4_DIGITS:
        return gpt4_piece(data, i, end, classes, 1)
    return end


@njit(cache=True, nogil=True)
def scan(data, eights, start, end, classes, scanner, ends):
    """Write the ends of the pieces of `data[start:end]` to `ends` until one is full; returns how many, and where."""
    count = 0
    while start < end and count < ends.size:
        # Three pieces of four are ASCII words, with or without a space: all patterns agree on these.
        letters = start + (data[start] == _SPACE)
        j = min(ascii_letters_end(eights, letters), end)
        if j > letters and scanner != WHOLE and (j == end or data[j] < 0x80):
            start = j
        else:
            start = next_piece(data, start, end, classes, scanner)
        ends[count] = start
        count += 1
    return count, start
