"""
Streaming

This file implements answers that end when their client does: a stream of events, and a wait that is given up. Both
listen to the connection while they work, so that nobody writes for somebody who has left.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class ClientGoneError(Exception):
    """Nobody is left to be answered."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled if the client leaves; raises ClientGoneError then."""
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGoneError
        return job.result()
    finally:
        await _cancel(job, gone)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future) -> None:
    """End these tasks, and wait until they have cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, as they come.

    Args:
        parts: events as bytes, several together if they came together; ended: called whatever happens, also to a
            client who leaves before the first part was asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncIterator[bytes], ended: Callable[[], None]):
        super().__init__()
        self.parts, self.ended = parts, ended
        del self.headers["content-length"]  # nobody knows it
        self.headers["Cache-Control"] = "no-cache"
        self.headers["X-Accel-Buffering"] = "no"  # a proxy must not wait until it is over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send what comes until it ends, or until the client leaves."""
        job, gone = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                job.result()
        finally:
            self.ended()
            await _cancel(job, gone)
            await self.parts.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
