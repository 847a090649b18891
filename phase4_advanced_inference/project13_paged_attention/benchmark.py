"""Measure project 13: kernels over blocks, the engine's throughput, wasted memory, preemption, and sharing.

    uv run python phase4_advanced_inference/project13_paged_attention/benchmark.py
    uv run python phase4_advanced_inference/project13_paged_attention/benchmark.py --parts kernels

checks: texts of the engine are those of project 8, in every mode. kernels: attention over blocks, and over one piece.
throughput: many requests at once, against `transformers`. pressure: a trace of skewed lengths in a quarter of the
memory that it would use, against rows that are reserved. sharing: questions about one text. first_token: how
soon it comes when a part of the prompt lies in blocks already. load: how long requests wait that come by themselves.
"""

import functools
import random
import time

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from common.benchmark import Report, measure, measure_recorded, run_parts
from common.device import memory_bandwidth, peak_flops, synchronize
from common.plots import curves
from common.run import Run
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer, transformers_model
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation
from phase4_advanced_inference.project12_dynamic_batching.batcher import Batcher
from phase4_advanced_inference.project12_dynamic_batching.traces import Lengths, make_trace
from phase4_advanced_inference.project13_paged_attention import benchmark_config
from phase4_advanced_inference.project13_paged_attention.latency import measure_arrivals, measure_first_tokens
from phase4_advanced_inference.project13_paged_attention.paged_attention import (
    paged_attention,
    queries_of_a_tile,
    tile_list,
)
from phase4_advanced_inference.project13_paged_attention.runner import Runner

SHAPES = {
    "small": {"vocab_size": 8192, "n_layer": 6, "n_embd": 512, "n_head": 8, "n_kv_head": 2, "n_ff": 1536},
    "1.1B": {"vocab_size": 32768, "n_layer": 22, "n_embd": 2048, "n_head": 32, "n_kv_head": 8, "n_ff": 5632},
}
CLAIM = "2-4× at the same latency (PagedAttention, abstract)"
KERNEL_CLAIM = "1.20-1.26 (PagedAttention, section 7.1)"
USE_CLAIM = "earlier systems use 20.4-38.2% well (PagedAttention, section 1)"


