"""
Server

This file implements an OpenAI-compatible interface before an engine following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - a frontend
  with OpenAI's interface, in which requests have parameters of their own
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - a frontend that stays up when a
  model does not

Each component is explained with paper references for educational purposes.
"""

import asyncio
import base64
import contextlib
import struct
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response

from phase10_deployment.project28_serving import errors
from phase10_deployment.project28_serving.answers import Answers, RefusedError, UnavailableError
from phase10_deployment.project28_serving.asking import Asking, Limits
from phase10_deployment.project28_serving.choices import Choice
from phase10_deployment.project28_serving.client import BROKEN, READY, EngineClient
from phase10_deployment.project28_serving.embedding import embed
from phase10_deployment.project28_serving.errors import ApiError, ErrorBody, bad_request, too_many, unavailable
from phase10_deployment.project28_serving.gate import Gate, GateOptions, Guests
from phase10_deployment.project28_serving.metrics import create_metrics
from phase10_deployment.project28_serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Sampling,
    TokenizeRequest,
)
from phase10_deployment.project28_serving.shapes import DONE, ChatShape, CompletionShape, Usage, event
from phase10_deployment.project28_serving.streaming import ClientGoneError, EventStream, while_connected
from phase10_deployment.project28_serving.tracing import note, trace_requests
from phase10_deployment.project28_serving.worker import Ask


@dataclass(frozen=True)
class ServerOptions:
    """What a server is told beside its engine."""

    name: str = "model"  # by which clients call it
    max_waiting: int = 256  # texts in the queue; more are refused
    gate: GateOptions = field(default_factory=GateOptions)
    limits: Limits = field(default_factory=Limits)
    origins: tuple[str, ...] = ()  # web pages that may ask from a browser
    traces: bool = False  # by OpenTelemetry


