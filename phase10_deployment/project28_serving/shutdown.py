"""
Shutdown

This file implements the life of a server process: it listens at once, lives as long as its engine can be revived, and
when it is asked to go it finishes what it has accepted.
"""

import asyncio
import gc
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from phase10_deployment.project28_serving.answers import UnavailableError
from phase10_deployment.project28_serving.client import BROKEN, CLOSED, READY


class PatientServer(uvicorn.Server):
    """A web server that drains.

    The first SIGTERM or SIGINT closes the door: new requests get 503, health checks tell it, those inside are served to
    their end, for at most `patience` seconds. The second one ends at once.

    Args:
        config: of uvicorn, for an app of `create_app`; patience: seconds; said: called with lines for the terminal.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI, patience: float, said: Callable[[str], None]):
        super().__init__(config)
        self.server, self.patience, self.said = app.state.server, patience, said
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task] = set()

    def handle_exit(self, sig: int, frame) -> None:
        """A signal has come: uvicorn would stop listening at once."""
        if self.server.guests.draining or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self.server.guests.draining = True  # now: the loop may be busy for a moment
            self._loop.call_soon_threadsafe(self._start, self._drain())

    async def startup(self, sockets=None) -> None:
        """Listen, and look after the engine."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self.should_exit:
            self._start(self._watch())

    def _start(self, work) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drain(self) -> None:
        guests = self.server.guests
        self.said(f"draining: {sum(guests.inside.values())} requests are being served, new ones are refused")
        try:
            await asyncio.wait_for(guests.drained(), self.patience)
        except TimeoutError:
            self.said(f"{sum(guests.inside.values())} requests are given up after {self.patience:g} s")
            await self.server.client.stop()  # ends them with an error instead of silence
        self.should_exit = True

    async def _watch(self) -> None:
        """Tell when the engine is ready; leave when it is beyond help."""
        client, told = self.server.client, 0
        while client.state != BROKEN:
            try:
                await client.ready()
            except UnavailableError:
                break
            if not told:
                gc.collect()
                gc.freeze()  # modules and tokenizer stay: to look for garbage there would stop all streams for 0.1 s
            self.said(f"ready{f' again, after {told} restarts' if told else ''}: {client.described}")
            told = await client.lost()
            if client.reason and client.state not in (CLOSED, READY):
                self.said(f"the engine broke: {client.reason.strip()}")
        if client.state == BROKEN:
            self.should_exit = True


def run_server(
    app: FastAPI, host: str, port: int, patience: float, log_level: str, said: Callable[[str], None]
) -> None:
    """Serve an app until a signal ends it; raises ValueError if its engine could not be started, or revived.

    said: called with each line for whoever started it.
    """
    config = uvicorn.Config(app, host, port, log_level=log_level, timeout_graceful_shutdown=5)
    server = PatientServer(config, app, patience, said)
    try:
        server.run()
    finally:
        gc.unfreeze()  # libraries complain of what is left at the end
    client = app.state.server.client
    if client.state == BROKEN or client.failure:
        raise ValueError(client.failure or client.reason)
