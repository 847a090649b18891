"""
Client of an engine

This file implements the side of a server that asks an engine, and outlives it, following:
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - models in containers of their own
  behind one interface, which may fail without the frontend failing

Each component is explained with paper references for educational purposes.
"""

import asyncio
import itertools
import multiprocessing
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from phase3_core_inference.project8_kv_cache.texts import Piece
from phase10_deployment.project28_serving.answers import Answers, RefusedError, UnavailableError
from phase10_deployment.project28_serving.engine import Engine, Gauges
from phase10_deployment.project28_serving.wire import Ear, framed, wire_ends
from phase10_deployment.project28_serving.worker import FAILED, Ask, Card, work

LOADING, READY, RESTARTING, BROKEN, CLOSED = "loading", "ready", "restarting", "broken", "closed"
RESTARTS = 5  # in a row, without a text written in between; then the engine is given up
SILENCE = 300.0  # seconds without a word while texts are open, after which an engine is taken to be stuck
PAUSE = 0.5  # seconds before the first restart; each further one waits twice as long


class Listener(Protocol):
    """Who wants to know what happens to texts: metrics.py."""

    def begun(self, answers: Answers, place: int, seconds: float) -> None:
        """A text has got its first step, after so long a wait."""
        ...

    def piece(self, answers: Answers, place: int, piece: Piece) -> None:
        """A token has come."""
        ...

    def step(self, n_tokens: int) -> None:
        """A step has given so many tokens."""
        ...

    def aborted(self, n: int) -> None:
        """So many texts were called off."""
        ...

    def failed(self, n: int) -> None:
        """So many texts could not be written to their end."""
        ...

    def lost(self, gauges: Gauges) -> None:
        """The engine is gone; this was the last that it said of itself."""
        ...