def main(argv=None):
    """Run all parts and write the results; a part that fails leaves the others alone."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = run.settings
        report = Report("project13_paged_attention", "Paged attention", run.device, keep=len(s.PARTS) < len(PARTS))
        parts = {part: functools.partial(PARTS[part], report, s, run.device) for part in s.PARTS}
        run_parts(report, parts, torch.cuda.empty_cache if run.device.type == "cuda" else None)


def model_of(s, device, room=None):
    """The model that is measured, its weights random, with room for texts of so many tokens."""
    torch.manual_seed(s.SEED)
    block_size = -(-(room or s.LONGEST + s.NEW_TOKENS) // 64) * 64 * 2
    with device:
        model = Transformer(PRESETS["llama-7b"](block_size=block_size, **SHAPES[s.MODEL]))
    return model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def runner_of(s, model, **options):
    """An engine for it, warmed up; what is compiled waits for the first round, which needs but a few of all sizes."""
    capacity = s.LONGEST + s.NEW_TOKENS
    graphs = next(model.parameters()).is_cuda
    common = {"n_rows": s.N_ROWS, "capacity": capacity, "max_tokens": s.MAX_TOKENS, "page": s.PAGE, "graphs": graphs}
    runner = Runner(model, NumberTokenizer(model.config.vocab_size), **(common | options))
    if not options.get("compiled"):
        runner.warm_up()
    return runner


def even_trace(s, vocab_size):
    """Prompts of all lengths, each continued by as many tokens."""
    draw = random.Random(s.SEED)
    lengths = [draw.randint(s.SHORTEST, s.LONGEST) for _ in range(s.N_REQUESTS)]
    return [([draw.randrange(vocab_size) for _ in range(n)], s.NEW_TOKENS) for n in lengths]


def skewed_trace(s, vocab_size):
    """Prompts and continuations of log-normal lengths: many short ones, a few very long."""
    draw = random.Random(s.SEED + 1)

    def length(median, most):
        return max(4, min(most, round(draw.lognormvariate(0, 1) * median)))

    most = s.LONGEST + s.NEW_TOKENS
    lengths = [(length(s.LONGEST / 8, most // 2), length(s.NEW_TOKENS / 2, most // 2)) for _ in range(s.N_REQUESTS)]
    return [([draw.randrange(vocab_size) for _ in range(n)], new) for n, new in lengths]


def serve(engine, trace, temperature=0.0, watch=None, **sampling):
    """Serve all requests of a trace, which come at once: seconds, and the tokens of each."""
    device = engine.device
    synchronize(device)
    began, texts = time.perf_counter(), {}
    for number, (prompt, new) in enumerate(trace):
        params = SamplingParams(new, temperature, stop_ids=(), seed=number, **sampling)
        texts[engine.add(prompt, params).index] = []
    while engine.busy:
        for piece in engine.step():
            if piece.token is not None:
                texts[piece.index].append(piece.token)
        if watch:
            watch(engine)
    synchronize(device)
    return time.perf_counter() - began, list(texts.values())


# -- checks


@torch.no_grad()
def check(report, s, device):
    """Texts in float32, greedy and drawn, against project 8's `generate`, one request at a time."""
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(s.SEED)
    config = PRESETS["llama-7b"](vocab_size=512, block_size=128, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, n_ff=128)
    with device:
        model = Transformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokenizer, draw = NumberTokenizer(512), random.Random(s.SEED)
    shared = [draw.randrange(512) for _ in range(40)]
    prompts = [shared[: draw.choice((0, 24, 40))] + [draw.randrange(512) for _ in range(draw.randint(1, 40))]
               for _ in range(24)]  # fmt: skip
    params = [SamplingParams(draw.randint(4, 40), draw.choice((0.0, 0.8)), draw.choice((None, 20)), stop_ids=(), seed=i)
              for i in range(24)]  # fmt: skip
    want = [generate(model, tokenizer, *each).tokens for each in zip(prompts, params)]
    block = bytes_per_token(model.specs, torch.float32) * 8
    graphs = device.type == "cuda"
    modes = {
        "one step ahead": {"ahead": True, "graphs": graphs},
        "a step at a time": {"ahead": False},
        "little memory, read anew": {"memory": 16 * block, "graphs": graphs},
        "little memory, swapped": {"memory": 16 * block, "swap_bytes": 2**30, "graphs": graphs},
        "with drafts": {"speculation": Speculation(rule="coupled", graphs=graphs), "graphs": graphs},
    }
    for name, options in modes.items():
        runner = Runner(model, tokenizer, 8, 128, max_tokens=32, page=8, **options)
        texts = [text.tokens for text in runner.generate(prompts, params)]
        runner.blocks.clear()
        whole = runner.cache.allocator.n_free == runner.cache.allocator.n_blocks
        found = runner.blocks.tree.statistics
        report.check(f"{name}: the tokens of plain decoding, no block lost", texts == want and whole,
                     f"24 requests, {runner.scheduler.n_preempted} preemptions ({runner.blocks.n_swapped} swapped), "
                     f"{found.found} of {found.asked} tokens shared")  # fmt: skip


# -- kernels


