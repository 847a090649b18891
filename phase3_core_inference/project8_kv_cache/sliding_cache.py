"""
Sliding cache

This file implements a cache that forgets what its layers cannot see following:
- "Longformer: The Long-Document Transformer" (Beltagy et al., 2020) - sliding windows
- "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context" (Dai et al., 2019) - a memory of fixed
  length

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

from phase1_foundation.project3_pretrain.plans import LayerSpec
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache
from phase3_core_inference.project8_kv_cache.work import Work


class SlidingCache(ContiguousCache):
    """A ring for each layer with a window, full length for the others.

    PAPER: "Longformer: The Long-Document Transformer", arXiv:2004.05150, section 3.1; "Transformer-XL: Attentive
        Language Models Beyond a Fixed-Length Context", arXiv:1901.02860, section 3.2 (a memory of M states).
    PAPER CONTEXT: a query sees the last w tokens only; what lies further back is never read again.
    INTUITION: a carousel of w seats: the newest guest takes the seat of the one who has left the picture.
    IMPLEMENTATION: position p lies at slot p mod ring. A step writes its n tokens first and then reads, so the ring has
        window + chunk - 1 slots: what the first of n <= chunk queries sees still lies there after the last was written.
    WHY: memory and reading of these layers stay the same however long the text becomes.

    Args:
        chunk: the most new tokens of a row in one step; longer prompts come in several. A row that went round can be
            truncated by up to chunk - 1 tokens: what is further back has been overwritten.

    Others as in `ContiguousCache`; raises ValueError where a step or a truncation exceeds `chunk`.
    """

    def __init__(self, specs: Sequence[LayerSpec], n_rows: int, capacity: int, *args, chunk: int = 128, **options):
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1: the most new tokens of a row in one step")
        self.chunk, self._written = chunk, [0] * n_rows  # the furthest that each row was ever written
        super().__init__(specs, n_rows, capacity, *args, **options)
        self._ring = min((store.n_slots for store in self.stores), default=capacity)

    @property
    def step_limit(self) -> int:
        """The most new tokens of a row in one step."""
        return self.chunk

    def read_tokens(self, row: int, start: int, stop: int) -> list:
        """Refused: what a ring has lost cannot be given away."""
        raise ValueError("a SlidingCache does not keep the beginnings of texts: use a ContiguousCache")

    def append_tokens(self, row: int, layers) -> None:
        """Refused, as `read_tokens`."""
        raise ValueError("a SlidingCache does not take over the beginnings of texts: use a ContiguousCache")

    def _slots(self, spec: LayerSpec) -> int:
        return self.capacity if spec.window is None else min(self.capacity, spec.window + self.chunk - 1)

    def _check(self, work: Work) -> None:
        for row, n_new, _ in work:
            if n_new > self.chunk and self.lengths[row] + n_new > self._ring:
                raise ValueError(f"row {row}: {n_new} new tokens exceed chunk={self.chunk}, beyond which a window "
                                 f"would lose what it still sees: pass them in several steps")  # fmt: skip

    def _advance(self, row: int, length: int) -> None:
        super()._advance(row, length)
        self._written[row] = max(self._written[row], length)

    def truncate(self, row: int, length: int) -> None:
        """Undo what came after the first `length` tokens, as far as they are still there."""
        written = self._written[row] if 0 <= row < len(self.lengths) else 0
        if length and written > self._ring and written - length >= self.chunk:
            raise ValueError(f"row {row} cannot be truncated to {length} tokens: {written} were written, and what a "
                             f"window saw {self.chunk} or more back is overwritten (chunk={self.chunk}): free the row "
                             f"and pass its tokens again")  # fmt: skip
        super().truncate(row, length)
        if not length:
            self._written[row] = 0
