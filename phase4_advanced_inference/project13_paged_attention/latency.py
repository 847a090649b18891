"""
Latency

This file implements the measuring of how long requests wait, following:
- "SGLang: Efficient Execution of Structured Language Model Programs" (Zheng et al., 2023) - what lies in
  blocks already is not read again
- "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (Agrawal et al., 2024) - what
  prompts in chunks do to first tokens, and to the time between tokens

Only benchmark.py uses it.

Each component is explained with paper references for educational purposes.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

from common.benchmark import Report
from common.device import synchronize
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase4_advanced_inference.project10_prompt_caching.prompt_cache import reading_flops
from phase4_advanced_inference.project12_dynamic_batching.batcher import Batcher
from phase4_advanced_inference.project12_dynamic_batching.traces import Arrival, replay
from phase4_advanced_inference.project13_paged_attention.runner import Runner


def time_to_first_token(runner: Runner, prompt: Sequence[int]) -> float:
    """Seconds from the prompt to its first token; the engine is idle before and afterwards."""
    synchronize(runner.device)
    began = time.perf_counter()
    runner.add(prompt, SamplingParams(2, 0.0, stop_ids=()))
    while not runner.step():
        pass
    spent = time.perf_counter() - began
    while runner.busy:
        runner.step()
    return spent


def measure_first_tokens(report: Report, runner: Runner, n: int, rates: Sequence[float], repeats: int, name: str):
    """Rows for prompts of n tokens, of which so large parts lie in blocks already, in turn.

    PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
    PAPER CONTEXT: requests whose prefix is in the tree skip its prefill.
    INTUITION: the same book, opened at its last chapter.
    IMPLEMENTATION: the rest of a prompt is new each time, so that exactly the prefix is found. The limit is what is
        left of the operations, those of attention included.
    WHY: what lies between measured and limit is what operations do not count: the host, and attention that is slower
        than products.
    """
    model, draw = runner.model, random.Random(0)
    prefix = _tokens(draw, model, n)
    time_to_first_token(runner, prefix)
    known = {rate: int(n * rate) for rate in (0.0, *rates)}
    before, spent = runner.blocks.tree.statistics.found, {rate: [] for rate in known}
    for _ in range(2 + repeats):
        for rate, length in known.items():
            spent[rate].append(time_to_first_token(runner, prefix[:length] + _tokens(draw, model, n - length)))
    found, whole = runner.blocks.tree.statistics.found - before, (2 + repeats) * sum(known.values())
    report.check(f"{name}: exactly the known tokens were found", found == whole, f"{found:,}, should be {whole:,}")
    times, flops = {rate: statistics.median(values[2:]) for rate, values in spent.items()}, reading_flops(model, 0, n)
    how = f"{flops / times[0.0] / 1e12:.3g} TFLOP/s; at most {runner.scheduler.max_tokens:,} tokens a step"
    report.row(f"{name}: first token of {n:,}, nothing known", times[0.0] * 1e3, "ms", higher_is_better=False, note=how)
    for rate in rates:
        report.row(f"{name}: times as soon with {rate:.1%} of {n:,} tokens in shared blocks", times[0.0] / times[rate],
                   "×", limit=flops / reading_flops(model, known[rate], n), limit_name="operations that remain",
                   note=f"{times[rate] * 1e3:.1f} ms")  # fmt: skip


def measure_arrivals(
    report: Report, engines: dict[str, Batcher], trace: Callable[[float], list[Arrival]], load: float, name: str
):
    """Rows for requests that come by themselves, at a part of the rate that the first engine can serve.

    PAPER: "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", arXiv:2403.02310, section 5.
    PAPER CONTEXT: latencies are compared at a load that the systems can bear, first tokens and the tail between tokens
        each by itself.
    INTUITION: a shop is judged on an ordinary afternoon, not at the stampede on the first day of the sales.
    IMPLEMENTATION: project 12's open loop, the same trace for each engine, which has served it once before.
    WHY: what an engine gains in throughput may be paid for by whoever waits.
    """
    ours, everybody = next(iter(engines)), trace(math.inf)
    for engine in engines.values():
        replay(engine, everybody)
    at_once = {each: replay(engine, everybody).summary() for each, engine in engines.items()}
    full = len(everybody) * at_once[ours].throughput / at_once[ours].n_tokens
    found = {each: replay(engine, trace(load * full)).summary() for each, engine in engines.items()}
    for rival in list(engines)[1:]:
        report.row(f"{name}: {len(everybody)} requests at once, {ours} against {rival}", at_once[ours].throughput,
                   "tok/s", peer=at_once[rival].throughput, peer_name=rival)  # fmt: skip
        for what, value in (
            ("first token, median", lambda summary: summary.first[0]),
            ("time between tokens, 99th percentile", lambda summary: summary.gap[1]),
            ("end to end, a token, median", lambda summary: summary.normalized[0]),
        ):
            report.row(f"{name}: {load:.0%} of the full rate, {ours} against {rival}: {what}", value(found[ours]) * 1e3,
                       "ms", peer=value(found[rival]) * 1e3, peer_name=rival, higher_is_better=False,
                       note=f"{load * full:.2f} requests/s")  # fmt: skip


def _tokens(draw: random.Random, model, n: int) -> list[int]:
    return [draw.randrange(model.config.vocab_size) for _ in range(n)]
