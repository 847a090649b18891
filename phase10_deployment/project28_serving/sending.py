"""
Sending

This file implements an open loop of requests over HTTP, in a process that does nothing else, following:
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - requests come at
  their own times, whether the system keeps up or not
- "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (Agrawal et al., 2024) - the times of tokens
  are what is measured

It imports nothing that takes time or memory: several processes run it, see load.py.

Each component is explained with paper references for educational purposes.
"""

import asyncio
import json
import signal
import time
from collections.abc import Sequence
from typing import NamedTuple

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
PATIENCE = 600.0  # seconds that one answer may take


class Order(NamedTuple):
    """A request that will be sent."""

    at: float  # seconds after the beginning
    path: str  # such as /v1/completions
    body: dict


class Kept(NamedTuple):
    """What was kept of one request; times in seconds after the beginning."""

    at: float  # when it was due
    sent: float
    ended: float
    status: int  # 0: there was no answer
    error: str  # what went wrong with the connection
    chunks: list[tuple[float, bytes]]  # what came, and when


def work(pipe) -> None:
    """What a process of clients does, until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever measures
    try:
        while True:
            told = pipe.recv()
            pipe.send(None if told is None else asyncio.run(send_all(*told)))
    except EOFError:
        pass


async def send_all(url: str, begin: float, orders: Sequence[Order], patience: float = PATIENCE) -> list[Kept]:
    """Send orders at their times after `begin` of the monotonic clock, from this event loop.

    PAPER: "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", arXiv:2403.02310, section 2.4.
    PAPER CONTEXT: what users feel is the time to the first token, and the time between tokens.
    INTUITION: take all letters out of the box with the hour on them, and read them in the evening.
    IMPLEMENTATION: connections are kept and not limited in number; the chunks of each answer are kept as they came.
    WHY: 256 streams at forty thousand tokens a second leave 25 microseconds for each event, and JSON takes more.
    """
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=patience)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        return await asyncio.gather(*(_send(session, begin, order) for order in orders))


async def _send(session, begin: float, order: Order) -> Kept:
    """One request: when it was sent and answered, and the chunks that came, each with its time."""
    import aiohttp

    body, headers = json.dumps(order.body).encode(), {"Content-Type": "application/json"}
    status, wrong, chunks = 0, "", []
    await asyncio.sleep(begin + order.at - time.monotonic())
    sent = time.monotonic() - begin
    try:
        async with session.post(order.path, data=body, headers=headers) as response:
            status = response.status
            async for data in response.content.iter_any():
                chunks.append((time.monotonic() - begin, data))
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        wrong = f"{type(error).__name__}: {error}"
    return Kept(order.at, sent, time.monotonic() - begin, status, wrong, chunks)
