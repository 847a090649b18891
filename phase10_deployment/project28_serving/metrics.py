"""
Metrics

This file implements what a dashboard reads of a server following:
- "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (Agrawal et al., 2024) - time to first token,
  and time between tokens
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - latencies are watched where the
  clients see them

Each component is explained with paper references for educational purposes.
"""

import itertools
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from phase3_core_inference.project8_kv_cache.texts import Piece
from phase10_deployment.project28_serving.answers import Answers
from phase10_deployment.project28_serving.engine import Gauges

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 50000)
NOW = {  # name -> (meaning, of the gauges)
    "num_requests_running": ("Texts that have a row of the engine", lambda g: g.running),
    "num_requests_waiting": ("Texts in the queue", lambda g: g.waiting),
    "kv_cache_usage_perc": ("Part of the KV blocks in use; 1 is all", lambda g: g.usage),
}
SUMS = {  # name -> (meaning, of the gauges); an engine counts them from its start
    "num_preemptions": ("Times that a text had to leave its row", lambda g: g.preempted),
    "prefix_cache_queries": ("Tokens of prompts that were looked up", lambda g: g.asked),
    "prefix_cache_hits": ("Tokens of prompts that were found", lambda g: g.found),
    "spec_decode_num_draft_tokens": ("Tokens that were guessed", lambda g: g.drafted),
    "spec_decode_num_accepted_tokens": ("Guessed tokens that stayed", lambda g: g.kept),
}
HISTOGRAMS = {
    "time_to_first_token_seconds": ("From the request to its first token", SECONDS),
    "inter_token_latency_seconds": ("Between two tokens of a text", SECONDS),
    "e2e_request_latency_seconds": ("From the request to the end of the text", SECONDS),
    "request_queue_time_seconds": ("From the request to its first step", SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt", TOKENS),
    "request_generation_tokens": ("Tokens of a text", TOKENS),
}


class _Histogram:
    """How often which values came, for one model.

    The library's own takes ten times as long, for locks that an event loop does not need, and each token is counted.

    Args:
        name, meaning: as dashboards show them; bounds: of the buckets, from small to large.
    """

    def __init__(self, name: str, meaning: str, bounds: Sequence[float], model_name: str):
        self.name, self.meaning, self.bounds, self.model_name = name, meaning, bounds, model_name
        self.counts, self.total = [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Such a value has come."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def collect(self) -> Iterator:
        """What the registry asks for."""
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(self.name, self.meaning, labels=["model_name"])
        ends = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        family.add_metric([self.model_name], list(zip(ends, itertools.accumulate(self.counts))), self.total)
        yield family


class Metrics:
    """Counters and clocks of one server.

    PAPER: "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", arXiv:2403.02310, section 2.4.
    PAPER CONTEXT: time to first token and time between tokens are what users feel; operators also want throughput.
    INTUITION: the instruments of a car: speed, fuel, temperature, and how often the engine stalled.
    IMPLEMENTATION: prometheus_client, under the names that vLLM gave these metrics, which public dashboards ask for.
        The engine's own numbers come with every step; an engine that was restarted counts from zero, the sums do not.
    WHY: what is not measured in operation is found out by the users.

    Args:
        model_name: the label of all of them. Use `create_metrics`.
    """

    def __init__(self, model_name: str):
        from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics

        disable_created_metrics()  # series that tell when each counter was made, which no dashboard asks for
        self.registry = CollectorRegistry()

        def make(kind, name: str, meaning: str):
            metric = kind(name, meaning, ["model_name"], registry=self.registry)
            return metric.labels(model_name=model_name)

        self._now = {name: make(Gauge, f"vllm:{name}", meaning) for name, (meaning, _) in NOW.items()}
        self._sums = {name: make(Counter, f"vllm:{name}", meaning) for name, (meaning, _) in SUMS.items()}
        self._times = {
            name: _Histogram(f"vllm:{name}", meaning, bounds, model_name)
            for name, (meaning, bounds) in HISTOGRAMS.items()
        }
        for histogram in self._times.values():
            self.registry.register(histogram)
        self._read = make(Counter, "vllm:prompt_tokens", "Tokens of prompts")
        self._written = make(Counter, "vllm:generation_tokens", "Tokens that were written")
        self._restarts = make(Gauge, "engine_restarts", "Times that the engine was started anew")
        ended = Counter("vllm:request_success", "Texts that ended", ["model_name", "finished_reason"],
                        registry=self.registry)  # fmt: skip
        self._ended = {reason: ended.labels(model_name, reason) for reason in ("stop", "length", "abort", "error")}
        self._http = Counter("http_requests", "Requests that were answered", ["method", "path", "status"],
                             registry=self.registry)  # fmt: skip
        self._last = Gauges()

    def begun(self, answers: Answers, place: int, seconds: float) -> None:
        """A text has got its first step, after so long a wait."""
        n_prompt = len(answers.asks[place].prompt)
        self._times["request_queue_time_seconds"].observe(seconds)
        self._times["request_prompt_tokens"].observe(n_prompt)
        self._read.inc(n_prompt)

    def piece(self, answers: Answers, place: int, piece: Piece) -> None:
        """A token has come."""
        now, clock = time.monotonic(), answers.clocks[place]
        if clock.n_tokens:
            self._times["inter_token_latency_seconds"].observe(now - clock.last)
        else:
            self._times["time_to_first_token_seconds"].observe(now - answers.began)
        clock.last, clock.n_tokens = now, clock.n_tokens + 1
        if piece.finish_reason:
            self._times["e2e_request_latency_seconds"].observe(now - answers.began)
            self._times["request_generation_tokens"].observe(clock.n_tokens)
            self._ended[piece.finish_reason].inc()

    def step(self, n_tokens: int) -> None:
        """A step has given so many tokens."""
        self._written.inc(n_tokens)

    def aborted(self, n: int) -> None:
        """So many texts were called off, as nobody waited for them any more."""
        self._ended["abort"].inc(n)

    def failed(self, n: int) -> None:
        """So many texts could not be written to their end."""
        self._ended["error"].inc(n)

    def lost(self, gauges: Gauges) -> None:
        """The engine is gone; this was the last that it said of itself. The next one counts from zero."""
        self._add(gauges)
        self._last = Gauges()

    def _add(self, gauges: Gauges) -> None:
        """Add what the engine has counted since the last time."""
        for name, (_, value) in SUMS.items():
            self._sums[name].inc(max(0, value(gauges) - value(self._last)))
        self._last = gauges

    def answered(self, method: str, path: str, status: int) -> None:
        """A request was answered; path: of the route, not what the client wrote."""
        self._http.labels(method, path, str(status)).inc()

    def page(self, gauges: Gauges, n_restarts: int) -> bytes:
        """All of it in Prometheus's format."""
        from prometheus_client import generate_latest

        for name, (_, value) in NOW.items():
            self._now[name].set(value(gauges))
        self._add(gauges)
        self._restarts.set(n_restarts)
        return generate_latest(self.registry)


def create_metrics(model_name: str) -> Metrics:
    """The metrics of a server of this model."""
    return Metrics(model_name)
