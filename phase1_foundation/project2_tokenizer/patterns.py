r"""
Pre-tokenisation Patterns

This file implements how text is cut into pieces before BPE, following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - merges never cross categories
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - BPE works inside words

BPE alone would learn `dog.`, `dog!` and `dog?` as three tokens. GPT-2 therefore cuts the text first, with a regular
expression, and BPE never merges across a cut. The alternatives are tried from left to right at each position:

GPT-2                      matches                           "I've 2 cats!!  ok"
  '(?:[sdmt]|ll|ve|re)     English contractions              've
   ?\p{L}+                 letters, with one blank before    I   " cats"   " ok"
   ?\p{N}+                 digits, with one blank before     " 2"
   ?[^\s\p{L}\p{N}]+       everything visible that is left   !!
  \s+(?!\S)                blanks, but leave the last one    " "  (the second blank belongs to " ok")
  \s+                      a lone blank that is not a space

GPT-4 (and Llama 3) changes four things: contractions in any case; any one non-letter may lead a word ("\tif", "(x");
at most three digits hang together, so that numbers are cut alike; and line ends stay with the punctuation or the
blanks before them, so that code compresses better.

Each component is explained with paper references for educational purposes.
"""

from functools import lru_cache

import numpy as np
import regex

from phase1_foundation.project2_tokenizer.unicode_ranges import LETTERS, NUMBERS, WHITE_SPACE, parse_ranges

GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# each digit alone (SmolLM, StarCoder): Hugging Face's `Digits` step before `ByteLevel`, as one expression
GPT2_DIGITS = r"""'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"""
GPT4 = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
GPT4_DIGITS = GPT4.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit alone (Qwen2, Qwen3)

PATTERNS = {"gpt2": GPT2, "gpt2_digits": GPT2_DIGITS, "gpt4": GPT4, "gpt4_digits": GPT4_DIGITS}
# Other spellings of the same expressions, as they are found in the files of others.
SPELLINGS = {r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""": GPT2}

# Classes of characters. Letters that occur in contractions have classes of their own, in lower and in upper case.
LETTER, S_D_M_T, L, V_R, E, UPPER_S_D_M_T, UPPER_L, UPPER_V_R, UPPER_E = range(9)
NUMBER, SPACE, BLANK, LINE_END, VISIBLE, APOSTROPHE, END = range(9, 16)  # END: behind the last character
WORD_LETTERS = tuple(range(9))
BLANKS, VISIBLES = (SPACE, BLANK, LINE_END), (VISIBLE, APOSTROPHE)
LETTERS_OF = {"sdmt": (S_D_M_T, UPPER_S_D_M_T), "l": (L, UPPER_L), "vr": (V_R, UPPER_V_R), "e": (E, UPPER_E)}


def resolve_pattern(pattern: str) -> str:
    """A name (`"gpt2"`, `"gpt4"`, ...) or a regular expression -> the regular expression."""
    expression = SPELLINGS.get(pattern, PATTERNS.get(pattern, pattern))
    if pattern not in PATTERNS and pattern.isidentifier():
        raise ValueError(f"pattern={pattern!r} is unknown: use one of {', '.join(PATTERNS)} or a regular expression")
    try:
        compile_pattern(expression)
    except regex.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression ({error}): correct it") from None
    return expression


def _in_class(ranges: str) -> str:
    """The inside of a regex character class: `a-z0` for `"61-7a 30"`."""
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in parse_ranges(ranges))


@lru_cache(maxsize=16)
def compile_pattern(expression: str) -> regex.Pattern:
    r"""
    Compile a pattern with `\p{L}` and `\p{N}` spelled out as the ranges of Unicode 16.0.

    The `regex` module follows newer versions of Unicode than tiktoken does; see `unicode_ranges.py`.
    """
    letters, numbers = _in_class(LETTERS), _in_class(NUMBERS)
    out, inside, i = [], False, 0
    while i < len(expression):
        escaped = expression[i] == "\\"
        token = (
            expression[i : i + 5] if expression.startswith((r"\p{L}", r"\p{N}"), i) else expression[i : i + 1 + escaped]
        )
        if len(token) == 5:
            ranges = letters if token == r"\p{L}" else numbers
            out.append(ranges if inside else f"[{ranges}]")
        else:
            inside = (inside or token == "[") and token != "]"
            out.append(token)
        i += len(token)
    return regex.compile("".join(out))


def split(text: str, expression: str) -> list[str]:
    """
    Cut a text into pieces with a regular expression; what the expression does not match becomes a piece of its own.

    PAPER: "Language Models are Unsupervised Multitask Learners", section 2.2.
    PAPER CONTEXT: Merging is prevented across character categories, with an exception for spaces.
    INTUITION: A word and the punctuation after it are different things and should be different tokens.
    IMPLEMENTATION: The reference. `scanner.py` does the same on bytes, forty times as fast; tests prove them equal.
    WHY: Cutting keeps the vocabulary free of accidents, and lets BPE count distinct words instead of reading text.

    >>> split("I've 2 cats!!  ok", GPT2)
    ['I', "'ve", ' 2', ' cats', '!!', ' ', ' ok']
    """
    pieces, end = [], 0
    for match in compile_pattern(expression).finditer(text):
        if match.start() > end:
            pieces.append(text[end : match.start()])
        if match.end() > match.start():
            pieces.append(match.group())
        end = match.end()
    return pieces + ([text[end:]] if end < len(text) else [])


@lru_cache(maxsize=1)
def character_classes() -> np.ndarray:
    """
    One byte for each code point: its class, LETTER to APOSTROPHE.

    There are 0x110000 code points, but four bytes that are not UTF-8 can spell 0x200000 numbers; the table covers all
    of these, so that no input whatsoever makes the scanner read beyond it.

    >>> [int(character_classes()[ord(c)]) for c in "é7 ?"] == [LETTER, NUMBER, SPACE, VISIBLE]
    True
    """
    classes = np.full(0x200000, VISIBLE, dtype=np.uint8)
    for ranges, label in ((LETTERS, LETTER), (NUMBERS, NUMBER), (WHITE_SPACE, BLANK)):
        for first, last in parse_ranges(ranges):
            classes[first : last + 1] = label
    for letters, (lower, upper) in LETTERS_OF.items():
        classes[[ord(c) for c in letters]] = lower
        classes[[ord(c) for c in letters.upper()]] = upper
    classes[0x17F] = UPPER_S_D_M_T  # the long s: an s where case is ignored
    for char, label in ((" ", SPACE), ("\n", LINE_END), ("\r", LINE_END), ("'", APOSTROPHE)):
        classes[ord(char)] = label
    return classes
