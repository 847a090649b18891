"""Measure project 28: what a server costs beside its engine, and what clients experience.

    uv run python phase10_deployment/project28_serving/benchmark.py
    uv run python phase10_deployment/project28_serving/benchmark.py --parts first_token throughput
    uv run python phase10_deployment/project28_serving/benchmark.py --quick

checks: greedy texts are those of `transformers serve`. first_token: the engine's time to the first token, and what HTTP
adds. throughput: many requests at once, by the engine alone and over HTTP. streams: round after round of concurrent
streams, errors and memory. concurrency: throughput and first token by the number of streams, drawn. arrivals: requests
that come by themselves. forms: what a JSON schema costs. leaving: how soon the blocks of a client who left are free.
adapters: one, and several in one batch. Peer: `transformers serve` with continuous batching and the same files.
"""

import functools
import json
import math
import random
import shutil
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from common.benchmark import Report, run_parts
from common.plots import curves
from common.run import Run
from phase4_advanced_inference.project12_dynamic_batching.traces import Arrival, Lengths, make_trace, replay
from phase10_deployment.project28_serving import benchmark_config
from phase10_deployment.project28_serving.costs import (
    check_whole,
    measure_adapters,
    measure_first_token,
    measure_forms,
    measure_leaving,
)
from phase10_deployment.project28_serving.engine import EngineOptions, build_engine
from phase10_deployment.project28_serving.load import Clients, summarize
from phase10_deployment.project28_serving.peers import (
    NAME,
    Served,
    allow_many_connections,
    our_command,
    their_command,
    words_of,
    write_model,
)
from phase10_deployment.project28_serving.sending import COMPLETIONS, Order

