r"""
Scanner

This file implements pre-tokenisation as a finite automaton over UTF-8 bytes, following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - the pattern it recognises

A regular-expression engine tries alternatives and backtracks. But in these patterns the next character always tells
whether the piece goes on, up to three things that are put right afterwards:

  cut       the piece ended before this character
  cut back  it ended one character earlier: of several blanks the last one belongs to the word behind it
  undo      the last cut was none: GPT-4 ends a piece at the last line end among the blanks, and here is a later one

So the whole of pre-tokenisation is one table look-up a character, without a branch to mispredict.

Each component is explained with paper references for educational purposes.
"""

from functools import lru_cache

import numpy as np

from phase1_foundation.project2_tokenizer.compiled import compiled
from phase1_foundation.project2_tokenizer.patterns import (
    APOSTROPHE,
    BLANK,
    END,
    GPT2,
    GPT2_DIGITS,
    GPT4,
    GPT4_DIGITS,
    LETTERS_OF,
    LINE_END,
    NUMBER,
    SPACE,
    VISIBLE,
    VISIBLES,
    WORD_LETTERS,
)

PADDING = 40  # zero bytes that must follow the text: readers look up to 32 bytes ahead
CUT, CUT_BACK, UNDO = 1, 2, 4
_NEXT = 0xFFF0  # the rest of an entry: 16 times the number of the next state


class Automaton:
    """
    Builds the transition table of a pattern, state by state.

    PAPER: "Language Models are Unsupervised Multitask Learners", section 2.2.
    PAPER CONTEXT: Text is cut by character category, so that merges never cross categories.
    INTUITION: A state says what the piece has been so far; whatever is not written down cuts and begins a new piece.
    IMPLEMENTATION: `begin` maps the class of a first character to a state; `on` adds transitions out of a state.
    WHY: The table is data: four patterns share one loop, and a test compares each with its expression on fuzzed text.
    """

    def __init__(self, begin: dict[str, tuple[int, ...]]):
        self.begin = {kind: state for state, kinds in begin.items() for kind in kinds}
        self.rows: dict[str, dict[int, tuple[str, int]]] = {"start": {k: (s, 0) for k, s in self.begin.items()}}
        for state in begin:
            self.rows.setdefault(state, {})

    def on(self, state: str, kinds: tuple[int, ...], target: str | None = None, action: int = 0) -> None:
        """In `state`, a character of one of `kinds` leads to `target` (None: to the beginning of a new piece)."""
        self.rows.setdefault(state, {})
        for kind in kinds:
            self.rows[state][kind] = (target or self.begin[kind], action)

    def like(self, state: str, other: str, action: int = 0) -> None:
        """Whatever `state` says nothing about, it does as `other` would, with an action on top."""
        for kind in range(END + 1):
            target, other_action = self.entry(other, kind)
            self.rows.setdefault(state, {}).setdefault(kind, (target, action | other_action))

    def entry(self, state: str, kind: int) -> tuple[str, int]:
        """Next state and action."""
        return self.rows[state].get(kind) or (self.begin.get(kind, "start"), CUT)

    def table(self) -> np.ndarray:
        """(states * 16,) uint16: row of 16 classes after row, each 16 * next state + action."""
        number = {state: 16 * i for i, state in enumerate(self.rows)}
        entries = [self.entry(state, kind) for state in self.rows for kind in range(16)]
        return np.array([number[target] | action for target, action in entries], dtype=np.uint16)


def _add_contractions(automaton: Automaton, any_case: bool, action: int) -> None:
    """'s 'd 'm 't 'll 've 're, and no more: the next character begins a new piece in any case."""
    letters = {name: kinds if any_case else kinds[:1] for name, kinds in LETTERS_OF.items()}
    automaton.on("apostrophe", VISIBLES, "visible")
    automaton.on("apostrophe", letters["sdmt"], "contracted")
    automaton.on("contracted", ())
    for first, second in (("l", "l"), ("vr", "e")):
        automaton.on("apostrophe", letters[first], f"apostrophe {first}")
        automaton.on(f"apostrophe {first}", letters[second], "contracted")
        automaton.like(f"apostrophe {first}", "letters", action)  # no contraction after all


def _gpt2(single_digits: bool) -> Automaton:
    r"""
    `'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.

    "a  ok", with two spaces; the bars are the cuts so far:

    state          next    action    new state
    start          a                 letters         a
    letters        space   cut       space           a|_
    space          space             blanks, space   a|__
    blanks, space  o       cut back  letters         a|_|_o      the last space belongs to the word
    letters        k                 letters         a|_|_ok
    letters        END     cut                       a|_|_ok|

    "blanks, other" is the same where the last blank is no space and cannot lead a word: it becomes a piece of its own.
    """
    a = Automaton(
        {
            "letters": WORD_LETTERS,
            "numbers": (NUMBER,),
            "visible": (VISIBLE,),
            "apostrophe": (APOSTROPHE,),
            "space": (SPACE,),
            "blank": (BLANK, LINE_END),
        }
    )
    a.on("letters", WORD_LETTERS, "letters")
    a.on("visible", VISIBLES, "visible")
    _add_contractions(a, any_case=False, action=CUT_BACK)
    for state, action in (("space", 0), ("blanks, space", CUT_BACK)):  # one space may lead
        a.on(state, WORD_LETTERS, "letters", action)
        a.on(state, VISIBLES, "visible", action)
    a.on("blanks, other", (*WORD_LETTERS, *VISIBLES, NUMBER), None, CUT_BACK | CUT)
    for state in ("space", "blank", "blanks, space", "blanks, other"):
        a.on(state, (SPACE,), "blanks, space")
        a.on(state, (BLANK, LINE_END), "blanks, other")
    if single_digits:
        a.on("blanks, other", (NUMBER,), None, CUT)
    else:
        a.on("numbers", (NUMBER,), "numbers")
        a.on("space", (NUMBER,), "numbers")
        a.on("blanks, space", (NUMBER,), "numbers", CUT_BACK)
    return a


