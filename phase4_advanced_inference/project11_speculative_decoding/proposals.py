"""
Proposals

This file implements what a draft is asked and what it answers, whoever it is, following:
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - any model, or none, may guess
- "Accelerating Large Language Model Decoding with Speculative Sampling" (Chen et al., 2023) -
  what is judged: tokens, and the odds that they were drawn from

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from phase3_core_inference.project8_kv_cache.buffers import on_device


@dataclass(frozen=True)
class Ask:
    """One row that wants a guess."""

    row: int
    tokens: Sequence[int]  # the text so far; it grows afterwards, so keep a copy of what you need
    most: int  # tokens to propose at most; may be 0


class Proposal:
    """What was guessed, row by row in the order that was asked; it may still be on its way.

    PAPER: "Accelerating Large Language Model Decoding with Speculative Sampling", arXiv:2302.01318, section "Modified
        Rejection Sampling"; that nobody waits for the guess is practice.
    PAPER CONTEXT: the target scores all drafted tokens, and then it is decided which of them stay.
    INTUITION: a sealed letter: how long it is can be felt, so the reader may get ready before it is opened.
    IMPLEMENTATION: how many tokens each row has is known at once; which ones, a GPU may be told before the host is.
    WHY: the target's step is planned and launched while the draft still runs; the host waits once a step.

    Args:
        drafted: (R, K) tokens; behind a row's own there is anything that is a token.
        counts: how many of them are each row's own.
        odds: (R, K, V), what each was drawn from; None: nothing was drawn, it is certain.
    """

    def __init__(self, drafted: Tensor, counts: Sequence[int], odds: Tensor | None = None):
        self.drafted, self.counts, self.odds = drafted, list(counts), odds
        self._tokens: list[list[int]] | None = None

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]]) -> "Proposal":
        """What was guessed on the host.

        >>> Proposal.of([[5, 6], []]).drafted.tolist()
        [[5, 6], [0, 0]]
        """
        counts = [len(row) for row in tokens]
        width = max(counts, default=0)
        filled = [[*row, *[0] * (width - len(row))] for row in tokens]
        proposal = cls(torch.tensor(filled, dtype=torch.long).view(len(counts), width), counts)
        proposal._tokens = [list(row) for row in tokens]
        return proposal

    @property
    def known(self) -> bool:
        """Whether the host knows the tokens already."""
        return self._tokens is not None

    @property
    def tokens(self) -> list[list[int]]:
        """Each row's own tokens, on the host: waits for them."""
        if self._tokens is None:
            self._tokens = [row[:n] for row, n in zip(self.drafted.tolist(), self.counts)]
        return self._tokens

    def pick(self, places: Sequence[int], counts: Sequence[int]) -> "Proposal":
        """Some of the rows, and so many of the tokens of each."""
        index = on_device(places, self.drafted.device)
        picked = Proposal(self.drafted[index], counts, None if self.odds is None else self.odds[index])
        if self._tokens is not None:
            picked._tokens = [self._tokens[place][:n] for place, n in zip(places, counts)]
        return picked

    def behind(self, newest: Sequence[int], widths: Sequence[int]) -> list[int] | Tensor:
        """The newest token of each row, and its draft, cut or filled up to so many tokens in all; row behind row.

        A list if the tokens are known, else a tensor (sum of widths,) where they are.
        """
        if self._tokens is not None:
            rows = ([token, *draft, *[token] * (n - 1 - len(draft))][:n] for token, draft, n in
                    zip(newest, self._tokens, widths))  # fmt: skip
            return [token for row in rows for token in row]
        table = torch.cat([on_device(newest, self.drafted.device).unsqueeze(-1), self.drafted], dim=-1)
        most = max(widths)
        table = F.pad(table, (0, max(most - table.shape[-1], 0)))[:, :most].flatten()
        if min(widths) == most:
            return table
        return table[on_device([i * most + j for i, n in enumerate(widths) for j in range(n)], table.device)]


# draw(logits (R, V), rows, positions, drafted so far (R, j)) -> (tokens (R,), the odds (R, V) they were drawn from, or
# None), all of it on the device: nobody waits for it
Draw = Callable[[Tensor, Sequence[int], Sequence[int], Tensor], tuple[Tensor, Tensor | None]]


class Draft(Protocol):
    """Who guesses what comes next; right or wrong, the text stays the target's.

    A draft that draws must draw each token from the odds that it reports, by the `draw` that it is given. How many it
    proposes may depend on the text and on what it has drafted, but not on a token that it then withholds.
    """

    def prepare(self, n_rows: int, capacity: int, vocab_size: int) -> None:
        """Get ready for so many texts of so many tokens; ValueError for a vocabulary that it does not know."""
        ...

    def propose(self, asks: Sequence[Ask], draw: Draw) -> Proposal:
        """Guess what comes after each text; a tensor holds tokens alone, also behind a row's own."""
        ...

    def free(self, row: int) -> None:
        """Forget a row."""
        ...
