"""
Gate

This file implements what every request passes before anybody looks at it: who asks (API keys), how much (bodies,
requests at a time), and whether the house is still open (draining). What it refuses costs the engine nothing.
"""

import asyncio
import hmac
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from phase10_deployment.project28_serving.errors import ApiError, too_many, unavailable

OPEN = ("/health", "/metrics", "/docs", "/openapi.json")  # beginnings of paths that need no key, and are never refused


@dataclass(frozen=True)
class GateOptions:
    """Who may pass."""

    api_keys: tuple[str, ...] = ()  # none: everybody
    max_body: int = 4 * 2**20  # bytes
    max_per_key: int | None = None  # requests at a time with one key; without keys of one address


class Guests:
    """Who is being served, and whether more may come."""

    def __init__(self):
        self.draining = False
        self.inside: Counter[str] = Counter()  # requests being served, by who asks
        self._left = asyncio.Event()

    def enter(self, who: str) -> None:
        """A request is let in."""
        self.inside[who] += 1

    def leave(self, who: str) -> None:
        """A request is over."""
        self.inside[who] -= 1
        if not self.inside[who]:
            del self.inside[who]
        self._left.set()

    async def drained(self) -> None:
        """Let nobody in any more, and wait until the last one has left."""
        self.draining = True
        while self.inside:
            self._left.clear()
            await self._left.wait()


class Gate:
    """ASGI middleware around a whole app.

    Args:
        app: what is behind the gate; answered: called with (method, route, status) of every request.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: GateOptions,
        guests: Guests,
        answered: Callable[[str, str, int], None] | None = None,
    ):
        self.app, self.options, self.guests, self.answered = app, options, guests, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # the client left before there was any

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if scope["path"].startswith(OPEN):
                await self.app(scope, receive, sending)
            else:
                await self._guarded(scope, receive, sending)
        except Exception:  # a mistake of ours: the log has it, the client gets no part of it
            if status == 499:
                await ApiError(500, "internal error", code="internal_error").response(scope, receive, sending)
            status = 500
            raise
        finally:
            if self.answered:
                route = scope.get("route")
                self.answered(scope["method"], getattr(route, "path", "unknown"), status)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            who = self._who(scope)
            body = _Body(receive, self.options.max_body, scope)
        except ApiError as error:
            await error.response(scope, receive, send)
            return
        self.guests.enter(who)
        scope["guest"] = who  # for the scheduler's fairness
        try:
            await self.app(scope, body.receive, send)
        finally:
            self.guests.leave(who)

    def _who(self, scope: Scope) -> str:
        """Whose request this is; raises ApiError for one that may not pass."""
        keys, limit = self.options.api_keys, self.options.max_per_key
        if self.guests.draining:
            raise unavailable("the server is shutting down: ask another one", 5)
        given = key_of(scope)
        if keys and not known(given, keys):
            raise ApiError(401, "the API key is missing or wrong: send it as `Authorization: Bearer <key>`",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        who = given if keys else (scope.get("client") or ("",))[0]
        if limit is not None and self.guests.inside[who] >= limit:
            raise too_many(f"{limit} requests at a time are being served for you: wait for one of them",
                           "concurrent_requests")  # fmt: skip
        return who


class _Body:
    """What is received of a request, counted; raises HTTPException 413 where it gets too large."""

    def __init__(self, receive: Receive, limit: int, scope: Scope):
        self._receive, self._limit, self._size = receive, limit, 0
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            raise ApiError(413, f"the body has more than {limit} bytes", code="request_too_large")

    async def receive(self) -> Message:
        message = await self._receive()
        self._size += len(message.get("body", b""))
        if self._size > self._limit:  # FastAPI, which reads the body, lets no other error pass
            raise HTTPException(413, f"the body has more than {self._limit} bytes")
        return message


def key_of(scope: Scope) -> str:
    """The key that a request carries, or an empty text."""
    value = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
    kind, _, key = value.partition(" ")
    return key.strip() if kind.lower() == "bearer" else ""


def known(given: str, keys: Sequence[str]) -> bool:
    """Whether a key is one of these; takes as long for a wrong one as for a right one."""
    same = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
    return any(same)