def _gpt4(max_digits: int) -> Automaton:
    r"""
    `(?i:'s|...)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`.

    "\n \nx": whether the first line end ends a piece is known two characters later (`\s*[\r\n]+` takes all it can):

    state            next    action   new state
    start            \n               lines            \n
    lines            space   cut      line end, space  \n|_       perhaps
    line end, space  \n      undo     lines            \n_\n      no: there is another line end
    lines            x       cut      letters          \n_\n|x
    letters          END     cut                       \n_\n|x|
    """
    a = Automaton(
        {
            "letters": WORD_LETTERS,
            "digit 1": (NUMBER,),
            "visible, first": (VISIBLE,),
            "apostrophe": (APOSTROPHE,),
            "space": (SPACE,),
            "blank": (BLANK,),
            "lines": (LINE_END,),
        }
    )
    a.on("letters", WORD_LETTERS, "letters")
    for digits in range(1, max_digits):
        a.on(f"digit {digits}", (NUMBER,), f"digit {digits + 1}")
    a.rows.setdefault(f"digit {max_digits}", {})
    for state in ("visible, first", "visible", "apostrophe"):
        a.on(state, VISIBLES, "visible")
        a.on(state, (LINE_END,), "visible, lines")
    a.on("visible, lines", (LINE_END,), "visible, lines")
    a.on("visible, first", WORD_LETTERS, "letters")  # any one character may lead letters
    a.on("apostrophe", WORD_LETTERS, "letters")
    _add_contractions(a, any_case=True, action=0)
    for after in ("", "line end, "):  # the same again behind a line end, where a later one takes the last cut back
        space, blank, many_space, many_other = (after + s for s in ("space", "blank", "blanks, space", "blanks, other"))
        for state in (space, blank, many_space, many_other):
            a.on(state, (SPACE,), many_space)
            a.on(state, (BLANK,), many_other)
            a.on(state, (LINE_END,), "lines", UNDO if after else 0)
            a.on(state, WORD_LETTERS, "letters", CUT_BACK if "blanks" in state else 0)
        a.on(space, VISIBLES, "visible")
        a.on(many_space, VISIBLES, "visible", CUT_BACK)
        a.on(many_space, (NUMBER,), None, CUT_BACK | CUT)
        a.on(many_other, (*VISIBLES, NUMBER), None, CUT_BACK | CUT)
    a.on("lines", (LINE_END,), "lines")
    a.on("lines", (SPACE,), "line end, space", CUT)
    a.on("lines", (BLANK,), "line end, blank", CUT)
    return a


_BUILDERS = {
    GPT2: lambda: _gpt2(single_digits=False),
    GPT2_DIGITS: lambda: _gpt2(single_digits=True),
    GPT4: lambda: _gpt4(max_digits=3),
    GPT4_DIGITS: lambda: _gpt4(max_digits=1),
}


@lru_cache(maxsize=8)
def transitions(expression: str) -> np.ndarray | None:
    """The table of one of our patterns; None for a foreign expression, which `patterns.split` has to cut."""
    return _BUILDERS[expression]().table() if expression in _BUILDERS else None


NO_CUTS = np.zeros(16, dtype=np.uint16)  # for text that is cut already: one state that never cuts
NO_CUTS[END] = CUT


@compiled
def scan(data, start, end, classes, table, ends):
    """
    Write the ends of the pieces of the UTF-8 text `data[start:end]` to `ends`; returns how many, and where it stopped.

    PAPER: "Language Models are Unsupervised Multitask Learners", section 2.2.
    PAPER CONTEXT: Text is cut by character category before any merge.
    INTUITION: Read a character, look up what it does to the piece at hand.
    IMPLEMENTATION: `data` uint8 with `PADDING` bytes behind; `classes` from `patterns.character_classes`. Both possible
        cuts are always written and the counter moves only if they count. Stops early, at a cut, when `ends` is full
        (at least 16 long): call it again from there. Lone surrogates (three bytes) count as visible characters.
    WHY: About three nanoseconds a byte, whatever the text: no backtracking, no allocation, no misprediction.
    """
    state = 0
    count = 0
    previous = start
    i = start
    while i < end and count < ends.size - 4:
        b = np.int64(data[i])
        length = 1
        if b >= 0x80:
            if b < 0xE0:
                b = ((b & 0x1F) << 6) | (data[i + 1] & 0x3F)
                length = 2
            elif b < 0xF0:
                b = ((b & 0x0F) << 12) | ((data[i + 1] & 0x3F) << 6) | (data[i + 2] & 0x3F)
                length = 3
            else:
                b = (
                    ((b & 0x07) << 18)
                    | ((data[i + 1] & 0x3F) << 12)
                    | ((data[i + 2] & 0x3F) << 6)
                    | (data[i + 3] & 0x3F)
                )
                length = 4
        step = np.int64(table[state + classes[b]])
        count -= (step & UNDO) >> 2
        ends[count] = previous
        count += (step & CUT_BACK) >> 1
        ends[count] = i
        count += step & CUT
        state = step & _NEXT
        previous = i
        i += length
    if i < end:
        return count - 1, ends[count - 2]  # the last cut might still be undone: leave it to the next call
    if start >= end:
        return 0, end
    step = np.int64(table[state + END])
    ends[count] = previous
    count += (step & CUT_BACK) >> 1
    ends[count] = end
    return count + 1, end