SHAPES = {
    "tiny": {"vocab_size": 2048, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_kv_head": 2, "n_ff": 128},
    "small": {"vocab_size": 8192, "n_layer": 6, "n_embd": 256, "n_head": 8, "n_kv_head": 2, "n_ff": 768},
    "1.1B": {"vocab_size": 32768, "n_layer": 22, "n_embd": 2048, "n_head": 32, "n_kv_head": 8, "n_ff": 5632},
}
PEER = "transformers serve"
LEFT_PERCENT = 90.0  # goal


def main(argv=None):
    """Run all parts and write the results; a part that fails leaves the others alone."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = benchmark_config.quick(run.settings) if run.settings.QUICK else run.settings
        folder = s.FOLDER or (tempfile.mkdtemp(prefix="quick-") if s.QUICK else None)
        report = Report("project28_serving", "Serving", run.device, folder, keep=len(s.PARTS) < len(PARTS))
        bench = _Bench(s, run.device)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end, too
        try:
            parts = {part: functools.partial(PARTS[part], report, s, bench) for part in s.PARTS}
            run_parts(report, parts, torch.cuda.empty_cache if run.device.type == "cuda" else None)
        finally:
            bench.close()
            signal.signal(signal.SIGTERM, before)


class _Bench:
    """A model in a folder, and what serves it; each is started when it is first asked for."""

    def __init__(self, s, device):
        allow_many_connections()
        self.s, self.device = s, device
        self.dtype = "bfloat16" if device.type == "cuda" else "float32"
        self.folder = Path(tempfile.mkdtemp(prefix="project28-"))
        self.room = max(s.LONGEST, s.LONG_PROMPT) + max(s.NEW_TOKENS, 64)
        self.model, self.draw = self.folder / "model", random.Random(s.SEED)
        self.tokenizer = write_model(self.model, SHAPES[s.MODEL], self.room, device, s.SEED)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the memory is the servers'

    @functools.cached_property
    def clients(self):
        return Clients(self.s.PROCESSES)

    @functools.cached_property
    def engine(self):
        """An engine in this process, made of the same options as the server's."""
        s = self.s
        return build_engine(EngineOptions(
            str(self.model), str(self.device), self.dtype, max_running=s.N_ROWS, context=self.room, page=s.PAGE,
            kv_cache_memory=s.KV_MIB * 2**20, max_batch_tokens=s.MAX_TOKENS, graphs=self.device.type == "cuda",
            compiled=s.COMPILED,
        ))  # fmt: skip

    @functools.cached_property
    def ours(self):
        return self.serve("ours")

    def serve(self, name, *flags, model=None, dtype=None, mib=None):
        """Our server."""
        s = self.s
        command = our_command(model or self.model, [
            "--device", self.device.type, "--dtype", dtype or self.dtype, "--max_running", str(s.N_ROWS),
            "--page", str(s.PAGE), "--kv_cache_memory", str(mib or s.KV_MIB), "--max_batch_tokens", str(s.MAX_TOKENS),
            *(["--compiled"] if s.COMPILED else []), *flags,
        ])  # fmt: skip
        return Served(name, NAME, command, self.folder / f"{name}.log")

    @functools.cached_property
    def theirs(self):
        """The peer's server, or None if it is not to be measured."""
        return self.serve_theirs("theirs") if self.s.PEER else None

    def serve_theirs(self, name, model=None, dtype=None):
        """The peer's server; on a GPU it finds most of its sizes itself."""
        s, gpu = self.s, self.device.type == "cuda"
        pages = s.N_ROWS * (-(-(s.LONGEST + s.NEW_TOKENS) // 256) + 1)
        flags = ["--cb-max-memory-percent", str(s.KV_PART)] if gpu else [
            "--cb-max-batch-tokens", str(s.MAX_TOKENS), "--cb-num-blocks", str(pages)]  # fmt: skip
        model = str(model or self.model)
        command = their_command(model, self.device.type, dtype or self.dtype, flags, s.PEER_START)
        return Served(name, model, command, self.folder / f"{name}.log")

    @property
    def servers(self):
        """name -> server."""
        return {"ours": self.ours, **({PEER: self.theirs} if self.theirs else {})}

    def prompt(self, n):
        """Words that nobody has asked about before."""
        return self.draw.choices(words_of(self.tokenizer), k=n)

    def trace(self, n=None):
        """Requests that are all there at once, prompts of all lengths, each to be continued by as many tokens."""
        s = self.s
        lengths = random.Random(s.SEED).choices(range(s.SHORTEST, s.LONGEST + 1), k=n or s.N_REQUESTS)
        return [Arrival(0.0, self.prompt(length), s.NEW_TOKENS) for length in lengths]

    def run(self, server, trace, stream=True, **fields):
        """Send a trace to a server: the answers."""
        return self.clients.run(server.url, [self.order(server, each, stream, **fields) for each in trace])

    def order(self, server, arrival, stream=True, **fields):
        """A greedy request for exactly so many tokens."""
        body = {"model": server.model, "prompt": self.tokenizer.decode(arrival.prompt), "max_tokens": arrival.n_new,
                "temperature": 0.0, "stream": stream, **fields}  # fmt: skip
        if server.model != NAME:  # the peer
            config = {"max_new_tokens": arrival.n_new, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
            return Order(arrival.at, COMPLETIONS, body | {"generation_config": json.dumps(config)})
        usage = {"stream_options": {"include_usage": True}} if stream else {}
        return Order(arrival.at, COMPLETIONS, body | {"ignore_eos": True} | usage)

    def close(self):
        """End all of it."""
        for name in ("clients", "ours", "theirs"):
            if self.__dict__.get(name) is not None:
                self.__dict__[name].close()
        shutil.rmtree(self.folder, ignore_errors=True)


# -- checks


def check(report, s, bench):
    """Greedy texts in float32: streamed, in one piece, and those of the peer."""
    folder = bench.folder / "checked"
    tokenizer = write_model(folder, SHAPES["tiny"], bench.room, bench.device, s.SEED, std=0.2)
    draw = random.Random(s.SEED)
    trace = [Arrival(0.0, draw.choices(words_of(tokenizer), k=draw.randint(2, 40)), 24) for _ in range(12)]
    with bench.serve("checked", model=folder, dtype="float32", mib=64) as server:
        streamed, whole = (bench.run(server, trace, stream) for stream in (True, False))
        check_whole(report, "streamed", streamed, trace)
        report.check("a stream, put together, is the whole answer", texts(streamed) == texts(whole),
                     f"{len(set(texts(whole)))} different texts of {len(trace)}")  # fmt: skip
        if not s.PEER:
            return
        with bench.serve_theirs("theirs-checked", folder, "float32") as peer:
            theirs = bench.run(peer, trace, stream=False)
    same = sum(a == b for a, b in zip(texts(whole), texts(theirs)))
    report.check(f"float32, greedy: the texts of {PEER}", same == len(trace), f"{same} of {len(trace)}")


def texts(answers):
    """What was written."""
    return [answer.text for answer in answers]


# -- throughput


def measure_throughput(report, s, bench):
    """All requests at once: the engine alone, over HTTP streamed and in one piece, and the peer, in turn."""
    engine, rates, answers = bench.engine, {}, {}
    for number in range(1 + s.REPEATS):
        found = {"engine": replay(engine, bench.trace()).summary().throughput}
        for kind, server, stream in (("streamed", bench.ours, True), ("whole", bench.ours, False),
                                     (PEER, bench.theirs, True)):  # fmt: skip
            if server is not None:
                answers[kind] = bench.run(server, trace := bench.trace(), stream)
                found[kind] = summarize(answers[kind]).throughput
        for kind, rate in found.items() if number else ():  # the first round warms up
            rates.setdefault(kind, []).append(rate)
    for kind, last in answers.items():
        check_whole(report, f"{s.MODEL}: throughput, {kind}", last, trace)
    name = f"{s.MODEL}: {s.N_REQUESTS} prompts of {s.SHORTEST}-{s.LONGEST}, {s.NEW_TOKENS} new tokens each"
    alone = statistics.median(rates["engine"])
    for kind, how in (("streamed", "streamed"), ("whole", "in one piece")):
        measured = sorted(rates[kind])
        report.row(f"{name}, {how} over HTTP", statistics.median(measured), "tok/s", peer=alone,
                   peer_name="the engine alone", spread=(measured[0], measured[-1]))  # fmt: skip
    left = [100 * a / b for a, b in zip(rates["streamed"], rates["engine"])]
    report.row(f"{name}: left of the engine's throughput, streamed", statistics.median(left), "%", limit=LEFT_PERCENT,
               limit_name="goal", spread=(min(left), max(left)),
               note=f"clients in {s.PROCESSES} processes of their own")  # fmt: skip
    if PEER in rates:
        report.row(f"{name}, streamed, both over HTTP", statistics.median(rates["streamed"]), "tok/s",
                   peer=statistics.median(rates[PEER]), peer_name=PEER)  # fmt: skip


# -- streams


def measure_streams(report, s, bench):
    """Concurrent streams, round after round: no error, and memory that does not grow."""
    memory, failed, spent = [], 0, 0.0
    for _ in range(s.ROUNDS):
        answers = bench.run(bench.ours, bench.trace(s.N_STREAMS))
        summary = summarize(answers)
        failed, spent = failed + summary.n_failed, spent + summary.n_tokens
        memory.append(bench.ours.memory())
    name = f"{s.MODEL}: {s.N_STREAMS} concurrent streams, {s.ROUNDS} rounds"
    report.check(f"{name}: no error", not failed, f"{failed} of {s.ROUNDS * s.N_STREAMS} failed, {spent:,.0f} tokens")
    for process in memory[0]:
        sizes = [each[process] / 2**20 for each in memory]
        bound = max(1.05 * sizes[1], sizes[1] + 16)
        report.check(f"{name}: memory of the {process} does not grow", max(sizes[2:]) < bound,
                     f"MiB: {', '.join(f'{size:.0f}' for size in sizes)}")  # fmt: skip
        report.row(f"{name}: resident memory of the {process}", sizes[-1], "MiB", higher_is_better=False,
                   note=f"{sizes[1]:.0f} after the second round")  # fmt: skip


def measure_concurrency(report, s, bench):
    """Throughput and first token by the number of streams that are asked for at once, drawn."""
    rates, firsts = ({name: ([], []) for name in bench.servers} for _ in range(2))
    for n in s.CONCURRENT:
        found = {name: [] for name in bench.servers}
        for _ in range(1 + s.REPEATS):
            for name, server in bench.servers.items():
                found[name].append(summarize(bench.run(server, bench.trace(n))))
        rate, first = ({name: statistics.median(value(each) for each in found[name][1:]) for name in found}
                       for value in (lambda each: each.throughput, lambda each: 1e3 * each.first[0]))  # fmt: skip
        peer = {"peer_name": PEER} if PEER in found else {}
        report.row(f"{s.MODEL}: {n} asked for at once", rate["ours"], "tok/s", peer=rate.get(PEER), **peer)
        report.row(f"{s.MODEL}: {n} asked for at once, first token, median", first["ours"], "ms", peer=first.get(PEER),
                   higher_is_better=False, **peer)  # fmt: skip
        for lines, values in ((rates, rate), (firsts, first)):
            for name, (xs, ys) in lines.items():
                xs.append(n)
                ys.append(values[name])
    for kind, lines, label in (("throughput", rates, "tokens/s"), ("first", firsts, "first token, median, ms")):
        for name, line in lines.items():
            report.series(f"{kind}, {name}", *line)
        path = report.folder / f"project28_serving.{kind}.{report.slug}.png"
        title = f"{s.MODEL}, {s.NEW_TOKENS} new tokens, over HTTP"
        curves(path, lines, "streams at once", label, title, logx=True, logy=True)


# -- arrivals


def measure_arrivals(report, s, bench):
    """Requests of skewed lengths that come by themselves, at parts of the rate that we can serve."""
    lengths = Lengths(s.LONGEST / 3, 0.8, 1, s.LONGEST), Lengths(s.NEW_TOKENS / 3, 0.8, 1, s.NEW_TOKENS)
    seeds = iter(range(s.SEED, s.SEED + 10**6))

    def trace(n, rate):
        return make_trace(n, rate, *lengths, bench.prompt(2**16), next(seeds))

    for server in bench.servers.values():
        bench.run(server, trace(s.N_REQUESTS, math.inf))
    at_once = summarize(bench.run(bench.ours, trace(s.N_REQUESTS, math.inf)))
    full = at_once.throughput / at_once.n_tokens * at_once.n_requests
    for part in s.LOADS:
        rate, found = part * full, {name: [] for name in bench.servers}
        for _ in range(s.REPEATS):
            same = trace(max(4, round(rate * s.SECONDS)), rate)
            for name, server in bench.servers.items():
                found[name] += bench.run(server, same)
        sums = {name: summarize(answers) for name, answers in found.items()}
        name, ours = f"{s.MODEL}: {part:.0%} of our full rate", sums["ours"]
        report.check(f"{name}: no error", not any(each.n_failed for each in sums.values()),
                     ", ".join(f"{who}: {each.n_failed} of {each.n_requests}" for who, each in sums.items())
                     )  # fmt: skip
        note = f"{rate:.2f} requests/s, {ours.n_requests} of them; sent at most {ours.late * 1e3:.0f} ms late"
        for what, value in (
            ("first token, median", lambda each: each.first[0]), ("first token, 99%", lambda each: each.first[1]),
            ("time between tokens, median", lambda each: each.gap[0]),
            ("time between tokens, 99%", lambda each: each.gap[1]), ("end to end, median", lambda each: each.whole[0]),
        ):  # fmt: skip
            peer = {"peer": 1e3 * value(sums[PEER]), "peer_name": PEER} if PEER in sums else {}
            report.row(f"{name}, {what}", 1e3 * value(ours), "ms", higher_is_better=False, note=note, **peer)
            note = ""


PARTS = {"checks": check, "first_token": measure_first_token, "throughput": measure_throughput,
         "streams": measure_streams, "concurrency": measure_concurrency, "arrivals": measure_arrivals,
         "forms": measure_forms, "leaving": measure_leaving, "adapters": measure_adapters}  # fmt: skip


if __name__ == "__main__":
    main()
