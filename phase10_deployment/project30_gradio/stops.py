"""
Stops

This file implements breaking off what is being written, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - a conversation, in which
  the user speaks when the answer is over, or before

Each component is explained with paper references for educational purposes.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeVar

T = TypeVar("T")


async def until(stop: asyncio.Event, source: AsyncIterator[T]) -> AsyncIterator[T]:
    """What comes, until it ends or somebody says stop; then the source is closed, not only left.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.5; that an
        answer may be broken off is practice.
    PAPER CONTEXT: the user's turn begins when the answer is over.
    INTUITION: hang up, instead of laying the receiver on the table.
    IMPLEMENTATION: wait for the next piece and for the word at the same time; `aclose` runs the source's `finally`.
    WHY: a generator that is merely dropped is closed whenever the garbage collector comes by, and writes on until then.
    """
    word = asyncio.ensure_future(stop.wait())
    try:
        while not stop.is_set():
            coming = asyncio.ensure_future(anext(source))
            try:
                await asyncio.wait({coming, word}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not coming.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
            if coming.cancelled():
                return
            try:
                piece = coming.result()
            except StopAsyncIteration:
                return
            yield piece
    finally:
        word.cancel()
        await source.aclose()


class Stops:
    """Who may be told to stop: in each browser tab one text of a kind.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.5.
    PAPER CONTEXT: one conversation, one speaker at a time.
    INTUITION: a cord beside each bed; the bell that rings is the own one.
    IMPLEMENTATION: an event by (session, kind), there as long as its block. `end` waits until it is gone, so that what
        the block still had to say is said before anything else happens.
    WHY: nothing is written for somebody who has left, and no late answer falls into a new conversation.
    """

    def __init__(self):
        self._events: dict[tuple[str, str], asyncio.Event] = {}

    @contextlib.contextmanager
    def begin(self, session: str, kind: str):
        """Within this block `stop` sets the event that it gives; an earlier one of this kind is told to stop."""
        self.stop(session, kind)
        event = self._events[session, kind] = asyncio.Event()
        try:
            yield event
        finally:
            if self._events.get((session, kind)) is event:
                del self._events[session, kind]

    def busy(self, session: str, kind: str) -> bool:
        """Whether something is being written."""
        return (session, kind) in self._events

    def stop(self, session: str, kind: str | None = None) -> None:
        """End what a session has begun, of one kind or of all."""
        for (whose, what), event in self._events.items():
            if whose == session and kind in (None, what):
                event.set()

    async def end(self, session: str, kind: str, seconds: float = 5.0) -> None:
        """The same, and wait until it has ended."""
        self.stop(session, kind)
        for _ in range(int(seconds / 0.02)):
            if not self.busy(session, kind):
                return
            await asyncio.sleep(0.02)
