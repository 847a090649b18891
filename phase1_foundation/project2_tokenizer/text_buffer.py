"""
Text Buffer

This file implements how text reaches the compiled loops, following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - text as a sequence of bytes

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Iterable

import numpy as np

from phase1_foundation.project2_tokenizer.bytes_alphabet import encode_utf8
from phase1_foundation.project2_tokenizer.patterns import split
from phase1_foundation.project2_tokenizer.scanner import NO_CUTS, PADDING, transitions

_END = bytes(PADDING)


class TextBuffer:
    """
    Documents in one array of bytes, with what the compiled loops need to read it.

    PAPER: "Language Models are Unsupervised Multitask Learners", section 2.2.
    PAPER CONTEXT: A byte-level model reads UTF-8, so 256 symbols are enough for every text.
    INTUITION: One call for a thousand short documents costs what one call for a long one costs.
    IMPLEMENTATION: A zero byte between documents and `PADDING` behind them. `eights[i]` are the eight bytes from byte i
        on: a view of the same memory with a stride of one byte. A pattern without an automaton is applied here, and the
        pieces become the documents of the buffer; `groups[d]` says how many belong to document d.
    WHY: Comparing and hashing eight bytes at a time is what makes words as cheap as integers.
    """

    def __init__(self, texts: Iterable[str], pattern: str):
        cuts = transitions(pattern)
        self.groups = None
        if cuts is None:
            pieces = [split(text, pattern) for text in texts]
            self.groups = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
            texts = [piece for document in pieces for piece in document]
        self._fill([encode_utf8(text) for text in texts], NO_CUTS if cuts is None else cuts)

    @classmethod
    def of_pieces(cls, pieces: list[bytes]) -> "TextBuffer":
        """A buffer of bytes that are not to be cut."""
        buffer = cls.__new__(cls)
        buffer.groups = None
        buffer._fill(pieces, NO_CUTS)
        return buffer

    def _fill(self, documents: list[bytes], transitions: np.ndarray) -> None:
        """Lay the documents out."""
        self.transitions = transitions
        count = len(documents)
        self.lengths = np.fromiter(map(len, documents), dtype=np.int64, count=count)
        self.starts = np.zeros(count, dtype=np.int64)
        if count > 1:
            np.cumsum(self.lengths[:-1] + 1, out=self.starts[1:])
        buffer = b"\0".join([*documents, _END])
        self.data = np.frombuffer(buffer, dtype=np.uint8)
        self.eights = np.ndarray((len(buffer) - 7,), "<u8", buffer, strides=(1,))

    def document_ends(self, ends: np.ndarray) -> np.ndarray:
        """From the ends of the buffer's documents to those of the texts that were given."""
        if self.groups is None:
            return ends
        return np.concatenate([[0], ends])[np.cumsum(self.groups)]
