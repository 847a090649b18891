"""Measure project 8: what a token costs with and without a cache, against `transformers` and against memory's speed.

    uv run python phase3_core_inference/project8_kv_cache/benchmark.py
    uv run python phase3_core_inference/project8_kv_cache/benchmark.py --parts length

checks: greedy tokens are those of `transformers` with the same weights; recorded steps give the logits of a forward
without a cache. length: time per token behind texts of growing length, with and without the cache. kernels: a decode
step by the ways to read the cache. generate: tokens per second of whole continuations, prefill included, one prompt and
many. memory: of the cache, against the formula. On a GPU decode steps are recorded into CUDA graphs.
"""

import dataclasses
import functools
import tempfile

import torch

from common.benchmark import Report, measure, run_parts
from common.plots import curves
from common.run import Run
from phase1_foundation.project1_minimal_gpt.sampling import stream as stream_uncached
from phase1_foundation.project3_pretrain.hub import to_huggingface
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache import benchmark_config
from phase3_core_inference.project8_kv_cache.attention import KERNELS
from phase3_core_inference.project8_kv_cache.decoder import FastDecoder
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, Writer
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer, transformers_model
from phase3_core_inference.project8_kv_cache.sliding_cache import SlidingCache
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token
from phase3_core_inference.project8_kv_cache.work import quarter_octaves

CLAIM = "10–30× (the roadmap's)"
SHAPES = {
    "small": PRESETS["gpt2"](vocab_size=8192, n_layer=6, n_head=8, n_embd=512),
    "124M": PRESETS["gpt2"](),
    "1.1B": PRESETS["llama-7b"](n_layer=22, n_embd=2048, n_kv_head=4, n_ff=5632, block_size=1024),  # TinyLlama's
}


def main(argv=None):
    """Run all parts and write the results; a part that fails leaves the others alone."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = run.settings
        report = Report("project8_kv_cache", "KV cache and generation", run.device, keep=len(s.PARTS) < len(PARTS))
        parts = {
            f"{part} ({name})": functools.partial(PARTS[part], report, s, run.device, name)
            for part in s.PARTS
            for name in (s.MODELS if part in ("length", "kernels", "generate") else s.MODELS[:1])
        }
        run_parts(report, parts, forget)


def forget():
    """Free what the last part left in memory and in the compiler."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()


# -- who is measured