class Server:
    """Everything between a request and the engine.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
        section 5.
    PAPER CONTEXT: the frontend extends OpenAI's interface, with sampling parameters for each request.
    INTUITION: a counter with many windows: every form is read, stamped or handed back, and who leaves is struck off.
    IMPLEMENTATION: one asyncio task a request. Asking says what is wanted, the client brings pieces, Choice and the
        shapes make objects of them; streamed or whole, these are the same objects.
    WHY: the engine batches whatever comes; all that a frontend may cost is the time of a few objects.

    Args:
        client: of an engine, started or not; options: see there.
    """

    def __init__(self, client: EngineClient, options: ServerOptions | None = None):
        self.client, self.options = client, options or ServerOptions()
        self._asking: Asking | None = None
        self.metrics = create_metrics(self.options.name)
        client.listener = self.metrics
        self.guests = Guests()
        self.created = int(time.time())

    @property
    def asking(self) -> Asking:
        """What knows the model; raises ApiError 503 while there is none."""
        card = self.client.card
        if self.client.state != READY or card is None:
            raise unavailable(f"the model is not ready: the engine is {self.client.state}", 2)
        if self._asking is None or self._asking.card is not card:
            self._asking = Asking(card, self.options.name, self.options.limits)
        return self._asking

    def open(self, asks: Sequence[Ask], whole: bool) -> Answers:
        """Queue texts; raises ApiError 429 where the queue is full, 503 without an engine."""
        room = self.client.card.n_rows + self.options.max_waiting
        if self.client.n_open + len(asks) > room:
            raise too_many(f"{self.client.n_open} texts are being written or wait: try again later", "queue_full")
        return self.client.open(asks, whole)

    # -- texts, whole or in pieces

    async def respond(self, request: Request, asks: list[Ask], shape, choices: list[Choice], stream: bool, usage: bool):
        """Answer with texts: a stream of events, or one object."""
        answers = self.open(asks, whole=not stream)
        try:
            await answers.taken()  # what is refused is refused before a stream begins
        except BaseException:
            self.client.close(answers)
            raise
        if stream:
            return EventStream(self._events(answers, shape, choices, usage), lambda: self.client.close(answers))
        try:
            await while_connected(request, self._collect(answers, choices))
        finally:
            self.client.close(answers)
        return JSONResponse(shape.whole(choices, self._usage(answers, choices)))

    async def _collect(self, answers: Answers, choices: list[Choice]) -> None:
        async for batch in answers:
            for place, piece in batch:
                choices[place].take(piece)

    async def _events(self, answers: Answers, shape, choices: list[Choice], usage: bool) -> AsyncIterator[bytes]:
        """The events of a stream, those that came together in one piece."""
        try:
            opened: set[int] = set()
            async for batch in answers:
                events = []
                for place, piece in batch:
                    if place not in opened and (opening := shape.opening(place)):
                        events.append(event(opening))
                    opened.add(place)
                    events += map(event, shape.chunks(place, choices[place].take(piece)))
                if events:
                    yield b"".join(events)
            cost = self._usage(answers, choices)
            if usage:
                yield event(shape.usage(cost))
            yield DONE
        except (RefusedError, UnavailableError) as error:
            yield event(translated(error).body)

    def _usage(self, answers: Answers, choices: list[Choice]) -> Usage:
        """What it cost; a prompt of which several texts were wanted counts once."""
        prompts: dict[int, tuple[int, int]] = {}  # (tokens, found), as the first text of each prompt had it
        for ask, found in zip(answers.asks, answers.found):
            prompts.setdefault(id(ask.prompt), (len(ask.prompt), found))
        lengths, found = zip(*prompts.values())
        usage = Usage(sum(lengths), sum(found), sum(choice.n_tokens for choice in choices))
        if self.options.traces:
            note(self.options.name, usage, choices)
        return usage

    async def chat(self, body: ChatRequest, request: Request):
        """POST /v1/chat/completions."""
        asking = self.asking
        asks = await asking.chat(body, request.scope.get("guest", ""))
        tools = bool(asking.tools(body))
        words = await asking.words() if body.logprobs else None
        choices = [Choice(i, words, tools) for i in range(len(asks))]
        shape = ChatShape(body.model or asking.name, bool(body.logprobs))
        return await self.respond(request, asks, shape, choices, *_streaming(body))

    async def completion(self, body: CompletionRequest, request: Request):
        """POST /v1/completions."""
        asking = self.asking
        asks = await asking.completion(body, request.scope.get("guest", ""))
        wanted = body.logprobs is not None
        echoes = [asking.decode(ask.prompt) for ask in asks] if body.echo else None
        words = await asking.words() if wanted else None
        choices = [Choice(i, words) for i in range(len(asks))]
        shape = CompletionShape(body.model or asking.name, wanted, echoes)
        return await self.respond(request, asks, shape, choices, *_streaming(body))

    # -- everything else

    async def embeddings(self, body: EmbeddingRequest, request: Request):
        """POST /v1/embeddings: the mean of the last layer's vectors, of length 1."""
        asking = self.asking
        if asking.adapter(body.model) is not None:
            raise bad_request("embeddings are the base model's: name it instead of an adapter", "model")
        if body.dimensions is not None:
            raise bad_request("dimensions is not supported: vectors are as wide as the model", "dimensions")
        prompts = await asking.prompts(body.input, "input", asking.limits.inputs)
        vectors = [(await while_connected(request, self.client.call(embed, [prompt])))[0] for prompt in prompts]
        data = [{"object": "embedding", "index": i, "embedding": encoded(vector, body.encoding_format)}
                for i, vector in enumerate(vectors)]  # fmt: skip
        n = sum(map(len, prompts))
        return JSONResponse({"object": "list", "data": data, "model": body.model or asking.name,
                             "usage": {"prompt_tokens": n, "total_tokens": n}})  # fmt: skip

    async def models(self):
        """GET /v1/models: the model, and its adapters."""
        return {"object": "list", "data": [self._model(name) for name in self.asking.models]}

    async def model(self, name: str):
        """GET /v1/models/{name}."""
        self.asking.adapter(name)
        return self._model(name)

    def _model(self, name: str) -> dict[str, Any]:
        asking = self.asking
        parent = None if name == asking.name else asking.name
        return {"id": name, "object": "model", "created": self.created, "owned_by": "llm-roadmap", "parent": parent,
                "max_model_len": asking.card.room}  # fmt: skip

    async def tokenize(self, body: TokenizeRequest):
        """POST /tokenize: a text, or a conversation as the model reads it."""
        asking = self.asking
        asking.adapter(body.model)
        if body.messages is not None:
            tokens = await asking.conversation(body.messages, body.tools)
        else:
            (tokens,) = await asking.encode([body.prompt], "prompt")

        def told() -> JSONResponse:
            texts = [asking.decode([token]) for token in tokens]
            return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": asking.card.room,
                                 "token_strs": texts})  # fmt: skip

        return await asyncio.to_thread(told)

    async def detokenize(self, body: DetokenizeRequest):
        """POST /detokenize."""
        asking = self.asking
        asking.adapter(body.model)
        text = await asyncio.to_thread(asking.decode, asking.known(body.tokens, "tokens"))
        return JSONResponse({"prompt": text})

    async def live(self):
        """GET /health/live: whether there is hope without a restart of this process."""
        broken = self.client.state == BROKEN
        return JSONResponse(self.health(), 503 if broken else 200)

    async def ready(self):
        """GET /health and /health/ready: whether a request would be served now."""
        return JSONResponse(self.health(), 200 if self.health()["status"] == READY else 503)

    def health(self) -> dict[str, Any]:
        """How things stand."""
        status = "draining" if self.guests.draining else self.client.state
        gauges = self.client.gauges
        return {"status": status, "running": gauges.running, "waiting": gauges.waiting, "kv_usage": gauges.usage,
                "restarts": self.client.n_restarts}  # fmt: skip

    async def page(self):
        """GET /metrics."""
        from prometheus_client import CONTENT_TYPE_LATEST

        return Response(self.metrics.page(self.client.gauges, self.client.n_restarts), media_type=CONTENT_TYPE_LATEST)


