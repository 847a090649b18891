"""
Worker

This file implements the loop around an engine, in a process or a thread of its own, following:
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - an endpoint takes
  requests while the engine iterates

Each component is explained with paper references for educational purposes.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase4_advanced_inference.project12_dynamic_batching.request import Request
from phase10_deployment.project28_serving.engine import Engine
from phase10_deployment.project28_serving.wire import Wire

FAILED = "failed"  # the finish_reason of a text that could not be written


@dataclass(frozen=True)
class Ask:
    """One text that is wanted."""

    prompt: list[int]
    params: SamplingParams
    user: str = ""
    adapter: str | None = None
    grammar: str | None = None
    priority: int = 0


class Card(NamedTuple):
    """What a frontend must know of an engine: it holds everything else."""

    source: str  # where the model came from
    tokenizer: Any
    vocab_size: int  # ids that model and tokenizer know
    room: int  # tokens of a text, prompt and answer
    n_rows: int
    adapters: list[str]
    n_parameters: int
    device: str
    n_blocks: int
    kv_bytes: int
    pid: int


# What a worker says, each a tuple of plain values.
#   ("ready", Card)
#   ("taken", [numbers])               these texts are queued
#   ("step", pieces, begun, Gauges)    pieces: [(number, text, token, finish_reason, logprobs)]
#                                      begun: [(number, seconds in the queue, tokens found in the cache)]
#   ("refused", number, reason)        this text cannot be written
#   ("result", number, value)          of a call
#   ("failed", number, kind of error)  of a text or a call, through no fault of its own
#   ("broken", reason)                 the loop is over
# What it is told:
#   ("add", number, Ask)  ("abort", [numbers])  ("call", number, function, arguments)  ("stop",)


@dataclass
class _Text:
    """A request that is being served."""

    number: int
    request: Request
    added: float = field(default_factory=time.monotonic)
    begun: bool = False


class Worker:
    """An engine that does what it is told through a wire, and says what comes of it.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 4.1.
    PAPER CONTEXT: endpoint, request pool, scheduler and engine: requests arrive and leave while iterations go on.
    INTUITION: the cook reads the new slips between two turns of the pan, never during one.
    IMPLEMENTATION: before each step all messages that have come are obeyed, but of calls, which take long, one at most;
        without work it sleeps until one comes. All that a step gives travels as one message.
    WHY: an engine has one owner, so nothing in it needs a lock; and a call-off takes effect before the next step.

    Args:
        engine: of this thread alone; wire: where messages come and go.
    """

    def __init__(self, engine: Engine, wire: Wire):
        self.engine, self.wire = engine, wire
        self._texts: dict[int, _Text] = {}  # by the request's index
        self._indices: dict[int, int] = {}  # number -> index
        self._taken: list[int] = []  # of which nothing was said yet

    def run(self) -> None:
        """Work until told to stop, or until nobody listens any more."""
        engine, wire = self.engine, self.wire
        while True:
            while wire.poll(wait=not engine.busy):
                kind, *values = wire.recv()
                if not self.obey(kind, values):
                    return
                if kind == "call" and engine.busy:
                    break
                if not engine.busy and not wire.poll(wait=False):
                    self.tell([])
            if self._taken:  # said before the step, so that an answer can be begun during it
                wire.send(("taken", self._taken))
                self._taken = []
            self.tell(engine.step())

    def obey(self, kind: str, values: list) -> bool:
        """Do what a message says; False: it is time to go."""
        if kind == "stop":
            return False
        getattr(self, f"_{kind}")(*values)
        return True

    def _add(self, number: int, ask: Ask) -> None:
        try:
            request = self.engine.add(ask.prompt, ask.params, ask.priority, ask.user, ask.adapter, ask.grammar)
        except ValueError as error:
            self.wire.send(("refused", number, str(error)))
            return
        except Exception as error:  # of this text alone; a device that is lost will end the next step
            _complain(error)
            self.wire.send(("failed", number, type(error).__name__))
            return
        self._texts[request.index], self._indices[number] = _Text(number, request), request.index
        self._taken.append(number)

    def _abort(self, numbers: list[int]) -> None:
        for number in numbers:
            if number in self._indices:
                self.engine.abort(self._texts.pop(self._indices.pop(number)).request)

    def _call(self, number: int, function: Callable, arguments: tuple) -> None:
        try:
            self.wire.send(("result", number, function(self.engine, *arguments)))
        except ValueError as error:  # what the caller gave
            self.wire.send(("refused", number, str(error)))
        except Exception as error:  # of this call alone; a device that is lost will end the next step
            _complain(error)
            self.wire.send(("failed", number, type(error).__name__))

    def tell(self, pieces: list) -> None:
        """Say what a step gave, and how things stand; each time, as silence means that the engine is stuck."""
        begun, told, gauges = self._begun(), [], self.engine.gauges()
        for piece in pieces:
            text = self._texts.get(piece.index)
            if text is None:
                continue
            reason, words = piece.finish_reason, piece.text
            if reason:
                del self._texts[piece.index], self._indices[text.number]
                failed = getattr(text.request.constraint, "failed", None)
                reason, words = (FAILED, failed) if failed else (reason, words)
            told.append((text.number, words, piece.token, reason, piece.logprobs))
        self.wire.send(("step", told, begun, gauges))

    def _begun(self) -> list[tuple[int, float, int]]:
        """Who was let in by the last step."""
        admitted, now = self.engine.last.admitted if self.engine.last else (), time.monotonic()
        texts = [text for request in admitted if (text := self._texts.get(request.index)) and not text.begun]
        for text in texts:
            text.begun = True
        return [(text.number, now - text.added, text.request.found) for text in texts]


def _complain(error: Exception) -> None:
    """Say where an error was raised; not its message, which may hold something of a text."""
    print(*traceback.format_tb(error.__traceback__), type(error).__name__, sep="", file=sys.stderr, flush=True)


def work(end: socket.socket, build: Callable[[], Engine]) -> None:
    """What the process or thread of an engine does, from the loading of the model to the end.

    Whatever goes wrong is said through the wire as its last message. end: of `socket.socketpair`.
    """
    wire, alone = Wire(end), threading.current_thread() is threading.main_thread()
    if alone:  # a process of its own: its parent decides when to end
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    try:
        engine = build()
        if alone:
            gc.collect()
            gc.freeze()  # what has been loaded will stay: to look for garbage in it takes longer than a step
        wire.send(("ready", card_of(engine)))
        Worker(engine, wire).run()
    except (EOFError, ConnectionError):
        pass  # nobody is left to be told
    except BaseException as error:
        known = isinstance(error, (ValueError, OSError))  # what a user can cause needs no traceback
        reason = str(error) if known else "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):
            wire.send(("broken", reason))
    finally:
        wire.close()


def card_of(engine: Engine) -> Card:
    """What the frontend is told of an engine."""
    n_parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    return Card(engine.source, engine.tokenizer, engine.vocab_size(), engine.room, engine.n_rows, engine.adapter_names,
                n_parameters, str(engine.device), engine.cache.allocator.n_blocks, engine.cache.nbytes,
                os.getpid())  # fmt: skip
