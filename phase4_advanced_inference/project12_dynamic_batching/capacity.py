"""
Capacity

This file implements where requests have their keys and values, and how many fit, following:
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - slots: memory for the
  longest text is reserved before a request is admitted
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - what must be
  asked of a memory that is given out as texts grow

Each component is explained with paper references for educational purposes.
"""

from typing import Protocol

from phase3_core_inference.project8_kv_cache.generation import Prefixes
from phase3_core_inference.project8_kv_cache.kv_cache import KVCache
from phase4_advanced_inference.project12_dynamic_batching.request import ABORTED, Request


class Capacity(Protocol):
    """What the scheduler must know of memory; slots here, blocks in project 13."""

    step_limit: int  # the most new tokens of a row in one step

    def check(self, request: Request) -> None:
        """Raise ValueError if a request can never fit."""
        ...

    def admit(self, request: Request) -> bool:
        """Give a request a row, in which it may `begin` with what is known of its text already; False: not now."""
        ...

    def grow(self, request: Request, n: int) -> bool:
        """Make sure that the next n tokens of a request have room; False: there is none."""
        ...

    def preempt(self, request: Request) -> None:
        """Take the row of a request that will come back, and set `fed` to what it need not read again."""
        ...

    def release(self, request: Request) -> None:
        """Take the row of a request that has ended."""
        ...


class Slots:
    """A row of the cache for each request, as long as the longest text.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 4.2.
    PAPER CONTEXT: slots for a request's keys and values are reserved for its whole length before it first runs.
    INTUITION: a hotel that gives everybody a suite: nobody must ever move, and most rooms stay empty.
    IMPLEMENTATION: a free row is all that an admission needs; growing always works, so nobody is preempted for memory.
    WHY: the simplest capacity, for any cache of project 8. What it wastes is what project 13 is about.

    Args:
        cache: gives the rows; prefixes: what remembers texts (project 10's PromptCache).
    """

    def __init__(self, cache: KVCache, prefixes: Prefixes | None = None):
        self.cache, self.prefixes = cache, prefixes
        self._free = list(range(len(cache.lengths)))[::-1]  # the lowest rows first: plans like rows side by side

    @property
    def step_limit(self) -> int:
        """The most new tokens of a row in one step."""
        return self.cache.step_limit

    def check(self, request: Request) -> None:
        """Raise ValueError if a request can never fit."""
        if request.limit > self.cache.capacity:
            raise ValueError(f"a text of {request.limit} tokens will never fit in rows of {self.cache.capacity}")

    def admit(self, request: Request) -> bool:
        """Give a request a row, if one is free."""
        if not self._free:
            return False
        request.row = self._free.pop()
        known = 0
        if self.prefixes is not None:
            known = self.prefixes.restore(self.cache, request.row, request.keys())
        request.begin(known)
        return True

    def grow(self, request: Request, n: int) -> bool:
        """There is room: it was reserved."""
        return True

    def preempt(self, request: Request) -> None:
        """Take the row; the text is read anew when it comes back."""
        self.release(request)
        request.fed = 0

    def release(self, request: Request) -> None:
        """Take the row; what was read stays with `prefixes`, unless a step may have failed in between."""
        if self.prefixes is not None and request.finish_reason != ABORTED:
            known = min(self.cache.lengths[request.row], len(request.tokens))
            self.prefixes.keep(self.cache, request.row, request.keys(known))
        self.cache.free(request.row)
        self._free.append(request.row)
        self._free.sort(reverse=True)
        request.row = None


class GangSlots(Slots):
    """Slots that are given out together and come back together: static batching, to be compared with.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 2.
    PAPER CONTEXT: with request-level scheduling a batch runs until all of its requests have ended; those that end early
        wait, and new ones wait for the whole batch.
    INTUITION: the coach leaves when it is full or nobody else is at the stop, and takes nobody on the way.
    IMPLEMENTATION: doors open when nobody is left, and close at the first decode. Texts that have ended are not
        computed any further, which is kinder to this policy than padding them would be.
    WHY: the same loop, the same kernels: what differs in the benchmark is the policy alone.
    """

    _boarding = True

    def admit(self, request: Request) -> bool:
        """Give a request a row, if the batch has not left."""
        return self._boarding and super().admit(request)

    def grow(self, request: Request, n: int) -> bool:
        """There is room; from the first decode on nobody is let in."""
        self._boarding = self._boarding and request.reading
        return True

    def release(self, request: Request) -> None:
        """Take the row; the last one opens the doors."""
        super().release(request)
        self._boarding = len(self._free) == len(self.cache.lengths)
