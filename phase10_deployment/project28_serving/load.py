"""
Load

This file implements clients that a server is measured with, following:
- "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (Agrawal et al., 2024) - time to first token,
  and the tail of the times between tokens
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - requests that come
  whether the system keeps up or not
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - latencies as clients see them

Each component is explained with paper references for educational purposes.
"""

import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from phase4_advanced_inference.project12_dynamic_batching.traces import Record
from phase10_deployment.project28_serving.sending import PATIENCE, Kept, Order, work

LEAD = 0.2  # seconds from the word to all clients until the first request is due


@dataclass
class Answer(Record):
    """What became of an order; times in seconds after the beginning, `arrived` is when it was due.

    `times` are those of the events that hold text: one a token, where the server sends each by itself. `tokens` stays
    empty, as servers tell no ids.
    """

    sent: float = 0.0
    ended: float = 0.0
    status: int = 0  # 0: there was no answer
    error: str = ""
    text: str = ""
    n_tokens: int = 0  # as the server counted them
    n_prompt: int = 0

    @property
    def whole(self) -> float:
        """Time from when the request was due to the end of its answer."""
        return self.ended - self.arrived


@dataclass(frozen=True)
class LoadSummary:
    """What clients experienced, in numbers; times in seconds."""

    n_requests: int
    n_failed: int
    n_tokens: int
    throughput: float  # tokens per second, from the first request to the end of the last answer
    first: tuple[float, float]  # time to the first token: median, 99th percentile
    gap: tuple[float, float, float]  # time between tokens: median, 99th percentile, longest
    whole: tuple[float, float]  # time to the end: median, 99th percentile
    late: float  # the most that a request was sent after it was due: what the clients could not keep up with


class Clients:
    """Clients in processes of their own, who send orders to a server and note when what comes back.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 6.2.
    PAPER CONTEXT: arrivals follow a process of their own, and latency is plotted against the rate that was reached.
    INTUITION: passers-by with a stop watch each: nobody waits at home because the queue is long.
    IMPLEMENTATION: orders are dealt to the processes in turn, which run sending.py; what came back is read here when
        all requests have ended.
    WHY: a client that shares the server's interpreter, or decodes each event as it comes, would measure itself.

    Args:
        n_processes: more of them read more events a second. Use it as a context.
    """

    def __init__(self, n_processes: int = 1):
        if n_processes < 1:
            raise ValueError(f"n_processes={n_processes} must be at least 1")
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(n_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs,), daemon=True, name="client")
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, url: str, orders: Sequence[Order], patience: float = PATIENCE) -> list[Answer]:
        """Send all orders at their times; returns when all are answered, in the order of `orders`.

        url: of the server, without a path; patience: seconds after which an answer is given up.
        """
        for pipe in self._pipes:
            pipe.send(None)
        for pipe in self._pipes:
            pipe.recv()  # they are there: a process takes seconds to start
        begin, n = time.monotonic() + LEAD, len(self._pipes)
        for place, pipe in enumerate(self._pipes):
            pipe.send((url, begin, list(orders[place::n]), patience))
        kept: list[Kept | None] = [None] * len(orders)
        for place, pipe in enumerate(self._pipes):
            kept[place::n] = pipe.recv()
        return answers_of(kept)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(5)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def answers_of(kept: Iterable[Kept]) -> list[Answer]:
    """What clients kept, read."""
    return [
        read_answer(
            Answer(each.at, sent=each.sent, ended=each.ended, status=each.status, error=each.error), each.chunks
        )
        for each in kept
    ]


def read_answer(answer: Answer, chunks: Sequence[tuple[float, bytes]]) -> Answer:
    """Fill in what the chunks say: texts and times, the server's count of tokens, and what went wrong."""
    try:
        if not answer.error:
            events = list(_whole(answer, chunks) if _is_whole(chunks) else read_events(chunks))
            _take_events(answer, events)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        answer.error = f"the answer could not be read: {type(error).__name__}: {error}"
    return answer


def read_events(chunks: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, dict]]:
    r"""The server-sent events in chunks that were cut anywhere: (time of the chunk that completes it, its object).

    >>> list(read_events([(0.1, b'data: {"a": 1}\n\ndata: {"a'), (0.2, b'": 2}\n\ndata: [DONE]\n\n')]))
    [(0.1, {'a': 1}), (0.2, {'a': 2})]
    """
    rest = b""
    for at, data in chunks:
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: ") and event != b"data: [DONE]":
                yield at, json.loads(event.removeprefix(b"data: "))


def _is_whole(chunks: Sequence[tuple[float, bytes]]) -> bool:
    """Whether an answer is no stream of events."""
    return not (chunks and chunks[0][1].startswith(b"data:"))


def _whole(answer: Answer, chunks: Sequence[tuple[float, bytes]]) -> list[tuple[float, dict]]:
    """An answer in one piece, as the one event that it is."""
    body = b"".join(data for _, data in chunks)
    if answer.status != 200:
        answer.error = f"status {answer.status}: {body.decode(errors='replace')[:300]}"
        return []
    return [(answer.ended, json.loads(body))]


def _take_events(answer: Answer, events: list[tuple[float, dict]]) -> None:
    """Sum up a stream of completions or of chats, or the one object of an answer in one piece."""
    finished, texts = answer.error, []
    for at, event in events:
        if "error" in event:
            answer.error = str(event["error"])[:300]
            return
        usage = event.get("usage") or {}
        answer.n_tokens = usage.get("completion_tokens", answer.n_tokens)
        answer.n_prompt = usage.get("prompt_tokens", answer.n_prompt)
        for choice in event["choices"]:
            said = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content")
            if said:
                texts.append(said)
                answer.times.append(at)
            finished = finished or choice.get("finish_reason")
    answer.text = "".join(texts)
    if not finished:
        answer.error = "the stream ended without a finish_reason"


def summarize(answers: Sequence[Answer]) -> LoadSummary:
    """Answers in numbers; those that failed count as failed alone.

    Raises ValueError if none brought text.
    """
    good = [answer for answer in answers if not answer.error and answer.times]
    if not good:
        reasons = sorted({answer.error or "an answer without text" for answer in answers})
        raise ValueError(f"none of {len(answers)} requests brought text: {'; '.join(reasons)[:500] or 'none was sent'}")
    n_tokens = sum(answer.n_tokens for answer in good)
    seconds = max(answer.ended for answer in good) - min(answer.arrived for answer in good)
    gaps = [gap for answer in good for gap in answer.gaps] or [0.0]
    return LoadSummary(
        n_requests=len(answers), n_failed=sum(bool(answer.error) for answer in answers), n_tokens=n_tokens,
        throughput=n_tokens / max(seconds, 1e-9), first=_percentiles([answer.first for answer in good]),
        gap=(*_percentiles(gaps), max(gaps)), whole=_percentiles([answer.whole for answer in good]),
        late=max(answer.sent - answer.arrived for answer in answers),
    )  # fmt: skip


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile."""
    median, tail = np.percentile(values, (50, 99))
    return float(median), float(tail)
