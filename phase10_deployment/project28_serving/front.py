"""
Front

This file implements what clients of several replicas talk to, following:
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - one interface before many model
  containers, which outlives any of them

Each component is explained with paper references for educational purposes.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from phase10_deployment.project28_serving import errors
from phase10_deployment.project28_serving.errors import unavailable
from phase10_deployment.project28_serving.gate import Gate, GateOptions, Guests
from phase10_deployment.project28_serving.replica import sent_by
from phase10_deployment.project28_serving.routing import beginning_of

ASKED = 5.0  # seconds for all replicas to say how they are


class Front:
    """One door for all replicas.

    PAPER: "Clipper: A Low-Latency Online Prediction Serving System", arXiv:1612.03079, section 3.
    PAPER CONTEXT: applications see one interface; behind it queries go to containers by a small RPC system.
    INTUITION: a switchboard: it reads enough of a call to know whom to ring up, then only passes on what is said.
    IMPLEMENTATION: the gate of a single server stands before it: keys, bodies and requests at a time are checked once
        for all replicas. Then the body is read, the router chooses, and every message of the replica's app goes out as
        it is. Requests of a replica that dies are answered with 503, or an error at the end of their stream.
    WHY: Ray's own proxy routes by path and header alone; what begins alike can be seen in the body only.

    Args:
        replicas: Ray Serve's handle of `Replica`; gate, origins: as of `ServerOptions`; patience: seconds that a
            request waits for a replica to take it.
    """

    def __init__(self, replicas, gate: GateOptions, origins: Sequence[str] = (), patience: float = 10.0):
        self.replicas, self.gate, self.origins, self.patience = replicas, gate, origins, patience
        self.guests = Guests()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app that Ray Serve runs for this class."""
        app = FastAPI(openapi_url=None, docs_url=None)
        errors.install(app)
        app.get("/health")(self.ready)
        app.get("/health/ready")(self.ready)
        app.get("/health/live")(self.live)
        app.get("/metrics")(self.page)
        app.mount("/", self.forward)
        app.add_middleware(Gate, options=self.gate, guests=self.guests)
        if self.origins:
            app.add_middleware(CORSMiddleware, allow_origins=list(self.origins), allow_methods=["*"],
                               allow_headers=["*"])  # fmt: skip
        return app

    async def forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request to a replica, and on what it says; raises ApiError 503 where none takes it."""
        body = await _read(receive)
        letter = sent_by(scope, body, beginning_of(body))
        answer = self.replicas.options(stream=True, method_name="answer").remote(letter)
        passing = _Passing(send)
        try:
            try:
                [taken] = await asyncio.wait_for(anext(answer), self.patience)
            except TimeoutError:
                raise unavailable("no replica takes a request now: they start, or have too much to do", 5) from None
            passing.headers = [(b"x-replica", taken["by"].encode())]
            async for messages in answer:
                for message in messages:
                    await passing(message)
        except _lost() as error:
            await passing.fail(error)
        finally:
            answer.cancel()  # of no effect where it is complete

    async def ready(self) -> JSONResponse:
        """GET /health and /health/ready: whether some replica would serve a request now, and how each of them is."""
        found = dict(await self._ask("health"))
        ready = not self.guests.draining and any(each["status"] == "ready" for each in found.values())
        status = "draining" if self.guests.draining else "ready" if ready else "unavailable"
        return JSONResponse({"status": status, "replicas": found}, 200 if ready else 503)

    async def live(self) -> dict[str, str]:
        """GET /health/live: whether there is hope without a restart of the whole; Ray looks after its parts."""
        return {"status": "live"}

    async def page(self) -> Response:
        """GET /metrics: those of all replicas, each with its name."""
        from prometheus_client import CONTENT_TYPE_LATEST

        return Response(labelled(dict(await self._ask("metrics"))), media_type=CONTENT_TYPE_LATEST)

    async def drain(self) -> None:
        """Let nobody in any more, and wait until the last one has left."""
        await self.guests.drained()

    async def _ask(self, method: str) -> list[Any]:
        """What the replicas say; nothing as long as one keeps silent, which Ray will soon replace."""
        with contextlib.suppress(TimeoutError, *_lost()):
            told = await self.replicas.broadcast(method).results_async(timeout_s=ASKED, return_exceptions=True)
            return [each for each in told if not isinstance(each, BaseException)]
        return []


class _Passing:
    """Messages of a replica on their way out."""

    def __init__(self, send: Send):
        self._send, self.headers, self._begun, self._stream = send, [], False, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            self._stream = any(value.startswith(b"text/event-stream") for _, value in message["headers"])
            message = message | {"headers": [*message["headers"], *self.headers]}
        await self._send(message)

    async def fail(self, error: Exception) -> None:
        """The replica is gone: say so, in the form that its answer has by now."""
        told = unavailable(f"the replica that served this request is gone: {type(error).__name__}")
        if not self._begun:
            raise told
        if not self._stream:
            raise error  # which closes the connection: its client sees that something is missing
        await self._send({"type": "http.response.body", "body": b"data: " + told.response.body + b"\n\n"})


def labelled(pages: Mapping[str, bytes]) -> bytes:
    """Pages of metrics as one: each series gets the label `replica`, each name stands once.

    >>> page = b"# HELP texts Texts\\n# TYPE texts gauge\\ntexts 2.0\\n"
    >>> print(labelled({"a": page, "b": page}).decode().strip())
    # HELP texts Texts
    # TYPE texts gauge
    texts{replica="a"} 2.0
    texts{replica="b"} 2.0
    """
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    families = {}
    samples = defaultdict(list)
    for name, page in pages.items():
        for family in text_string_to_metric_families(page.decode()):
            families.setdefault(family.name, family)
            samples[family.name] += [each._replace(labels={"replica": name} | each.labels) for each in family.samples]
    for name, family in families.items():
        family.samples = samples[name]
    registry = CollectorRegistry()
    registry.register(_Pages(list(families.values())))
    return generate_latest(registry)


class _Pages:
    """Families of metrics, as prometheus_client collects them."""

    def __init__(self, families: list):
        self.families = families

    def collect(self) -> list:
        return self.families


async def _read(receive: Receive) -> bytes:
    """The whole body of a request."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise asyncio.CancelledError
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _lost() -> tuple[type[Exception], ...]:
    """What Ray raises for replicas that are not there any more, and for those that never were."""
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    return RayError, RayServeException
