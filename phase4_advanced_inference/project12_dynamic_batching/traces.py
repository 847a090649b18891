"""
Traces

This file implements requests that arrive over time, and what they experience, following:
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - Poisson arrivals,
  latency of a request by the tokens that it got
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - normalized
  latency against the rate of requests; lengths of real conversations are skewed
- "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (Agrawal et al., 2024) - the tail of the
  times between tokens

Each component is explained with paper references for educational purposes.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase4_advanced_inference.project12_dynamic_batching.timeline import Timeline


@dataclass(frozen=True)
class Lengths:
    """How long texts are: log-normal, cut off at both ends.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, section
        6.1 (figure 11: lengths of real conversations).
    PAPER CONTEXT: prompts and answers of conversations are short for the most part, with a long tail.
    INTUITION: most customers have a few things in their basket, and one has a whole week's.
    IMPLEMENTATION: exp of a normal distribution, rounded; a stand-in for the papers' data, which need a download.
    WHY: with equal lengths static batching would be as good as any other.
    """

    median: float
    spread: float = 0.8  # of the logarithm: 0 is always the median, 1 goes from a third to three times for most
    least: int = 1
    most: int = 10**9

    def draw(self, n: int, generator: np.random.Generator) -> list[int]:
        """So many lengths."""
        drawn = generator.lognormal(math.log(self.median), self.spread, n)
        return np.clip(drawn.round(), self.least, self.most).astype(int).tolist()


@dataclass(frozen=True)
class Arrival:
    """One request of a trace."""

    at: float  # seconds after the beginning
    prompt: list[int]
    n_new: int  # tokens that it wants, all of them


def make_trace(
    n_requests: int, rate: float, prompts: Lengths, outputs: Lengths, tokens: Sequence[int], seed: int = 0
) -> list[Arrival]:
    """A trace: who comes when, with how long a prompt, and how much is to be written.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 6.2.
    PAPER CONTEXT: lengths are drawn at random, arrivals are a Poisson process; each gets as many tokens as were drawn.
    INTUITION: customers do not come in step, and their baskets are not equally full.
    IMPLEMENTATION: exponential gaps of mean 1 / rate. Prompts are cut out of `tokens` at random places. Lengths are
        log-normal where the paper's are uniform: those of conversations are skewed (PagedAttention, section 6.1).
    WHY: what a policy is worth depends on how unequal requests are, so they must not be equal.

    Args:
        rate: requests per second; infinite: all at once. The same seed gives the same lengths at any rate.

    >>> trace = make_trace(3, 2.0, Lengths(4, most=8), Lengths(5), list(range(100)), seed=1)
    >>> [(round(each.at, 2), len(each.prompt), each.n_new) for each in trace]
    [(0.28, 5, 2), (0.29, 8, 10), (0.67, 5, 7)]
    """
    if n_requests < 1 or not rate > 0:
        raise ValueError(f"n_requests={n_requests} must be at least 1, and rate={rate} positive (inf: all at once)")
    generator = np.random.default_rng(seed)
    n_prompts, n_new = prompts.draw(n_requests, generator), outputs.draw(n_requests, generator)
    if max(n_prompts) > len(tokens):
        raise ValueError(f"a prompt of {max(n_prompts)} tokens cannot be cut out of {len(tokens)}: give more of them")
    places = [int(generator.integers(0, len(tokens) - n + 1)) for n in n_prompts]
    at = np.cumsum(generator.exponential(1.0, n_requests)) / rate
    cut = (list(tokens[place : place + n]) for place, n in zip(places, n_prompts))
    return [Arrival(*each) for each in zip(at.tolist(), cut, n_new)]


@dataclass
class Record:
    """What one request experienced, in seconds after the beginning."""

    arrived: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of each token

    @property
    def first(self) -> float:
        """Time to the first token."""
        return self.times[0] - self.arrived

    @property
    def gaps(self) -> list[float]:
        """Times between tokens."""
        return [b - a for a, b in zip(self.times, self.times[1:])]

    @property
    def normalized(self) -> float:
        """Seconds from arrival to end, by the tokens that came: Orca's and PagedAttention's measure."""
        return (self.times[-1] - self.arrived) / len(self.times)


@dataclass
class Summary:
    """A replay in numbers; times in seconds."""

    n_requests: int
    n_tokens: int
    throughput: float  # tokens written per second, from the first arrival to the last token
    first: tuple[float, float]  # time to the first token: median, 99th percentile
    gap: tuple[float, float, float]  # time between tokens: median, 99th percentile, longest
    normalized: tuple[float, float]  # end to end by tokens: median, 99th percentile
    occupancy: float  # rows with work, of all rows in all steps
    n_steps: int


@dataclass
class Replay:
    """What a replay has found.

    PAPER: "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", arXiv:2403.02310, section 2.
    PAPER CONTEXT: time to the first token, time between tokens with its tail, and throughput, each by itself.
    INTUITION: a mean hides the guest who waited an hour.
    IMPLEMENTATION: medians and 99th percentiles over requests, or over all gaps between tokens of all requests.
    WHY: policies trade one for another; a single number always flatters one of them.
    """

    records: list[Record]  # in the order of the trace
    timeline: Timeline

    def summary(self) -> Summary:
        """In numbers, over the requests that got all of their tokens or some of them."""
        records = [record for record in self.records if record.times]
        if not records:
            raise ValueError("no request got a token, so there is nothing to sum up: let the replay run longer")
        n_tokens = sum(len(record.times) for record in records)
        seconds = max(record.times[-1] for record in records) - min(record.arrived for record in records)
        gaps = [gap for record in records for gap in record.gaps] or [0.0]
        first, normalized = [r.first for r in records], [r.normalized for r in records]
        return Summary(
            n_requests=len(records), n_tokens=n_tokens, throughput=n_tokens / max(seconds, 1e-9),
            first=_percentiles(first, 50, 99), gap=(*_percentiles(gaps, 50, 99), max(gaps)),
            normalized=_percentiles(normalized, 50, 99), occupancy=self.timeline.occupancy,
            n_steps=self.timeline.n_steps,
        )  # fmt: skip


def _percentiles(values: Sequence[float], *which: float) -> tuple[float, ...]:
    return tuple(float(value) for value in np.percentile(values, which))


def replay(
    batcher,
    trace: Sequence[Arrival],
    params: SamplingParams | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    stopping: Callable[[], bool] = lambda: False,
) -> Replay:
    """Serve a trace in real time.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 6.2.
    PAPER CONTEXT: requests are sent at the times of the trace, whether the system keeps up or not; latency is then
        plotted against the throughput that was reached.
    INTUITION: the queue at a counter tells how good it is, and customers do not wait at home until it is short.
    IMPLEMENTATION: an open loop: who is due is added, then a step is taken; with nobody there it sleeps until the next
        arrival. Each request gets exactly its `n_new` tokens, and its own seed.
    WHY: a closed loop (the next one comes when one has left) would slow arrivals down with the system, and hide queues.

    Args:
        batcher: with nothing to do yet; params: how tokens are drawn; their number and seed are the trace's.
        clock, sleep: of the real world; tests bring their own. stopping: asked before each step.
    """
    if batcher.busy:
        raise ValueError("this batcher serves other requests: let it finish them, or take another one")
    longest = max((len(arrival.prompt) + arrival.n_new for arrival in trace), default=0)
    if longest > batcher.room:
        raise ValueError(f"a text of this trace has {longest} tokens, a row has room for {batcher.room}: draw shorter "
                         f"ones, or raise the capacity")  # fmt: skip
    params = params or SamplingParams(temperature=0.0)
    timeline, records = Timeline(batcher.n_rows), [Record(arrival.at) for arrival in trace]
    places, due = {}, deque(sorted(range(len(trace)), key=lambda i: trace[i].at))
    began = clock()
    while (due or batcher.busy) and not stopping():
        now = clock() - began
        while due and trace[due[0]].at <= now:
            place = due.popleft()
            request = batcher.add(trace[place].prompt, own_params(trace, place, params))
            places[request.index] = place
        if not batcher.busy:
            sleep(trace[due[0]].at - now)
            continue
        pieces = batcher.step()
        ended = clock() - began
        timeline.note(batcher.last, places, now, ended)
        for piece in pieces:
            if piece.token is not None:
                records[places[piece.index]].times.append(ended)
                records[places[piece.index]].tokens.append(piece.token)
    batcher.reset()
    return Replay(records, timeline)


def own_params(trace: Sequence[Arrival], place: int, params: SamplingParams) -> SamplingParams:
    """What request `place` of a trace wants: as many tokens as drawn, no less, with a seed of its own."""
    seed = place if params.seed is None else params.seed + place
    return replace(params, max_new_tokens=trace[place].n_new, seed=seed, stop=(), stop_ids=())
