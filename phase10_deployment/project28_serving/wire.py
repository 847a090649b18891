"""
Wire

This file implements messages between the web's process and the engine's: Python objects, pickled, with their length
before them, over a pair of sockets. Neither process has a thread for it, which would have to ask a busy interpreter
for its lock several times a message, and wait up to 5 ms each time: the web's end is read and written by its event
loop, and the engine's end sends at once, into a buffer that holds many steps. Only processes that this one has started
hold an end, so that unpickling is safe.
"""

import asyncio
import contextlib
import pickle
import select
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

HEADER = 8  # bytes of a length
BUFFER = 2**22  # bytes on their way, if the system allows so many
PART = 2**18  # bytes that are received at a time


def wire_ends() -> tuple[socket.socket, socket.socket]:
    """Two ends that are joined, with buffers as large as the system allows, so that a busy reader stops nobody."""
    ends = socket.socketpair()
    for end in ends:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    return ends


def framed(message: Any) -> bytes:
    """A message as it travels."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(HEADER, "big") + data


class Frames:
    """Bytes as they come, taken apart into messages."""

    def __init__(self):
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Add some bytes; yields the messages that are whole now."""
        self._held += data
        while len(self._held) >= HEADER:
            end = HEADER + int.from_bytes(self._held[:HEADER], "big")
            if len(self._held) < end:
                return
            message = pickle.loads(memoryview(self._held)[HEADER:end])
            del self._held[:end]
            yield message


class Wire:
    """The engine's end: it receives when it likes to.

    Args:
        end: one of `socket.socketpair()`.
    """

    def __init__(self, end: socket.socket):
        self._end, self._frames, self._come = end, Frames(), deque()

    def poll(self, wait: bool) -> bool:
        """Whether a message has come; wait: until one has. Raises EOFError when nobody is at the other end any more."""
        while not self._come:
            if not select.select([self._end], [], [], None if wait else 0)[0]:
                return False
            if not (data := self._end.recv(PART)):
                raise EOFError("the other end is closed")
            self._come.extend(self._frames.feed(data))
        return True

    def recv(self) -> Any:
        """The next message, once `poll` said that there is one."""
        return self._come.popleft()

    def send(self, message: Any) -> None:
        """Send a message; raises OSError when nobody is at the other end."""
        self._end.sendall(framed(message))

    def close(self) -> None:
        """Let the other end know that nothing more will come."""
        self._end.close()


class Ear(asyncio.Protocol):
    """The web's end, in its event loop.

    Args:
        heard: called with every message; closed: called once, when nothing more will come.
    """

    def __init__(self, heard: Callable[[Any], None], closed: Callable[[], None]):
        self._heard, self._closed, self._frames = heard, closed, Frames()

    def data_received(self, data: bytes) -> None:
        """Some bytes have come."""
        for message in self._frames.feed(data):
            self._heard(message)

    def connection_lost(self, error: Exception | None) -> None:
        """The other end is closed, or its process is gone."""
        self._closed()