def ours_of(config, device):
    """A model of this shape in the type that it runs in, its weights random."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with device:
        return Transformer(config).to(dtype).eval()


def theirs_of(config, device, report):
    """The same shape in `transformers`, or None where it is not installed."""
    return transformers_model(config, torch.bfloat16 if device.type == "cuda" else torch.float32, device, report)


def writes(model, n_rows, **options):
    """continue(prompts (B, T), n): our greedy tokens, through a cache that stays."""
    writer = Writer(model, NumberTokenizer(model.config.vocab_size), n_rows, chunk=8192, **options)

    def go_on(prompts, n, params=None):
        params = params or SamplingParams(n, temperature=0.0, stop_ids=())
        texts = [[] for _ in prompts]
        for piece in writer.stream(prompts.tolist(), [params] * len(prompts)):
            texts[piece.index].append(piece.token)
        return texts

    return go_on


def writes_theirs(theirs, **options):
    """The same by `transformers`."""

    def go_on(prompts, n):
        generated = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, do_sample=False,
                                    eos_token_id=None, pad_token_id=0, **options)  # fmt: skip
        return generated[:, prompts.shape[1] :].tolist()

    return go_on


def bandwidth(device):
    """Bytes per second that this device reads from memory: a gigabyte, summed."""
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    return x.nbytes / measure({"sum": x.sum}, 5, 2, device)["sum"].low


def bytes_read(model, n_rows, length):
    """What a decode step must read: the weights (of an embedding, if it is no head, rows alone), and the cache."""
    untied = not model.config.tie_head
    tables = [model.embed.tokens.weight] if untied else []
    tables += [p for name, p in model.embed.named_parameters() if name.startswith("positions")]
    weights = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in tables)
    return weights + n_rows * length * bytes_per_token(model.specs, next(model.parameters()).dtype)


# -- parts


@torch.no_grad()
def check(report, s, device, name):
    """The same greedy tokens as `transformers`, in float32; the logits of recorded steps in the type that is timed."""
    torch.set_float32_matmul_precision("highest")
    shape = {"vocab_size": 512, "block_size": 128, "n_layer": 2, "n_head": 4, "n_embd": 64}
    families = {"gpt2": PRESETS["gpt2"](**shape), "llama": PRESETS["llama-7b"](**shape, n_kv_head=2)}
    prompts = torch.randint(0, 512, (4, 20), device=device)
    for family, config in families.items() if theirs_of(families["gpt2"], device, report) else ():
        import transformers

        model = Transformer(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        with tempfile.TemporaryDirectory() as folder:
            transformers.utils.logging.disable_progress_bar()
            theirs = transformers.AutoModelForCausalLM.from_pretrained(to_huggingface(model, None, folder)).to(device)
        same = writes(model.to(device), 4, graphs=True)(prompts, 60) == writes_theirs(theirs)(prompts, 60)
        report.check(f"{family}: greedy tokens are those of transformers", same, "4 prompts, 60 tokens, float32")
    model = ours_of(SHAPES[name], device)
    tokens = torch.randint(0, model.config.vocab_size, (200,), device=device)
    exact = model(tokens)
    dtype = next(model.parameters()).dtype
    decoder = FastDecoder(model, ContiguousCache(model.specs, 1, 256, dtype, device, padded=True))
    decoder.step([(0, 190, 0)], tokens[:190].tolist())
    got = torch.cat([decoder.step([(0, 1, 1)], tokens[i : i + 1].tolist()).clone() for i in range(190, 200)])
    error = float((got - exact[190:]).norm() / exact[190:].norm())
    close = error < (2e-2 if dtype == torch.bfloat16 else 1e-4)
    report.check(f"{name}: logits of recorded steps are those without a cache", close,
                 f"relative difference {error:.1e} in {dtype}")  # fmt: skip


@torch.no_grad()
def measure_length(report, s, device, name):
    """Time per token behind a text of each length, batch 1; draws the curves."""
    room = quarter_octaves(max(s.LENGTHS) + s.LENGTH_TOKENS + 1)  # kernels like even sizes
    config = dataclasses.replace(SHAPES[name], block_size=room)
    model, theirs = ours_of(config, device), theirs_of(config, device, report)
    speed = bandwidth(device)
    ways = {
        "without a cache": lambda prompts, n: list(stream_uncached(model, prompts[0].tolist(), n, temperature=0.0)),
        "with the cache": writes(model, 1),
    }
    if device.type == "cuda":
        ways["with the cache, recorded"] = writes(model, 1, graphs=True)
    if theirs is not None:
        ways["transformers, dynamic cache"] = writes_theirs(theirs)
        ways["transformers, static cache"] = writes_theirs(theirs, cache_implementation="static", disable_compile=True)
    lines = {way: ([], []) for way in [*ways, "limit: memory"]}
    for length in s.LENGTHS:
        prompts, n = torch.randint(0, model.config.vocab_size, (1, length), device=device), s.LENGTH_TOKENS
        calls = {(way, k): functools.partial(go_on, prompts, k) for way, go_on in ways.items() for k in (1, n + 1)}
        timings = measure(calls, s.REPEATS, 1, device)
        ms = {way: (timings[way, n + 1].median - timings[way, 1].median) / n * 1e3 for way in ways}
        ms["limit: memory"] = bytes_read(model, 1, length + n // 2) / speed * 1e3
        for way, value in ms.items():
            lines[way][0].append(length)
            lines[way][1].append(value)
        length_rows(report, name, length, ms, n)
    for way, (xs, ys) in lines.items():
        report.series(f"{name}: ms a token, {way}", xs, ys)
    curves(report.folder / f"project8_kv_cache.{name}.{report.slug}.png", lines, "tokens before",
           "ms a token", f"{name}, batch 1", logx=True, logy=True)  # fmt: skip


def length_rows(report, name, length, ms, n):
    """The rows of one length."""
    best = [way for way in ms if way.startswith("with the cache")][-1]
    without, cached, fast = (ms[way] for way in ("without a cache", "with the cache", best))
    eager = "" if fast is cached else f"; the eager cache: {without / cached:.1f}×"
    note = f"over {n} tokens: the time of {n + 1} less that of 1, which is the prefill"
    report.row(f"{name}: times as fast as without a cache, after {length} tokens", without / fast, "×", claim=CLAIM,
               note=f"{'reached' if without / fast >= 10 else 'not reached'}{eager}; {note}")  # fmt: skip
    for peer in (way for way in ms if way.startswith("transformers")):
        report.row(f"{name}: a token after {length}, against {peer}", fast, "ms", peer=ms[peer], peer_name=peer,
                   limit=ms["limit: memory"], limit_name="reading weights and cache", higher_is_better=False,
                   note=note)  # fmt: skip


@torch.no_grad()
def measure_kernels(report, s, device, name):
    """A decode step of a full batch by each kernel, after few and many tokens."""
    capacity = max(s.KERNEL_LENGTHS) + 64
    model = ours_of(dataclasses.replace(SHAPES[name], block_size=capacity), device)
    dtype, speed = next(model.parameters()).dtype, bandwidth(device)
    for n_rows in s.BATCHES:
        work, tokens = [(row, 1, 1) for row in range(n_rows)], [1] * n_rows
        decoders = {}
        for kernel in ("sdpa", "products"):
            cache = ContiguousCache(model.specs, n_rows, capacity, dtype, device, kernel=KERNELS[kernel], padded=True)
            decoders[kernel] = FastDecoder(model, cache)
        for length in s.KERNEL_LENGTHS:

            def step(decoder, length=length, work=work, tokens=tokens):
                decoder.cache.lengths[:] = [length] * len(work)  # what was not written is zeros: they cost the same
                for _ in range(8):
                    decoder.step(work, tokens)

            calls = {kernel: functools.partial(step, decoder) for kernel, decoder in decoders.items()}
            timings = measure(calls, s.REPEATS, 2, device)
            limit = bytes_read(model, n_rows, length) / speed * 1e3
            products, sdpa = (timings[kernel].median / 8e-3 for kernel in ("products", "sdpa"))
            report.row(f"{name}, batch {n_rows}: a step after {length}, two products", products, "ms",
                       peer=sdpa, peer_name="SDPA", limit=limit,
                       limit_name="reading weights and cache", higher_is_better=False)  # fmt: skip


@torch.no_grad()
def measure_generation(report, s, device, name):
    """Tokens per second of whole continuations."""
    model, theirs = ours_of(SHAPES[name], device), theirs_of(SHAPES[name], device, report)
    speed, on_gpu = bandwidth(device), device.type == "cuda"
    for n_rows in s.BATCHES:
        prompts = torch.randint(0, model.config.vocab_size, (n_rows, s.PROMPT_TOKENS), device=device)
        options, alone = {"capacity": s.PROMPT_TOKENS + s.NEW_TOKENS}, n_rows == 1
        ways = {"eager": writes(model, n_rows, **options)}
        if on_gpu:
            ways["recorded"] = writes(model, n_rows, graphs=True, **options)
        if alone and name in s.COMPILED:
            ways["compiled"] = writes(model, n_rows, graphs=True, compiled=True, **options)
        best, peers = list(ways)[-1], {}
        if theirs is not None:
            peers["transformers, dynamic cache"] = writes_theirs(theirs)
        if theirs is not None and alone and name in s.STATIC:
            peers["transformers, static cache, compiled"] = writes_theirs(theirs, cache_implementation="static")
        calls = {way: functools.partial(go_on, prompts, s.NEW_TOKENS) for way, go_on in (ways | peers).items()}
        timings = measure(calls, s.REPEATS, 2, device)
        amount = n_rows * s.NEW_TOKENS
        limit = n_rows * speed / bytes_read(model, n_rows, s.PROMPT_TOKENS + s.NEW_TOKENS // 2)
        pairs = [(way, peer) for way in ways for peer in peers if way == best or "dynamic" in peer]
        for way, peer in pairs or [(way, None) for way in ways]:
            rate = timings[way].rate(amount)
            report.row(f"{name}, batch {n_rows}: {way}" + (f", against {peer}" if peer else ""), rate[0], "tok/s",
                       spread=rate[1:], peer=amount / timings[peer].median if peer else None, peer_name=peer,
                       limit=limit, limit_name="reading weights and cache",
                       note=f"{s.NEW_TOKENS} tokens after {s.PROMPT_TOKENS}, prefill included, greedy")  # fmt: skip
        if n_rows == max(s.BATCHES):
            sampled(report, s, name, prompts, ways[best], timings[best], device)


def sampled(report, s, name, prompts, way, greedy, device):
    """What drawing costs beside taking the likeliest token."""
    params = SamplingParams(s.NEW_TOKENS, 0.8, top_k=50, top_p=0.95, seed=1, stop_ids=())
    timing = measure({"sampled": lambda: way(prompts, s.NEW_TOKENS, params)}, s.REPEATS, 1, device)["sampled"]
    amount = prompts.shape[0] * s.NEW_TOKENS
    report.row(f"{name}, batch {len(prompts)}: sampled", timing.rate(amount)[0], "tok/s",
               peer=amount / greedy.median, peer_name="ours, greedy",
               note="temperature 0.8, top-k 50, top-p 0.95")  # fmt: skip


@torch.no_grad()
def measure_memory(report, s, device, name):
    """Bytes of caches against the formula, and what windows save."""
    for shape in s.MODELS:
        config = SHAPES[shape]
        with torch.device("meta"):
            specs = Transformer(config).specs
        dtype, n_rows, capacity = torch.bfloat16, 8, config.block_size
        formula = n_rows * capacity * bytes_per_token(specs, dtype)
        if device.type == "cuda":
            before = torch.cuda.memory_allocated()
            cache = ContiguousCache(specs, n_rows, capacity, dtype, device)
            taken = torch.cuda.memory_allocated() - before
        else:
            cache = ContiguousCache(specs, n_rows, capacity, dtype, device)
            taken = cache.nbytes
        report.row(f"{shape}: memory of a cache of 8 rows of 1,024", taken / 2**20, "MiB", limit=formula / 2**20,
                   limit_name="2 L Hkv D values a token", higher_is_better=False,
                   note=f"bfloat16; {bytes_per_token(specs, dtype):,} bytes a token, one spare slot a row")  # fmt: skip
        del cache
    windows = tuple(128 if i % 4 else None for i in range(SHAPES[name].n_layer))
    with torch.device("meta"):
        specs = Transformer(type(config)(**SHAPES[name].to_dict() | {"windows": windows})).specs
    sliding, full = (kind(specs, 8, 1024, torch.bfloat16).nbytes for kind in (SlidingCache, ContiguousCache))
    report.row(f"{name}, windows of 128 in three layers of four: memory with rings", sliding / 2**20,
               "MiB", peer=full / 2**20, peer_name="contiguous", higher_is_better=False,
               note="8 rows of 1,024, chunk 128")  # fmt: skip


PARTS = {
    "checks": check,
    "length": measure_length,
    "kernels": measure_kernels,
    "generate": measure_generation,
    "memory": measure_memory,
}


if __name__ == "__main__":
    main()
