"""
Replica

This file implements one of several servers that hold the same model, following:
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - model containers are replicated,
  on one machine and across many

Each component is explained with paper references for educational purposes.
"""

import asyncio
import functools
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

CARRIED = ("method", "scheme", "http_version", "path", "raw_path", "query_string", "headers", "client", "server")


@dataclass(frozen=True)
class Letter:
    """A request on its way to a replica."""

    scope: dict[str, Any]  # those parts of ASGI's that are plain values
    body: bytes
    text: str  # by which it is routed


def sent_by(scope: dict[str, Any], body: bytes, text: str) -> Letter:
    """The request of an ASGI scope."""
    return Letter({name: scope[name] for name in CARRIED if name in scope}, body, text)


class Replica:
    """A server of project 28 without a socket: requests come as letters, answers leave as messages of ASGI.

    PAPER: "Clipper: A Low-Latency Online Prediction Serving System", arXiv:1612.03079, section 4.4.1.
    PAPER CONTEXT: Clipper replicates model containers, locally and across a cluster, to gain throughput; each has a
        queue of its own and adapts its batches by itself.
    INTUITION: a branch of a shop: same shelves, same forms, another street.
    IMPLEMENTATION: the app of `create_app` with its engine, called as a web server would call it. What it sends is
        handed on as it comes, in one piece whatever came together. Whoever stops reading ends the request, as a closed
        connection would.
    WHY: replicas share nothing, so any of them can be lost, added or moved.

    Args:
        engine: its EngineOptions; options: its ServerOptions; name: how it is called; Ray Serve awaits the constructor.
        Raises UnavailableError where the engine cannot be started.
    """

    async def __init__(self, engine, options, name: str | None = None):
        from phase10_deployment.project28_serving.client import EngineClient
        from phase10_deployment.project28_serving.engine import build_engine
        from phase10_deployment.project28_serving.server import create_app

        self.name = name or _name()
        self.client = EngineClient(functools.partial(build_engine, engine))
        self.app = create_app(self.client, options)
        await self.client.start()
        await self.client.ready()  # Ray sends nothing before this

    async def answer(self, letter: Letter) -> AsyncIterator[list[dict[str, Any]]]:
        """What the app says to a letter, as it comes; first of all, who answers."""
        yield [{"type": "taken", "by": self.name}]
        said: asyncio.Queue = asyncio.Queue()
        work = asyncio.ensure_future(self.app(_scope(letter), _Reading(letter.body), said.put))
        work.add_done_callback(lambda _: said.put_nowait(None))
        try:
            going = True
            while going:
                messages = [await said.get()]
                while not said.empty():
                    messages.append(said.get_nowait())
                going = messages[-1] is not None
                yield [message for message in messages if message is not None]
            await work  # raises what the app raised
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def health(self) -> tuple[str, dict[str, Any]]:
        """Its name, and how things stand."""
        return self.name, self.app.state.server.health() | {"process": os.getpid()}

    async def metrics(self) -> tuple[str, bytes]:
        """Its name, and its page for Prometheus."""
        return self.name, (await self.app.state.server.page()).body

    async def check_health(self) -> None:
        """Ray Serve asks now and then, and puts another replica in the place of one that raises."""
        from phase10_deployment.project28_serving.client import BROKEN

        if self.client.state == BROKEN:
            raise RuntimeError(f"the engine was given up: {self.client.reason}")

    async def __del__(self):
        await self.client.stop()


class _Reading:
    """What an app receives of a letter: its body, and then nothing until it is cancelled."""

    def __init__(self, body: bytes):
        self.body: bytes | None = body

    async def __call__(self) -> dict[str, Any]:
        if self.body is None:
            await asyncio.Event().wait()
        body, self.body = self.body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _scope(letter: Letter) -> dict[str, Any]:
    return {"type": "http", "asgi": {"version": "3.0"}, "root_path": "", **letter.scope}


def _name() -> str:
    """What Ray calls this replica."""
    from ray import serve

    return serve.get_replica_context().replica_id.unique_id
