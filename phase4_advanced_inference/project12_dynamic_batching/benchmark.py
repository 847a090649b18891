"""Measure project 12: throughput and latency of requests that arrive over time, by how they share the batch.

    uv run python phase4_advanced_inference/project12_dynamic_batching/benchmark.py
    uv run python phase4_advanced_inference/project12_dynamic_batching/benchmark.py --parts rates

checks: whatever the policy, each text is the one that is written alone. timeline: who was in the batch, drawn.
selective: mixed steps, attention on one grid and by size. rates: one trace at several rates of arrival; the throughput
that keeps latency below a bound. stalls: the longest waits between tokens while long prompts are read. offline: all
requests at once. peers: `transformers`' continuous batching.

Three policies: chunks (a budget of tokens a step: Sarathi-Serve), whole prompts (Orca), and static batches. All run the
same loop with the same kernels. Lengths are log-normal, arrivals Poisson, the loop is open, sampling greedy.
"""

import dataclasses
import functools
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from common.benchmark import Report, measure, run_parts
from common.device import synchronize
from common.plots import curves
from common.plots import timeline as draw_timeline
from common.run import Run
from phase1_foundation.project3_pretrain.hub import to_huggingface
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.decoder import Decoder, FastDecoder
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase4_advanced_inference.project12_dynamic_batching import benchmark_config
from phase4_advanced_inference.project12_dynamic_batching.batcher import Batcher
from phase4_advanced_inference.project12_dynamic_batching.capacity import GangSlots, Slots
from phase4_advanced_inference.project12_dynamic_batching.selective import selective_step
from phase4_advanced_inference.project12_dynamic_batching.traces import Lengths, make_trace, own_params, replay

CLAIM = "36.9× (Orca against FasterTransformer, GPT-3 175B, abstract)"
STALL_CLAIM = "no stalls of decodes by prompts (Sarathi-Serve, section 4)"
CHUNKS, WHOLE, STATIC = "continuous, chunks", "continuous, whole prompts", "static"
SHAPES = {
    "small": {"vocab_size": 8192, "n_layer": 6, "n_embd": 384, "n_head": 6, "n_kv_head": 2, "n_ff": 1024},
    "1.1B": {"vocab_size": 32768, "n_layer": 22, "n_embd": 2048, "n_head": 32, "n_kv_head": 8, "n_ff": 5632},
}
SHORT_LENGTHS = (Lengths(48, 0.8, 1, 192), Lengths(32, 0.8, 1, 128))  # of what is checked and drawn


