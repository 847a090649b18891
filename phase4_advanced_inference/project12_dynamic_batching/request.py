"""
Request

This file implements a text that is written in a batch which others share following:
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - requests with a state
  of their own, picked anew for every iteration

Each component is explained with paper references for educational purposes.
"""

import random

from phase3_core_inference.project8_kv_cache.texts import TextRequest

ABORTED = "abort"  # the finish_reason of a request that was called off


class Request(TextRequest):
    """A text on its way through a batch that others share.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 4.2.
    PAPER CONTEXT: the scheduler keeps every request with its state, and picks some of them for each iteration.
    INTUITION: a guest with a ticket: served so far, still hungry, and at table or in the queue.
    IMPLEMENTATION: project 8's `TextRequest` with a row while it runs, what it may claim, and its own seed. `pending`
        counts tokens that were drawn on the device and that the host has not read yet; `fed` those that steps were
        planned for, whether or not they are over.
    WHY: with the seed its own, and noise that counts positions, neighbours and preemption change nothing of its text.

    Args:
        priority: higher ones go first; user: whose it is, for fairness; others as of `TextRequest`.
        space: texts of one may share keys and values, as those of one adapter; texts of two never do. Below 2**32.
    """

    def __init__(self, index, prompt, params, tokenizer, room, priority: int = 0, user: str = "", space: int = 0):
        super().__init__(index, prompt, params, tokenizer, room)
        if not 0 <= space < 2**32:
            raise ValueError(f"space={space} must be from 0 to 2**32 - 1: 0 where all texts may share")
        self.priority, self.user, self.space = priority, user, space
        self.seed = random.getrandbits(62) if params.seed is None else params.seed
        self.n_prompt = len(self.tokens)
        self.row: int | None = None  # of the cache
        self.pending = 0
        self.stale = 0  # tokens drawn behind one that had to be drawn again: they will be ignored
        self.whole = False  # it draws from all tokens: candidates were not enough
        self.draft: list[int] = []  # guesses that the next step is to check (project 11)
        self.queued = self.waited = 0  # the step in which it came into the queue; steps that it waited there
        self.level = priority  # with what waiting had brought when it was let in
        self.kept = None  # what a capacity remembers of it while it is preempted
        self.found = 0  # tokens that lay in the cache when it was let in for the first time
        self._new = True

    @property
    def parts(self) -> tuple[list[int], list[int]]:
        """The prompt, and what was written behind it."""
        return self.tokens[: self.n_prompt], self.tokens[self.n_prompt :]

    def begin(self, known: int) -> None:
        """It has a row, in which so many of its tokens lie already."""
        self.fed = known
        if self._new:
            self.found, self._new = known, False

    def keys(self, stop: int | None = None) -> list[int]:
        """The tokens up to `stop` as a tree of beginnings knows them: in another space the same token is another one.

        >>> from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
        >>> from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
        >>> [Request(0, [5, 6, 7], SamplingParams(), NumberTokenizer(9), 64, space=s).keys(-1) for s in (0, 1)]
        [[5, 6], [4294967301, 4294967302]]
        """
        tokens = self.tokens[:stop]
        return [token + (self.space << 32) for token in tokens] if self.space else tokens

    @property
    def unread(self) -> int:
        """Tokens of the text, known to the host or not, that the model has not read."""
        return len(self.tokens) + self.pending - self.fed

    @property
    def reading(self) -> bool:
        """Whether more than the newest token has yet to be read."""
        return self.unread > 1 or not self.fed

    @property
    def waits(self) -> bool:
        """Whether its next token must not be planned yet: what may come depends on one that the host has not read."""
        return self.constraint is not None and self.pending > 0

    @property
    def complete(self) -> bool:
        """Whether its last token has been drawn already, so that no step needs it."""
        return len(self.tokens) + self.pending >= self.limit

    def next_tokens(self, n: int) -> list[int]:
        """The next n tokens that it reads, guesses among them; -1: one that only the device knows."""
        tokens = self.tokens[self.fed : self.fed + n]
        if len(tokens) == n:
            return tokens
        if self.pending and len(tokens) < n:
            tokens.append(-1)
        return tokens + self.draft[: n - len(tokens)]
