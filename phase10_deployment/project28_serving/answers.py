"""
Answers

This file implements what whoever asked an engine reads: pieces of texts as they come, following:
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - a frontend bounds what it waits
  for

Each component is explained with paper references for educational purposes.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from phase3_core_inference.project8_kv_cache.texts import Piece
from phase10_deployment.project28_serving.worker import Ask


class UnavailableError(Exception):
    """There is no engine that could answer now; the message says why."""


class RefusedError(ValueError):
    """The engine cannot write this text; the message says why."""


MANY = 256  # pieces that are looked at in one go, so that other streams need not wait


@dataclass
class Clock:
    """When a text got its newest token, and how many it has: for metrics."""

    last: float = 0.0
    n_tokens: int = 0


class Answers:
    """What becomes of some texts that were asked for together.

    PAPER: "Clipper: A Low-Latency Online Prediction Serving System", arXiv:1612.03079, section 4.3.
    PAPER CONTEXT: a frontend must bound what it waits for, and what waits for it.
    INTUITION: a letterbox: whoever comes rarely finds more letters, and the postman never waits.
    IMPLEMENTATION: iterating gives all pieces that have come since, at least one: [(which text, Piece)]. A reader that
        is slow gets the same text in fewer helpings; what can pile up is bounded by the length of the texts.
    WHY: neither the engine nor another user waits for a slow connection.

    Args:
        asks: what was asked for; whole: wake the reader when all is there, or many pieces, and no sooner.

    Raises UnavailableError where the engine broke, and RefusedError where a text cannot be written.
    """

    def __init__(self, asks: Sequence[Ask], whole: bool = False):
        self.whole = whole
        self.asks, self.left, self.untaken = list(asks), len(asks), len(asks)
        self.found = [0] * len(asks)  # tokens of each prompt that lay in the cache already
        self.began, self.clocks = time.monotonic(), [Clock() for _ in asks]
        self._waiting: deque[tuple[int, Piece]] = deque()
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def take(self) -> None:
        """One of the texts is queued."""
        self.untaken -= 1
        self._news.set()

    def put(self, place: int, piece: Piece) -> None:
        """A piece has come for one of the texts."""
        self._waiting.append((place, piece))
        self.left -= piece.finish_reason is not None
        if not (self.whole and self.left) or len(self._waiting) >= MANY:
            self._news.set()

    def fail(self, error: Exception) -> None:
        """Nothing will come any more."""
        self._error = self._error or error
        self._news.set()

    async def taken(self) -> None:
        """Wait until all texts are queued, which takes a step at most: then they will be written."""
        while self.untaken and not self._error:
            await self._news.wait()
            self._news.clear()
        if self._error:
            raise self._error

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        while self.left or self._waiting:
            while (self.left and len(self._waiting) < MANY if self.whole else not self._waiting) and not self._error:
                await self._news.wait()
                self._news.clear()
            pieces = list(self._waiting)
            self._waiting.clear()
            if pieces:
                yield pieces
            if self._error:
                raise self._error