def main(argv=None):
    """Run all parts and write the results; a part that fails leaves the others alone."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = run.settings
        bench = _Bench(s, run.device)
        report = Report("project12_dynamic_batching", "Dynamic batching", run.device, keep=len(s.PARTS) < len(PARTS))
        parts = {part: functools.partial(PARTS[part], report, s, bench) for part in s.PARTS}
        run_parts(report, parts, torch.cuda.empty_cache if run.device.type == "cuda" else None)


# -- the model, its batchers, its traces


class _Bench:
    """A model with random weights, and batchers of each policy that are ready to run."""

    def __init__(self, s, device):
        self.s, self.device, self.on_gpu = s, device, device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.longest = s.LONGEST_PROMPT + s.LONGEST_NEW
        self.model = self.build(s.MODEL, self.dtype)
        self._ready = {}

    def build(self, name, dtype, **fields):
        """A model of this shape."""
        torch.manual_seed(self.s.SEED)
        with self.device:
            shape = SHAPES[name] | {"block_size": -(-self.longest // 64) * 64} | fields
            return Transformer(PRESETS["llama-7b"](**shape)).to(dtype).eval().requires_grad_(False)

    def batcher(self, policy, model=None, n_rows=None, max_tokens=None, cache=None):
        """A new batcher of this policy; on a GPU its decode steps are recorded already."""
        s, model, n_rows = self.s, model or self.model, n_rows or self.s.N_ROWS
        batcher = Batcher(model, NumberTokenizer(model.config.vocab_size), n_rows, self.longest, cache=cache or s.CACHE,
                          max_tokens=(max_tokens or s.MAX_TOKENS) if policy == CHUNKS else n_rows * self.longest,
                          slots=GangSlots if policy == STATIC else Slots, graphs=self.on_gpu)  # fmt: skip
        record(batcher)
        return batcher

    def ready(self, policy):
        """The batcher of this policy, which has served some requests already."""
        if policy not in self._ready:
            self._ready[policy] = self.batcher(policy)
            replay(self._ready[policy], self.trace(math.inf)[:: max(1, self.s.N_REQUESTS // self.s.N_ROWS)])
        return self._ready[policy]

    def trace(self, rate, n=None, prompts=None, outputs=None):
        """The trace at this rate: its requests are always the same."""
        s = self.s
        prompts = prompts or Lengths(s.PROMPT_TOKENS, s.SPREAD, 1, s.LONGEST_PROMPT)
        outputs = outputs or Lengths(s.NEW_TOKENS, s.SPREAD, 1, s.LONGEST_NEW)
        tokens = torch.randint(0, SHAPES["small"]["vocab_size"], (4 * s.LONGEST_PROMPT,),
                               generator=torch.Generator().manual_seed(s.SEED)).tolist()  # fmt: skip
        return make_trace(n or s.N_REQUESTS, rate, prompts, outputs, tokens, s.SEED)

    def full_rate(self, **lengths):
        """Requests per second of the policy with chunks if all are there at once."""
        trace = self.trace(math.inf, **lengths)
        batcher = self.ready(CHUNKS)
        replay(batcher, trace)
        return len(trace) / timed(self.device, batcher, trace)


@torch.no_grad()
def record(batcher):
    """Record the decode steps of a batcher in advance, for all numbers of rows, as a server would when it starts."""
    for n in range(1, batcher.n_rows + 1) if isinstance(batcher.decoder, FastDecoder) else ():
        batcher.decoder.step([(row, 1, 1) for row in range(n)], [0] * n)
        for row in range(n):
            batcher.cache.free(row)


def timed(device, batcher, trace):
    """Seconds to serve a trace whose requests are all there."""
    synchronize(device)
    began = time.perf_counter()
    replay(batcher, trace)
    synchronize(device)
    return time.perf_counter() - began


# -- checks


def check(report, s, bench):
    """Texts of all policies in float32, greedy and sampled, are those that are written alone."""
    model = bench.build("small", torch.float32)
    torch.set_float32_matmul_precision("highest")
    trace = bench.trace(math.inf, 24, *SHORT_LENGTHS)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=s.SEED)
        alone = [generate(model, NumberTokenizer(8192), each.prompt, own_params(trace, place, params)).tokens
                 for place, each in enumerate(trace)]  # fmt: skip
        for policy in (CHUNKS, WHOLE, STATIC):
            found = replay(bench.batcher(policy, model, 8, cache="contiguous"), trace, params)
            same = sum(record.tokens == text for record, text in zip(found.records, alone))
            report.check(f"{policy}, temperature {temperature:g}: each text is what it is alone", same == len(trace),
                         f"{same} of {len(trace)} texts, {sum(map(len, alone)):,} tokens, float32")  # fmt: skip


# -- timeline


class _StepClock:
    """A clock by which every step takes one: pictures that do not depend on the machine."""

    def __init__(self, batcher):
        self.now, step = 0.0, batcher.step

        def counted():
            self.now += 1
            return step()

        batcher.step = counted

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def measure_timeline(report, s, bench):
    """Eight rows, 32 requests, time counted in steps: static and continuous, below each other."""
    model = bench.build("small", bench.dtype, n_layer=1)
    panels, steps, use = {}, {}, {}
    for policy in (STATIC, CHUNKS):
        batcher = bench.batcher(policy, model, 8, 64)
        clock = _StepClock(batcher)
        found = replay(batcher, bench.trace(0.2, 32, *SHORT_LENGTHS), None, clock, clock.sleep)
        panels["static batching" if policy == STATIC else "continuous batching"] = found.timeline.spans()
        steps[policy], use[policy] = clock.now, found.timeline.occupancy
    draw_timeline(report.folder / f"project12_dynamic_batching.timeline.{report.slug}.png", panels, "step", "row",
                  "Who is in the batch (dark: reads its prompt)")  # fmt: skip
    report.row("32 requests that come over 160 steps, 8 rows: steps until all are done", steps[CHUNKS], "steps",
               peer=steps[STATIC], peer_name=STATIC, higher_is_better=False,
               note=f"rows in use {use[CHUNKS]:.0%}, static {use[STATIC]:.0%}; time counted in steps")  # fmt: skip


# -- selective batching


@torch.no_grad()
def measure_selective(report, s, bench):
    """Mixed steps with one grid for all, and with one for each size of work; rows in one piece, nothing recorded."""
    model, past = bench.model, s.LONGEST_PROMPT // 4
    cache = ContiguousCache(model.specs, s.N_ROWS, bench.longest, bench.dtype, bench.device)
    decoder, lengths = Decoder(model, cache), Lengths(s.PROMPT_TOKENS, s.SPREAD, 1, s.LONGEST_PROMPT)
    chunk, prompts = s.MAX_TOKENS - s.N_ROWS + 1, lengths.draw(8, np.random.default_rng(s.SEED))
    kinds = {
        f"{s.N_ROWS - 1} decodes and a chunk of {chunk}": [1] * (s.N_ROWS - 1) + [chunk],
        f"{min(8, s.N_ROWS)} whole prompts of {min(prompts)} to {max(prompts)}": prompts[: s.N_ROWS],
    }

    def run(step, sizes):
        cache.lengths[:] = [past] * s.N_ROWS  # what was not written is zeros: they cost the same
        step(decoder, [(row, n, 1) for row, n in enumerate(sizes)], [1] * sum(sizes))

    for name, sizes in kinds.items():
        calls = {step: functools.partial(run, step, sizes) for step in (selective_step, Decoder.step)}
        timings = measure(calls, s.REPEATS + 2, 2, bench.device)
        report.row(f"{s.MODEL}, a step of {name}, attention by size", timings[selective_step].median * 1e3, "ms",
                   peer=timings[Decoder.step].median * 1e3, peer_name="one grid for all", higher_is_better=False,
                   note=f"behind {past} tokens each")  # fmt: skip


# -- rates


def measure_rates(report, s, bench):
    """Latency against throughput: the trace at several rates, all policies in turn at each."""
    full, lone = bench.full_rate(), lone_latency(bench)
    bound, lines = s.BOUND * lone, {policy: ([], []) for policy in (CHUNKS, WHOLE, STATIC)}
    tails = {policy: [] for policy in lines}
    for fraction in sorted(s.RATES):
        for policy, (xs, ys) in lines.items():
            found = replay(bench.ready(policy), bench.trace(fraction * full)).summary()
            xs.append(found.throughput)
            ys.append(found.normalized[0])
            tails[policy].append((found.first[0], found.occupancy))
            print(
                f"{fraction:4.0%} of {full:.1f} requests/s, {policy}: {found.throughput:,.0f} tokens/s, "
                f"{found.normalized[0] * 1e3:.1f} ms a token, first after {found.first[0] * 1e3:.0f} ms",
                flush=True,
            )
    reached = {policy: at_bound(*line, bound) for policy, line in lines.items()}
    for policy in (CHUNKS, WHOLE):
        report.row(f"{s.MODEL}, {policy}: tokens/s at equal latency", reached[policy][0], "tok/s", claim=CLAIM,
                   peer=reached[STATIC][0], peer_name="static batching, same loop and kernels",
                   note=f"median latency a token at most {s.BOUND:g} times the {lone * 1e3:.1f} ms of a lone request"
                        f"{reached[policy][1].replace(' likewise', '')}; static{reached[STATIC][1]}")  # fmt: skip
    for i, fraction in enumerate(sorted(s.RATES)):
        report.row(f"{s.MODEL}, {fraction:.0%} of the full rate, {CHUNKS}: median latency a token",
                   lines[CHUNKS][1][i] * 1e3, "ms", peer=lines[STATIC][1][i] * 1e3, peer_name=STATIC,
                   higher_is_better=False, note=told(fraction * full, lines, tails, i))  # fmt: skip
    for policy, line in lines.items():
        report.series(f"median seconds a token by tokens/s, {policy}", *line)
    shown = {policy: (xs, [1e3 * y for y in ys]) for policy, (xs, ys) in lines.items()}
    curves(report.folder / f"project12_dynamic_batching.{report.slug}.png", shown, "tokens per second",
           "median ms, end to end, a token", f"Latency against throughput, {s.MODEL}, {s.N_ROWS} rows",
           hlines={f"{s.BOUND:g} times a lone request": bound * 1e3})  # fmt: skip


def told(rate, lines, tails, i):
    """What one rate was like for each policy."""
    each = (f"{policy}: {xs[i]:,.0f} tokens/s, {ys[i] * 1e3:.1f} ms, first token after {tails[policy][i][0] * 1e3:,.0f}"
            f" ms, rows in use {tails[policy][i][1]:.0%}" for policy, (xs, ys) in lines.items())  # fmt: skip
    return f"{rate:.2f} requests/s; " + "; ".join(each)


def lone_latency(bench):
    """Median seconds a token of requests that come one after the other."""
    batcher, trace = bench.ready(CHUNKS), bench.trace(math.inf)[:12]
    alone = [replay(batcher, [dataclasses.replace(each, at=0.0)]).records[0] for each in trace]
    return statistics.median(record.normalized for record in alone)


def at_bound(throughputs, latencies, bound):
    """(the highest throughput whose latency stays below a bound, what is to be said of it); between rates: a line.

    >>> at_bound([10, 20, 30], [1.0, 2.0, 4.0], 3.0), at_bound([10, 20], [1.0, 2.0], 3.0)[0]
    ((25.0, ' likewise'), 20)
    """
    if latencies[0] > bound:
        return throughputs[0], " exceeds it even at the lowest rate, whose tokens/s stand here"
    best = 0.0
    for (x0, y0), (x1, y1) in zip(zip(throughputs, latencies), zip(throughputs[1:], latencies[1:])):
        if y0 <= bound < y1:
            best = max(best, x0 + (x1 - x0) * (bound - y0) / (y1 - y0))
        elif y1 <= bound:
            best = max(best, x1)
    return best, " likewise" if max(latencies) > bound else " stays below it at all rates"


# -- stalls


def measure_stalls(report, s, bench):
    """Waits between two tokens of a text while prompts, longer ones, are read."""
    lengths = {"prompts": Lengths(s.STALL_PROMPT_TOKENS, s.SPREAD, 1, s.LONGEST_PROMPT)}
    rate = s.STALL_RATE * bench.full_rate(**lengths)
    trace = bench.trace(rate, **lengths)
    replay(bench.ready(WHOLE), trace[: s.N_ROWS])  # steps of these sizes, once before
    found = {policy: replay(bench.ready(policy), trace) for policy in (CHUNKS, WHOLE)}
    some = {policy: each.summary() for policy, each in found.items()}
    note = (f"prompts of {s.STALL_PROMPT_TOKENS:g} tokens (median), {rate:.2f} requests/s; tokens/s "
            + ", ".join(f"{policy} {each.throughput:,.0f}" for policy, each in some.items()))  # fmt: skip
    for place, what in enumerate(("median", "99th percentile", "longest")):
        report.row(f"{s.MODEL}, chunks of {s.MAX_TOKENS}: time between tokens, {what}", some[CHUNKS].gap[place] * 1e3,
                   "ms", peer=some[WHOLE].gap[place] * 1e3, peer_name="whole prompts", higher_is_better=False,
                   claim=None if place == 0 else STALL_CLAIM, note=note if place == 1 else "")  # fmt: skip
    report.row(f"{s.MODEL}, chunks of {s.MAX_TOKENS}: first token, median", some[CHUNKS].first[0] * 1e3, "ms",
               peer=some[WHOLE].first[0] * 1e3, peer_name="whole prompts", higher_is_better=False,
               note="what chunks cost: a prompt shares its steps with decodes")  # fmt: skip
    shown = {}
    for policy, each in found.items():
        gaps = np.sort([gap * 1e3 for record in each.records for gap in record.gaps])
        places = np.unique(np.linspace(0, len(gaps) - 1, 100).astype(int))
        shown[policy] = ([100 * place / (len(gaps) - 1) for place in places], gaps[places].tolist())
        report.series(f"ms between tokens by percentile, {policy}", *shown[policy])
    curves(report.folder / f"project12_dynamic_batching.stalls.{report.slug}.png", shown, "percentile",
           "ms between two tokens", f"Waits between tokens, {s.MODEL}, long prompts", logy=True)  # fmt: skip


# -- all at once


def measure_offline(report, s, bench):
    """Tokens per second when all requests are there: no arrivals, only lengths that differ."""
    trace = bench.trace(math.inf)
    amount, policies = sum(each.n_new for each in trace), (CHUNKS, WHOLE, STATIC)
    calls = {policy: functools.partial(replay, bench.ready(policy), trace) for policy in policies}
    use = {policy: call().timeline for policy, call in calls.items()}
    timings = measure(calls, s.REPEATS, 0, bench.device)
    for policy in (CHUNKS, WHOLE):
        ours, other = timings[policy], timings[STATIC]
        report.row(f"{s.MODEL}, all {len(trace)} at once, {policy}", ours.rate(amount)[0], "tok/s",
                   spread=ours.rate(amount)[1:], peer=amount / other.median, peer_name="static batching",
                   note=f"{use[policy].n_steps:,} steps, static {use[STATIC].n_steps:,}")  # fmt: skip
        report.row(f"{s.MODEL}, all {len(trace)} at once, {policy}: rows in use", 100 * use[policy].occupancy, "%",
                   peer=100 * use[STATIC].occupancy, peer_name="static batching", limit=100.0,
                   limit_name="each row, each step", note="the rest is the end, when nobody comes")  # fmt: skip


# -- peers


def measure_peers(report, s, bench):
    """`transformers`, the same weights, requests and rows, all at once, in turn with ours."""
    try:
        import transformers
    except ImportError:
        return report.skip("against transformers, continuous batching", "transformers is not installed here")
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        path = to_huggingface(bench.model, None, Path(folder) / "model")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=bench.dtype).to(bench.device).eval()
    trace, ours, seconds = bench.trace(math.inf), bench.ready(CHUNKS), {"ours": [], "theirs": []}
    amount = sum(each.n_new for each in trace)
    for round_number in range(1 + s.REPEATS):
        began = time.perf_counter()
        texts = [record.tokens for record in replay(ours, trace).records]
        spent = time.perf_counter() - began
        found, their_time = serve_theirs(theirs, s, bench, trace)
        if round_number:
            seconds["ours"].append(spent)
            seconds["theirs"].append(their_time)
    whole = [len(text) for text in found] == [each.n_new for each in trace]
    report.check("transformers: every text is whole", whole, f"{sum(map(len, found)):,} of {amount:,} tokens")
    if bench.dtype == torch.float32:
        same = sum(a == b for a, b in zip(texts, found))
        report.check("the tokens of transformers", same >= 0.95 * len(trace), f"{same} of {len(trace)} texts, greedy")
    ours, other = (statistics.median(seconds[who]) for who in ("ours", "theirs"))
    report.row(f"{s.MODEL}, all {len(trace)} at once, against transformers", amount / ours, "tok/s",
               spread=(amount / max(seconds["ours"]), amount / min(seconds["ours"])), peer=amount / other,
               peer_name="transformers, continuous batching",
               note=f"{s.N_ROWS} rows, steps of at most {s.MAX_TOKENS} tokens; its start is not counted")  # fmt: skip


def serve_theirs(theirs, s, bench, trace):
    """(tokens of each request, the seconds they took) by the manager behind `generate_batch`, each with its length."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    settings = GenerationConfig(max_new_tokens=s.LONGEST_NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = s.N_ROWS * (-(-bench.longest // 256) + 1)
    batching = ContinuousBatchingConfig(max_batch_tokens=s.MAX_TOKENS, max_requests_per_batch=s.N_ROWS,
                                        num_blocks=pages)  # fmt: skip
    serving = theirs.continuous_batching_context_manager(
        generation_config=settings, continuous_batching_config=batching, block=True, timeout=60
    )
    with torch.no_grad(), serving as manager:
        began, found = time.perf_counter(), {}
        for place, each in enumerate(trace):
            manager.add_request(each.prompt, request_id=str(place), max_new_tokens=each.n_new)
        while len(found) < len(trace):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[int(result.request_id)] = result.generated_tokens
            elif result is None and not manager.is_running():
                raise RuntimeError(f"its loop ended after {len(found)} of {len(trace)} requests")
        seconds = time.perf_counter() - began
    return [found[place] for place in range(len(trace))], seconds


PARTS = {
    "checks": check,
    "timeline": measure_timeline,
    "selective": measure_selective,
    "rates": measure_rates,
    "stalls": measure_stalls,
    "offline": measure_offline,
    "peers": measure_peers,
}


if __name__ == "__main__":
    main()
