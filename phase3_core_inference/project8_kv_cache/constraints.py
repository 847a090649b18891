"""
Constraints

This file implements what a text may say next, as masks over the vocabulary, following:
- "Efficient Guided Generation for Large Language Models" (Willard & Louf, 2023) - a state for each text, and for each
  state the tokens that are allowed
- "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models" (Dong et al., 2024) -
  masks of bits, which are cheap to keep and to send

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from phase3_core_inference.project8_kv_cache.buffers import on_device


class Constraint(Protocol):
    """What one text may say next; it is told of every token that becomes part of the text.

    A grammar, a schema or a list of answers stands behind it: such a machine is a library's work (project 28).
    """

    finished: bool  # whether nothing may follow: the text ends then

    def allowed(self) -> np.ndarray:
        """The tokens that may come now, a bit for each: (words,) int32, token t is bit t % 32 of word t // 32."""
        ...

    def accept(self, token: int) -> None:
        """Go on to the state behind this token, which was allowed."""
        ...


def bits_of(tokens: Sequence[int], vocab_size: int) -> np.ndarray:
    """The mask of some tokens, as `Constraint.allowed` gives it.

    >>> bits_of([0, 3, 33], 40).tolist()
    [9, 2]
    """
    allowed = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    allowed[list(tokens)] = 1
    return np.packbits(allowed, bitorder="little").view(np.int32)


def mask_logits(logits: Tensor, places: Sequence[int], constraints: Sequence[Constraint]) -> Tensor:
    """Logits (R, V) with -inf for what may not come, in the rows at these places.

    PAPER: "Efficient Guided Generation for Large Language Models", arXiv:2307.09702, section 3; "XGrammar: Flexible and
        Efficient Structured Generation Engine for Large Language Models", arXiv:2411.15100.
    PAPER CONTEXT: tokens that would leave the language are masked before sampling, so that every text belongs to it.
    INTUITION: a form with boxes: whatever the hand wants to write, only what fits into the next box can be written.
    IMPLEMENTATION: the masks are made on the host, travel as bits, 32 tokens a word, and are unpacked on the device.
    WHY: the model stays free in everything that the form leaves open, and no answer has to be thrown away.

    Raises ValueError for a constraint that has not finished and allows nothing.
    """
    masks = np.stack([np.asarray(constraint.allowed(), dtype=np.int32) for constraint in constraints])
    if not masks.any(axis=1).all():
        raise ValueError("a constraint allows no token and has not finished: its grammar leads into a dead end")
    words, where = on_device(masks, logits.device, np.int32), on_device(places, logits.device)
    bits = (words.unsqueeze(-1) >> torch.arange(32, device=logits.device)) & 1
    allowed = bits.flatten(1)[:, : logits.shape[-1]].bool()
    return logits.index_copy(0, where, logits[where].masked_fill(~allowed, -torch.inf))