def create_app(client: EngineClient, options: ServerOptions | None = None) -> FastAPI:
    """The app: it starts the client's engine with itself, and ends it; `app.state.server` is its `Server`."""
    server = Server(client, options)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        await client.start()
        yield
        await client.stop()

    app = FastAPI(title="LLM roadmap: an OpenAI-compatible server", lifespan=lifespan)
    app.state.server = server
    add_routes(app, server)
    errors.install(app)
    app.add_exception_handler(RefusedError, _translate)
    app.add_exception_handler(UnavailableError, _translate)
    app.add_exception_handler(ClientGoneError, lambda request, error: Response(status_code=499))  # nobody reads it
    app.add_middleware(Gate, options=server.options.gate, guests=server.guests, answered=server.metrics.answered)
    if server.options.origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(server.options.origins), allow_methods=["*"],
                           allow_headers=["*"])  # fmt: skip
    if server.options.traces:
        trace_requests(app)
    app.openapi = lambda: described(app)
    return app


REFUSALS = {
    400: "a field is wrong: the error names it", 401: "the key is missing or wrong", 404: "no such model",
    413: "the body is too large", 429: "too much at once: see Retry-After",
    503: "not now: loading, restarting, draining",
}  # fmt: skip


def add_routes(app: FastAPI, server: Server) -> None:
    """Every path, what answers it, and what it may refuse."""
    refusals = {status: {"model": ErrorBody, "description": text} for status, text in REFUSALS.items()}
    guarded = {"response_model": None, "responses": refusals}
    app.post("/v1/chat/completions", **guarded)(server.chat)
    app.post("/v1/completions", **guarded)(server.completion)
    app.post("/v1/embeddings", **guarded)(server.embeddings)
    app.get("/v1/models", **guarded)(server.models)
    app.get("/v1/models/{name:path}", **guarded)(server.model)
    app.post("/tokenize", **guarded)(server.tokenize)
    app.post("/detokenize", **guarded)(server.detokenize)
    probe = {"response_model": None, "responses": {503: {"description": "not now"}}}
    app.get("/health", **probe)(server.ready)
    app.get("/health/ready", **probe)(server.ready)
    app.get("/health/live", **probe)(server.live)
    app.get("/metrics", response_model=None)(server.page)


def described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, without the 422 that FastAPI adds: here wrong values are answered by 400."""
    if app.openapi_schema is None:
        app.openapi_schema = get_openapi(title=app.title, version="1", routes=app.routes)
        for path in app.openapi_schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            app.openapi_schema["components"]["schemas"].pop(name, None)
    return app.openapi_schema


async def _translate(request: Request, error: Exception) -> Response:
    return translated(error).response


def translated(error: Exception) -> ApiError:
    """What a client is told of an engine that cannot, or will not."""
    return unavailable(str(error)) if isinstance(error, UnavailableError) else bad_request(str(error))


def _streaming(body: Sampling) -> tuple[bool, bool]:
    """Whether a stream is wanted, and whether it tells what it cost."""
    return bool(body.stream), bool(body.stream_options and body.stream_options.include_usage)


def encoded(vector: Sequence[float], form: str) -> list[float] | str:
    """A vector as numbers, or as base64 of little-endian float32."""
    if form == "float":
        return list(vector)
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