def scattered(rows, longest, page, heads, width, device, dtype):
    """Keys and values of some rows in blocks that lie anywhere, their tables, and the same in one piece."""
    n_each = -(-longest // page)
    tables = torch.randperm(rows * n_each, device=device).view(rows, n_each).int()
    blocks = [torch.randn(rows * n_each, page, heads, width, device=device).to(dtype) for _ in range(2)]
    pieces = [x[tables.long()].flatten(1, 2)[:, :longest].transpose(1, 2).contiguous() for x in blocks]
    return blocks, tables, pieces  # pieces: (rows, heads, longest, width)


@torch.no_grad()
def measure_kernels(report, s, device):
    """Decoding and reading a chunk, over blocks and in one piece."""
    shape, gpu = SHAPES[s.MODEL], device.type == "cuda"
    H, Hkv = shape["n_head"], shape["n_kv_head"]
    D, dtype = shape["n_embd"] // H, torch.bfloat16 if gpu else torch.float32
    for rows, longest in ((256, 640), (64, 4096), (1, 8192)) if gpu else ((16, 256), (1, 1024)):
        (k, v), tables, (ck, cv) = scattered(rows, longest, s.PAGE, Hkv, D, device, dtype)
        q, ends = torch.randn(rows, H, D, device=device).to(dtype), torch.full((rows,), longest, device=device).int()
        grouped = q.view(rows, Hkv, H // Hkv, D)
        runs = {
            "ours": lambda: paged_attention(q, k, v, tables, None, ends, D**-0.5, n_each=1),  # noqa: B023
            "theirs": lambda: F.scaled_dot_product_attention(grouped, ck, cv, scale=D**-0.5),  # noqa: B023
        }
        error = float((runs["ours"]() - runs["theirs"]().reshape(rows, H, D)).norm() / q.norm())
        report.check(f"decoding {rows} rows after {longest:,}: as in one piece", error < 1e-2, f"{error:.1e}")
        timings = measure_recorded(runs, s.REPEATS, device=device)
        size = (k.nbytes + v.nbytes) / 1e9
        band = memory_bandwidth(device)
        report.row(f"decoding {rows} rows after {longest:,}: keys and values read", size / timings["ours"].median,
                   "GB/s", peer=size / timings["theirs"].median, peer_name="SDPA, in one piece",
                   limit=band and band / 1e9, limit_name="memory bandwidth" if band else None,
                   claim=KERNEL_CLAIM, note=f"{timings['ours'].median / timings['theirs'].median:.2f} times the peer's "
                   f"time")  # fmt: skip
    for n, past in ((4096, 4096), (512, 0)) if gpu else ((128, 128),):
        measure_chunk(report, s, device, n, past, (H, Hkv, D, dtype))


def measure_chunk(report, s, device, n, past, sizes):
    """Reading n tokens behind `past` others, eight rows of short ones."""
    H, Hkv, D, dtype = sizes
    rows = 1 if past else 8
    (k, v), tables, (ck, cv) = scattered(rows, n + past, s.PAGE, Hkv, D, device, dtype)
    q = torch.randn(rows * n, H, D, device=device).to(dtype)
    begins = torch.arange(0, rows * n + 1, n, device=device).int()
    ends = torch.full((rows,), n + past, device=device).int()
    bias = causal_lower_right(n, n + past)
    tiles = tile_list(begins, rows * n, queries_of_a_tile(H, Hkv, D, D))  # once a step, for all layers
    split = q.view(rows, n, H, D).transpose(1, 2)
    runs = {
        "ours": lambda: paged_attention(q, k, v, tables, begins, ends, D**-0.5, tiles=tiles),
        "theirs": lambda: F.scaled_dot_product_attention(split, ck, cv, bias, scale=D**-0.5, enable_gqa=True),
    }
    error = float((runs["ours"]().view(rows, n, H, D) - runs["theirs"]().transpose(1, 2)).norm() / q.norm())
    report.check(f"reading {rows} x {n:,} after {past:,}: as in one piece", error < 1e-2, f"{error:.1e}")
    timings = measure_recorded(runs, s.REPEATS, device=device)
    work = 4 * H * D * rows * (n * past + n * (n + 1) / 2) / 1e12
    peak = peak_flops(device)
    report.row(f"reading {rows} x {n:,} after {past:,}", work / timings["ours"].median, "TFLOP/s",
               peer=work / timings["theirs"].median, peer_name="SDPA, in one piece", limit=peak and peak / 1e12,
               limit_name="tensor cores" if peak else None,
               note=f"{timings['ours'].median / timings['theirs'].median:.2f} times the time of the peer")  # fmt: skip


# -- throughput


def roof(model, trace, device):
    """Tokens/s if every step took the time of its reading, and every prompt that of its operations."""
    band, peak = memory_bandwidth(device), peak_flops(device)
    if band is None:
        return None
    weights = sum(p.numel() for p in model.parameters())
    steps = max(new for _, new in trace)
    read = steps * weights * 2 + bytes_per_token(model.specs) * sum(len(p) * new + new * new / 2 for p, new in trace)
    return sum(new for _, new in trace) / (read / band + 2 * weights * sum(len(p) for p, _ in trace) / peak)


@torch.no_grad()
def measure_throughput(report, s, device):
    """All requests at once: ours in three modes, greedy and sampled, and `transformers`."""
    model = model_of(s, device)
    trace = even_trace(s, model.config.vocab_size)
    total, limit = sum(new for _, new in trace), roof(model, trace, device)
    theirs = their_rate(report, s, model, trace, device) if s.PEER else None
    named = f"{s.N_REQUESTS} prompts of {s.SHORTEST}-{s.LONGEST}, {s.NEW_TOKENS} new tokens each"
    modes = {
        "": {},
        ", the host not ahead": {"ahead": False},
        ", nothing recorded": {"graphs": False, "ahead": False},
        **({", decode steps compiled": {"compiled": True}} if s.COMPILED else {}),
    } if device.type == "cuda" else {"": {}, ", one step ahead": {"ahead": True}}  # fmt: skip
    for name, options in modes.items():
        runner, seconds = runner_of(s, model, **options), []
        for _ in range(1 + s.REPEATS):
            runner.blocks.clear()
            spent, texts = serve(runner, trace)
            seconds.append(spent)
        whole = all(len(text) == new for text, (_, new) in zip(texts, trace))
        report.check(f"{named}{name}: every text is whole", whole, f"{sum(map(len, texts)):,} tokens")
        rates = sorted(total / x for x in seconds[1:])
        report.row(f"{s.MODEL}: {named}{name}", rates[len(rates) // 2], "tok/s", spread=(rates[0], rates[-1]),
                   peer=theirs, peer_name=theirs and "transformers generate_batch", limit=limit,
                   limit_name=limit and "reading and operations", claim=CLAIM if not name else None,
                   note="all there at once; prompts are read in the same run")  # fmt: skip
        if not name:
            measure_sampled(report, s, runner, trace, rates[len(rates) // 2])
        del runner


def measure_sampled(report, s, runner, trace, greedy):
    """The same with draws in place of the likeliest token."""
    total = sum(new for _, new in trace)
    kinds = {
        "temperature 1": {"temperature": 1.0},
        "temperature 0.8, top-p 0.95, top-k 50": {"temperature": 0.8, "top_p": 0.95, "top_k": 50},
    }
    for name, sampling in kinds.items():
        seconds = []
        for _ in range(3):
            runner.blocks.clear()
            seconds.append(serve(runner, trace, **sampling)[0])
        report.row(f"{s.MODEL}: the same, {name}", total / sorted(seconds[1:])[0], "tok/s", peer=greedy,
                   peer_name="greedy, ours")  # fmt: skip


def their_rate(report, s, model, trace, device):
    """Tokens/s of `transformers` for the same requests; None where it cannot run."""
    theirs = transformers_model(model.config, next(model.parameters()).dtype, device, report)
    if theirs is None:
        return None
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    pages = s.N_ROWS * (-(-(s.LONGEST + s.NEW_TOKENS) // 256) + 1)  # on a GPU it finds its own sizes
    batching = None if device.type == "cuda" else ContinuousBatchingConfig(
        max_batch_tokens=s.MAX_TOKENS, max_requests_per_batch=s.N_ROWS, num_blocks=pages)  # fmt: skip
    config = GenerationConfig(max_new_tokens=s.NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [prompt for prompt, _ in trace]
    theirs.generate_batch(prompts[:4], config, batching, max_new_tokens=4)
    began = time.perf_counter()
    results = theirs.generate_batch(prompts, config, batching)
    synchronize(device)
    spent = time.perf_counter() - began
    n = sum(len(result.generated_tokens) for result in results.values())
    report.check("transformers: every text is whole", n == sum(new for _, new in trace), f"{n:,} tokens")
    return n / spent


# -- pressure


class _Watch:
    """What is seen after every step: tokens that lie in the cache, and how well its memory is used."""

    def __init__(self):
        self.used, self.waste = [], []

    def __call__(self, engine):
        if engine.scheduler.running:
            self.used.append(sum(engine.cache.lengths))
            self.waste.append(engine.cache.waste)


@torch.no_grad()
def measure_pressure(report, s, device):
    """A trace of skewed lengths: memory used well, and throughput in a quarter of the memory that it would take."""
    model = model_of(s, device)
    trace, dtype = skewed_trace(s, model.config.vocab_size), next(model.parameters()).dtype
    total, token = sum(new for _, new in trace), bytes_per_token(model.specs, dtype)
    free, watch = runner_of(s, model, share=False), _Watch()
    serve(free, trace)
    serve(free, trace, watch=watch)
    peak = max(watch.used)
    waste = sum(watch.waste) / len(watch.waste)
    report.row("memory of blocks in use that holds no token, mean over a run", 100 * waste, "%", higher_is_better=False,
               limit=4, limit_name="goal", claim=USE_CLAIM, note=f"pages of {s.PAGE}; worst step "
               f"{100 * max(watch.waste):.1f}%; peak {peak:,} tokens")  # fmt: skip
    budget, rates = peak // 4 // s.PAGE * s.PAGE * token, {}
    capacity = s.LONGEST + s.NEW_TOKENS
    n_slots = max(1, budget // (capacity * token))
    engines = {
        "blocks, preempted texts read anew": runner_of(s, model, memory=budget),
        "blocks, preempted texts swapped to the host": runner_of(s, model, memory=budget, swap_bytes=2**36),
        f"{n_slots} reserved rows": Batcher(model, NumberTokenizer(model.config.vocab_size), n_slots, capacity,
                                            max(s.MAX_TOKENS, n_slots), graphs=device.type == "cuda",
                                            cache="flash" if device.type == "cuda" else "contiguous"),
    }  # fmt: skip
    lines = {}
    for name, engine in engines.items():
        serve(engine, trace)
        before, seen = engine.scheduler.n_preempted, _Watch() if "blocks" in name else None
        seconds, texts = serve(engine, trace, watch=seen)
        rates[name] = (total / seconds, engine.scheduler.n_preempted - before)
        report.check(f"a quarter of the memory, {name}: every text is whole",
                     all(len(text) == new for text, (_, new) in zip(texts, trace)),
                     f"{rates[name][1]} preemptions")  # fmt: skip
        if seen:
            report.check(f"{name}: preemption happened", rates[name][1] > 0, f"{rates[name][1]}")
            lines[name] = (list(range(len(seen.used))), seen.used)
    slots = list(rates)[-1]
    for name in list(rates)[:-1]:
        report.row(f"a quarter of the memory, {name}", rates[name][0], "tok/s", claim=CLAIM, peer=rates[slots][0],
                   peer_name=f"ours, {slots}", note=f"{rates[name][1]} preemptions")  # fmt: skip
    lines["all the memory"] = (list(range(len(watch.used))), watch.used)
    curves(report.folder / f"project13_paged_attention.pressure.{report.slug}.png", lines, "step",
           "tokens in the cache", "A trace of skewed lengths in a quarter of its memory",
           hlines={"a quarter of the peak": peak // 4})  # fmt: skip


# -- sharing


@torch.no_grad()
def measure_sharing(report, s, device):
    """Questions about one text, all at once: read once, or by everybody."""
    model, draw = model_of(s, device), random.Random(s.SEED)
    vocab_size, n = model.config.vocab_size, s.N_REQUESTS // 2
    text = [draw.randrange(vocab_size) for _ in range(s.LONGEST - 16)]
    trace = [(text + [draw.randrange(vocab_size) for _ in range(16)], s.NEW_TOKENS // 4) for _ in range(n)]
    timings, used = {}, {}
    for share in (True, False):
        runner = runner_of(s, model, share=share)
        seen = []

        def rounds(runner=runner, seen=seen):
            runner.blocks.clear()
            serve(runner, trace, watch=lambda e: seen.append(e.cache.allocator.n_blocks - e.cache.allocator.n_free))

        timings[share] = measure({"run": rounds}, s.REPEATS, 1, device)["run"].median
        used[share] = max(seen)
        if share:
            found = runner.blocks.tree.statistics
            whole = len(text) // s.PAGE * s.PAGE * (n - 1) * (1 + s.REPEATS)
            report.check("sharing: all but the first read what is theirs alone", found.found == whole,
                         f"{found.found:,} of {found.asked:,} tokens were found")  # fmt: skip
    total = sum(new for _, new in trace)
    report.row(f"{n} questions about a text of {len(text)} tokens, shared", total / timings[True], "tok/s",
               peer=total / timings[False], peer_name="not shared",
               note=f"blocks used at most: {used[True]:,}, not shared {used[False]:,}")  # fmt: skip


# -- the first token


@torch.no_grad()
def measure_first_token(report, s, device):
    """The time to the first token of a long prompt whose beginning lies in blocks already, which are shared."""
    model, n = model_of(s, device, s.LONG_PROMPT + 64), s.LONG_PROMPT
    # What is asked for once, stays: room for all of it.
    memory = 8 * (n + 64) * bytes_per_token(model.specs, next(model.parameters()).dtype)
    for name, options in {s.MODEL: {}, **({f"{s.MODEL}, compiled": {"compiled": True}} if s.COMPILED else {})}.items():
        runner = runner_of(s, model, n_rows=2, capacity=n + 64, max_tokens=s.CHUNK, memory=memory, **options)
        measure_first_tokens(report, runner, n, s.HIT_RATES, s.REPEATS, name)


def measure_load(report, s, device):
    """Requests of skewed lengths that come by themselves: in chunks, as whole prompts, and over rows for blocks."""
    model, on_gpu = model_of(s, device), device.type == "cuda"
    capacity, tokenizer = s.LONGEST + s.NEW_TOKENS, NumberTokenizer(model.config.vocab_size)
    n_rows, tokens = max(8, s.N_ROWS // 4), list(range(4 * s.LONGEST))
    lengths = Lengths(s.LONGEST / 3, 0.8, 1, s.LONGEST), Lengths(s.NEW_TOKENS / 3, 0.8, 1, s.NEW_TOKENS)
    sizes = {"n_rows": n_rows, "capacity": capacity, "share": False}
    engines = {
        "chunks": runner_of(s, model, **sizes, max_tokens=8 * n_rows),
        "whole prompts": runner_of(s, model, **sizes, max_tokens=n_rows * capacity),
        "project 12's rows": Batcher(model, tokenizer, n_rows, capacity, 8 * n_rows, graphs=on_gpu,
                                     cache="flash" if on_gpu else "contiguous"),
    }  # fmt: skip
    measure_arrivals(
        report, engines, lambda rate: make_trace(s.N_REQUESTS, rate, *lengths, tokens, s.SEED), 0.7, s.MODEL
    )


PARTS = {"checks": check, "kernels": measure_kernels, "throughput": measure_throughput, "pressure": measure_pressure,
         "sharing": measure_sharing, "first_token": measure_first_token,
         "load": measure_load}  # fmt: skip


if __name__ == "__main__":
    main()
