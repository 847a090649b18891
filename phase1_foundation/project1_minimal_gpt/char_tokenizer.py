"""
Character Tokenizer

This file implements the simplest tokenizer, one token per character, following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - what a general text vocabulary must do

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Iterable


class CharTokenizer:
    """One token per character that occurs in a text.

    PAPER: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.2.
    PAPER CONTEXT: a general model should compute the probability of any string; byte- or character-level models can,
        but lagged behind word-level ones on large data sets, so GPT-2 takes byte-level BPE as the middle ground.
    INTUITION: with 65 symbols there is nothing to learn about words, and every mistake of the model is visible.
    IMPLEMENTATION: the sorted characters of the training text; a token is the index of its character.
    WHY: the whole pipeline fits in the head before project 2 makes tokens longer (a deviation from GPT-2).

    `chars` are the characters in the order of their tokens. Raises ValueError if one occurs twice or there is none.

    >>> tokenizer = CharTokenizer.from_text("hello world")
    >>> tokenizer.vocab_size, tokenizer.encode("low")
    (8, [4, 5, 7])
    >>> tokenizer.decode([3, 2, 4, 4, 5])
    'hello'
    """

    def __init__(self, chars: str):
        if not chars:
            raise ValueError("a character tokenizer needs at least one character: is the text empty?")
        if len(set(chars)) != len(chars):
            twice = next(char for char in chars if chars.count(char) > 1)
            raise ValueError(f"the character {twice!r} occurs twice in the vocabulary: each needs one token of its own")
        self.chars = chars
        self.token_of = {char: token for token, char in enumerate(chars)}

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Make the tokenizer whose vocabulary is the set of characters of `text`, sorted."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return len(self.chars)

    def encode(self, text: str) -> list[int]:
        """Turn text into tokens; raises ValueError for a character that the vocabulary lacks."""
        try:
            return [self.token_of[char] for char in text]
        except KeyError:
            unknown = sorted(set(text) - self.token_of.keys())
            shown = " ".join(repr(char) for char in unknown[:10]) + (" ..." if len(unknown) > 10 else "")
            raise ValueError(
                f"the vocabulary has no {shown}: it knows only the {self.vocab_size} characters of its training text, "
                f"{self.chars!r}; leave the others out, or train on a text that contains them"
            ) from None

    def decode(self, tokens: Iterable[int]) -> str:
        """Turn tokens back into text; raises ValueError for a token outside the vocabulary."""
        tokens = list(tokens)
        for token in tokens:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token {token} is not in the vocabulary: tokens are 0 to {self.vocab_size - 1}")
        return "".join(self.chars[token] for token in tokens)

    def to_dict(self) -> dict[str, str]:
        """Plain values for a checkpoint."""
        return {"kind": "char", "chars": self.chars}

    @classmethod
    def from_dict(cls, saved: dict[str, str]) -> "CharTokenizer":
        """Rebuild what `to_dict` gave; raises ValueError if it describes another kind of tokenizer."""
        if not isinstance(saved, dict) or saved.get("kind") != "char" or not isinstance(saved.get("chars"), str):
            kind = saved.get("kind") if isinstance(saved, dict) else saved
            raise ValueError(f"tokenizer of kind {kind!r} where a 'char' one is needed: use a checkpoint of project 1")
        return cls(saved["chars"])