class EngineClient:
    """An engine in a process of its own, asked from an event loop.

    PAPER: "Clipper: A Low-Latency Online Prediction Serving System", arXiv:1612.03079, sections 3 and 4.
    PAPER CONTEXT: each model runs in a container of its own, apart from the layer that takes queries; it can crash, be
        replaced or replicated, and the others go on.
    INTUITION: the waiter stays in the dining room whatever happens in the kitchen, and says so if it burns.
    IMPLEMENTATION: the event loop reads and writes one end of a wire, and never waits for the engine. When the worker
        ends unasked, all who wait get an error, and another one is started after a pause; one that is silent for too
        long while texts are open is ended.
    WHY: a process has its own interpreter lock, so that serving sockets does not slow the engine down; and a GPU that
        has raised an error is lost for its process, but not for the next.

    Args:
        build: makes the engine, there; for a process it must be picklable.
        process: False: a thread of this process, for tests and for small models.
        listener: who is told what happens to texts; may be set later. silence: seconds, see above.
    """

    def __init__(
        self,
        build: Callable[[], Engine],
        process: bool = True,
        listener: Listener | None = None,
        silence: float = SILENCE,
    ):
        self.build, self.process, self.listener, self.silence = build, process, listener, silence
        self.state, self.reason = LOADING, ""
        self.failure = ""  # why the engine was given up
        self.card: Card | None = None
        self.gauges, self.n_restarts = Gauges(), 0
        self.worker: multiprocessing.process.BaseProcess | threading.Thread | None = None
        self._texts: dict[int, tuple[Answers, int]] = {}
        self._calls: dict[int, asyncio.Future] = {}
        self._numbers, self._crashes = itertools.count(), 0
        self._transport: asyncio.Transport | None = None
        self._link: asyncio.Task | None = None  # reads what the worker says
        self._watch: asyncio.Task | None = None
        self._asked: float | None = None  # since when the engine should say something
        self._changed: asyncio.Event | None = None

    # -- from the outside

    async def start(self) -> None:
        """Start the worker; returns at once, `ready` waits."""
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._spawn()
        if self.process:
            self._watch = self._loop.create_task(self._watch_over())

    async def ready(self) -> None:
        """Wait until requests are served; raises UnavailableError if that will not be."""
        while self.state in (LOADING, RESTARTING):
            self._changed.clear()
            await self._changed.wait()
        if self.state != READY:
            raise UnavailableError(self.reason or "the engine is closed")

    async def lost(self) -> int:
        """Wait until the engine is not ready any more; returns how often it will have been started anew."""
        while self.state == READY:
            self._changed.clear()
            await self._changed.wait()
        return self.n_restarts

    @property
    def described(self) -> str:
        """The engine in a few words."""
        card = self.card
        return (f"{card.source}, {card.n_parameters / 1e6:,.1f}M parameters on {card.device}, {card.n_blocks:,} blocks "
                f"of keys and values ({card.kv_bytes / 2**20:,.0f} MiB), {card.n_rows} texts at a time of up to "
                f"{card.room:,} tokens; process {card.pid}")  # fmt: skip

    def open(self, asks: Sequence[Ask], whole: bool = False) -> Answers:
        """Ask for some texts; raises UnavailableError. Whoever opens must `close`. whole: see Answers."""
        if self.state != READY:
            raise UnavailableError(f"the engine is {self.state}: try again later")
        answers = Answers(asks, whole)
        self._ask()
        for place, ask in enumerate(asks):
            number = next(self._numbers)
            self._texts[number] = (answers, place)
            self._tell(("add", number, ask))
        return answers

    def close(self, answers: Answers) -> None:
        """Call off what is not written yet: its blocks are free before the next step."""
        numbers = [number for number, (owner, _) in self._texts.items() if owner is answers] if answers.left else []
        for number in numbers:
            del self._texts[number]
        if numbers:
            self._tell(("abort", numbers))
            if self.listener:
                self.listener.aborted(len(numbers))

    async def call(self, function: Callable, *arguments):
        """`function(engine, *arguments)` between two steps; raises UnavailableError or RefusedError."""
        if self.state != READY:
            raise UnavailableError(f"the engine is {self.state}: try again later")
        number, future = next(self._numbers), self._loop.create_future()
        self._ask()
        self._calls[number] = future
        self._tell(("call", number, function, arguments))
        try:
            return await future
        finally:
            self._calls.pop(number, None)

    @property
    def n_open(self) -> int:
        """Texts that are not written yet."""
        return len(self._texts)

    async def stop(self) -> None:
        """End the worker; who still waits gets an error."""
        if self.state == CLOSED:
            return
        loading = self.state in (LOADING, RESTARTING)
        if self._watch is not None:
            self._watch.cancel()
        self._set(CLOSED, "the server is shutting down")
        self._tell(("stop",))
        if self.worker is not None and self.process:
            await asyncio.to_thread(self.worker.join, 0 if loading else 5)
            if self.worker.is_alive():
                self.worker.kill()
        if self._link is not None:
            await asyncio.wait([self._link], timeout=5)

    # -- the worker and the wire

    def _spawn(self) -> None:
        """Start a worker at one end of a wire, and listen at the other."""
        ours, theirs = wire_ends()
        if self.process:
            # spawn: a forked child would share the parent's threads' locks, and cannot use a GPU.
            context = multiprocessing.get_context("spawn")
            self.worker = context.Process(target=work, args=(theirs, self.build), daemon=True, name="engine")
        else:
            self.worker = threading.Thread(target=work, args=(theirs, self.build), daemon=True, name="engine")
        self.worker.start()
        if self.process:
            theirs.close()  # so that its end closes the wire
        self._link = self._loop.create_task(self._listen(ours))

    async def _listen(self, end: socket.socket) -> None:
        """Take what comes, until nothing will come any more."""
        over, said = asyncio.Event(), []

        def heard(message: tuple) -> None:
            kind, *values = message
            if kind == "broken":
                said[:] = values
            else:
                getattr(self, f"_on_{kind}")(*values)
            self._asked = time.monotonic() if self._texts or self._calls else None

        self._transport, _ = await self._loop.create_connection(lambda: Ear(heard, over.set), sock=end)
        await over.wait()
        self._transport = None
        self._lost(said[0] if said else "the engine ended without a word")

    def _ask(self) -> None:
        """Something is about to be asked for: from now on the engine should say something."""
        if self._asked is None:
            self._asked = time.monotonic()

    async def _watch_over(self) -> None:
        """End a worker that is stuck: its device hangs, say. What follows is what follows a crash."""
        while self.state not in (BROKEN, CLOSED):
            before = time.monotonic()
            await asyncio.sleep(self.silence / 10)
            now = time.monotonic()
            if self.state != READY or self._asked is None:
                continue
            if now - before > self.silence / 2:  # it was this process that did nothing for so long
                self._asked = now
            elif now - self._asked > self.silence:
                self.worker.kill()
                if self._transport is not None:
                    self._transport.abort()  # a process that waits for a driver may not die

    def _tell(self, message: tuple) -> None:
        """Send a message, if there is somebody to read it; returns at once."""
        if self._transport is not None:
            self._transport.write(framed(message))

    def _on_ready(self, card: Card) -> None:
        # The first text to be encoded loads compiled code, for seconds: not while others wait for this loop.
        worker, warm = self.worker, self._loop.run_in_executor(None, card.tokenizer.encode, "Hello")

        def done(future: asyncio.Future) -> None:
            if worker is self.worker and self._transport is not None and self.state in (LOADING, RESTARTING):
                self.card = card
                self._set(READY)

        warm.add_done_callback(done)

    def _on_taken(self, numbers: list[int]) -> None:
        for number in numbers:
            if number in self._texts:
                self._texts[number][0].take()

    def _on_step(self, pieces: list[tuple], begun: list[tuple], gauges: Gauges) -> None:
        self.gauges = gauges
        if self.listener:
            self.listener.step(len(pieces))
        for number, seconds, found in begun:
            if number in self._texts:
                answers, place = self._texts[number]
                answers.found[place] = found
                if self.listener:
                    self.listener.begun(answers, place, seconds)
        for number, text, token, reason, logprobs in pieces:
            if number not in self._texts:
                continue  # called off meanwhile
            answers, place = self._texts.pop(number) if reason else self._texts[number]
            if reason == FAILED:
                self._fail(answers, RefusedError(text))
                continue
            self._crashes = 0
            piece = Piece(place, text, token, reason, logprobs)
            if self.listener:
                self.listener.piece(answers, place, piece)
            answers.put(place, piece)

    def _on_refused(self, number: int, reason: str) -> None:
        if number in self._calls and not self._calls[number].done():
            self._calls[number].set_exception(RefusedError(reason))
        if number in self._texts:
            self._fail(self._texts.pop(number)[0], RefusedError(reason))

    def _on_failed(self, number: int, kind: str) -> None:
        error = UnavailableError(f"the engine could not do this ({kind})")
        if number in self._calls and not self._calls[number].done():
            self._calls[number].set_exception(error)
        if number in self._texts:
            self._fail(self._texts.pop(number)[0], error)

    def _fail(self, answers: Answers, error: Exception) -> None:
        """One of these texts will not be written to its end."""
        answers.fail(error)
        if self.listener:
            self.listener.failed(1)

    def _on_result(self, number: int, value) -> None:
        if number in self._calls and not self._calls[number].done():
            self._calls[number].set_result(value)

    def _lost(self, reason: str) -> None:
        """The worker is gone: tell everybody who waits, and start another one unless it was asked to go."""
        closed = self.state == CLOSED
        # Not the reason itself, which may hold something of another one's text: that is for the log.
        error = UnavailableError(self.reason if closed else "the engine broke, and is being started anew")
        for answers, _ in self._texts.values():
            self._fail(answers, error)
        if self.listener:
            self.listener.lost(self.gauges)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(error)
        self._texts, self.gauges, self._asked = {}, Gauges(), None
        if closed:
            return
        self._crashes += 1
        if self.state == LOADING or self._crashes > RESTARTS:
            self.failure = reason
            self._set(BROKEN, reason)
            return
        self._set(RESTARTING, reason)
        self.n_restarts += 1
        self._loop.call_later(PAUSE * 2 ** (self._crashes - 1), self._again)

    def _again(self) -> None:
        if self.state == RESTARTING:
            self._link = self._loop.create_task(self._replace(self.worker))

    async def _replace(self, old) -> None:
        """Start another worker once the old one is gone, and with it the memory of its device."""
        await asyncio.to_thread(old.join, 10)
        if self.process and old.is_alive():
            old.kill()
            await asyncio.to_thread(old.join, 10)
        if self.state == RESTARTING:
            self._spawn()

    def _set(self, state: str, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._changed.set()
