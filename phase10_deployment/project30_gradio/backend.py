"""
Backend

This file implements where a page gets its answers from, a server and perhaps its engine, following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - a frontend
  before an engine
- "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021) - one model, and adapters to choose from

Each component is explained with paper references for educational purposes.
"""

import contextlib
from collections.abc import Callable, Iterator

from phase10_deployment.project28_serving.answers import RefusedError, UnavailableError
from phase10_deployment.project28_serving.client import EngineClient
from phase10_deployment.project28_serving.engine import Engine
from phase10_deployment.project30_gradio.looking import shape_of
from phase10_deployment.project30_gradio.stops import Stops
from phase10_deployment.project30_gradio.talking import Api, Health, ServerError

STATES = {
    "loading": "the model is being loaded: this page will work in a moment",
    "restarting": "the engine broke and is being started again: wait a moment",
    "draining": "the server is shutting down and takes no new requests",
    "broken": "the engine could not be started: its terminal says why",
    "unavailable": "the server is there, but serves nothing now",
}


class Backend:
    """What the panels of a page share.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, 5.
    PAPER CONTEXT: users see an interface, the engine behind it sees requests.
    INTUITION: the dining room; guests order at the counter, and those who may look through the kitchen's window do.
    IMPLEMENTATION: all texts go through the API, whoever serves it. What only the engine knows is asked of its client,
        as a function that runs there between two steps; without an engine in this process there is no such window.
    WHY: chatting works against any server, and panels that cannot work say so instead of showing nothing.

    Args:
        api: of the server; client: of the engine behind it, if this process has it.
    """

    def __init__(self, api: Api, client: EngineClient | None = None):
        self.api, self.client, self.stops = api, client, Stops()

    async def look(self, function: Callable, *arguments):
        """`function(engine, *arguments)`, between two steps; raises ServerError, also where there is no engine."""
        if self.client is None:
            raise ServerError("this panel looks into the engine, which runs in another process behind "
                              f"{self.api.url}: start the page without --api_url to see it")  # fmt: skip
        try:
            return await self.client.call(function, *arguments)
        except (RefusedError, UnavailableError) as error:
            raise ServerError(str(error)) from error

    async def shape(self):
        """How many layers and heads there are; raises ServerError."""
        return await self.look(shape_of)

    async def tell(self) -> tuple[Health, str, list[str]]:
        """How the server is, the same in words, and which models it has."""
        health, models = await self.api.health(), []
        words = STATES.get(health.status, "")
        if health.status in ("ready", "down"):
            try:
                models = await self.api.models()
            except ServerError as error:
                health, words = health._replace(status="down" if health.status == "down" else "refused"), str(error)
            else:
                health = health._replace(status="ready")
        if health.status == "ready":
            card = self.client.card if self.client else None
            where = (
                f"{card.n_parameters / 1e6:,.1f}M parameters on {card.device}" if card else f"server at {self.api.url}"
            )
            words = (
                f"{where} · {health.running} running, {health.waiting} waiting, {health.usage:.0%} of the cache in use"
            )
        return health, words, models


@contextlib.contextmanager
def adapted(engine: Engine, name: str | None) -> Iterator[None]:
    """Within this block forwards over no cache take an adapter; a name that is none stands for the model itself."""
    known = engine.adapters is not None and name in engine.adapter_names
    if known:
        engine.adapters.choose(name)
    try:
        yield
    finally:
        if known:
            engine.adapters.choose(None)


def with_adapter(engine: Engine, name: str | None, function: Callable, *arguments):
    """`function(engine, *arguments)` under an adapter: it is this that is sent to the engine."""
    with adapted(engine, name):
        return function(engine, *arguments)
