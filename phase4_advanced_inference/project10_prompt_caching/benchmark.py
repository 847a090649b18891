"""Measure project 10: time to the first token by hit rate, what remembering costs, and the risk of cached answers.

    uv run python phase4_advanced_inference/project10_prompt_caching/benchmark.py
    uv run python phase4_advanced_inference/project10_prompt_caching/benchmark.py --parts first_token

checks: logits and texts with a hit are those without. first_token: the time to it when a part of the prompt is known,
against the floating-point operations that remain (attention included), and against `transformers` with a copied cache.
costs: of copying keys and values in and out, and of the tree. responses: right and wrong hits of a semantic cache.
"""

import copy
import dataclasses
import functools
import tomllib
from pathlib import Path

import torch

from common import catalog
from common.benchmark import Report, measure, run_parts
from common.device import synchronize
from common.plots import curves
from common.run import Run
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.decoder import Decoder
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, Writer
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer, transformers_model
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token
from phase4_advanced_inference.project10_prompt_caching import benchmark_config
from phase4_advanced_inference.project10_prompt_caching.prefix_cache import RadixCache
from phase4_advanced_inference.project10_prompt_caching.prompt_cache import PromptCache, reading_flops
from phase4_advanced_inference.project10_prompt_caching.response_cache import SemanticCache
from phase4_advanced_inference.project10_prompt_caching.segments import Segment

CLAIM = "up to 8× (GPU) and 60× (CPU) sooner (Prompt Cache, abstract)"
SHAPES = {
    "small": PRESETS["llama-7b"](vocab_size=8192, n_layer=6, n_embd=512, n_head=8, n_kv_head=2, n_ff=1536),
    "1.1B": PRESETS["llama-7b"](n_layer=22, n_embd=2048, n_kv_head=4, n_ff=5632),  # TinyLlama's
}


def main(argv=None):
    """Run all parts and write the results; a part that fails leaves the others alone."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = run.settings
        torch.manual_seed(s.SEED)
        report = Report("project10_prompt_caching", "Prompt caching", run.device, keep=len(s.PARTS) < len(PARTS))
        parts = {part: functools.partial(PARTS[part], report, s, run.device) for part in s.PARTS}
        run_parts(report, parts)


def model_of(s, device):
    """The model that is measured, its weights random, with room for the prompt and some tokens more."""
    config = dataclasses.replace(SHAPES[s.MODEL], block_size=(s.PROMPT_TOKENS // 64 + 2) * 64)
    with device:
        return Transformer(config).to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()


def draw(model, n, device):
    """So many random tokens."""
    return torch.randint(0, model.config.vocab_size, (n,), device=device).tolist()


# -- checks


@torch.no_grad()
def check(report, s, device):
    """Logits behind a restored beginning against those of one forward over all; greedy texts with and without."""
    torch.set_float32_matmul_precision("highest")
    shape = {"vocab_size": 512, "block_size": 256, "n_layer": 2, "n_head": 4, "n_embd": 64}
    for family, config in {"gpt2": PRESETS["gpt2"](**shape), "llama": PRESETS["llama-7b"](**shape)}.items():
        with device:
            model = Transformer(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        tokens, prefixes = draw(model, 120, device), PromptCache()
        caches = [ContiguousCache(model.specs, 1, 128, device=device) for _ in range(2)]
        Decoder(model, caches[0]).step([(0, 100, 0)], tokens[:100])
        prefixes.keep(caches[0], 0, tokens[:100])
        known = prefixes.restore(caches[1], 0, tokens)
        got = Decoder(model, caches[1]).step([(0, 120 - known, 120 - known)], tokens[known:])
        exact = model(torch.tensor(tokens, device=device))[known:]
        error = float((got - exact).norm() / exact.norm())
        report.check(f"{family}: logits with a hit are those without", known == 100 and error < 1e-5, f"{error:.1e}")
        params, tokenizer = SamplingParams(20, 0.0, stop_ids=()), NumberTokenizer(512)
        texts = []
        for writer in (Writer(model, tokenizer), Writer(model, tokenizer, prefixes=PromptCache())):
            texts.append([[p.token for p in writer.stream([tokens[:n]], [params])] for n in (60, 60, 90, 40)])
        report.check(f"{family}: greedy texts with hits are those without", texts[0] == texts[1], "4 prompts, float32")


# -- time to the first token


@torch.no_grad()
def measure_first_token(report, s, device):
    """Times by hit rate, in turn; the suffix is new each time, so that exactly the prefix is known."""
    model, n = model_of(s, device), s.PROMPT_TOKENS
    params, tokenizer = SamplingParams(2, 0.0, stop_ids=()), NumberTokenizer(model.config.vocab_size)
    build, prefix, prefixes = catalog.resolve("caches", s.CACHE), draw(model, n, device), {}
    theirs = transformers_model(model.config, next(model.parameters()).dtype, device, report)
    runs, known = {}, {rate: int(n * rate) for rate in (0.0, *s.HIT_RATES)}
    for rate, length in known.items():
        prefixes[rate] = PromptCache()
        writer = Writer(
            model, tokenizer, 1, None, build, s.CHUNK, graphs=device.type == "cuda", prefixes=prefixes[rate]
        )
        if length:
            list(writer.stream([prefix[:length]], [dataclasses.replace(params, max_new_tokens=1)]))
        runs["ours", rate] = lambda writer=writer, length=length: first_token(
            writer, prefix[:length] + draw(model, n - length, device), params
        )
        if theirs is not None:
            runs["theirs", rate] = their_first_token(theirs, prefix[:length], n, model.config.vocab_size, device)
    timings = measure(runs, s.REPEATS, 2, device)
    for rate, length in known.items():
        counts = prefixes[rate].statistics
        expected = (s.REPEATS + 2) * length
        report.check(f"{s.MODEL}: exactly {rate:.1%} of the tokens were found", counts.found == expected, f"{counts}")
    first_token_rows(report, s, model, timings, known, theirs is not None)


def first_token_rows(report, s, model, timings, known, peer):
    """One row a hit rate, and the plot."""
    n, base = s.PROMPT_TOKENS, timings["ours", 0.0].median
    report.row(f"{s.MODEL}: first token of a prompt of {n:,}, nothing known", base * 1e3, "ms", higher_is_better=False,
               peer=timings["theirs", 0.0].median * 1e3 if peer else None, peer_name="transformers" if peer else None,
               note=f"{reading_flops(model, 0, n) / base / 1e12:.3g} TFLOP/s")  # fmt: skip
    lines = {"measured": ([], []), "limit: operations that remain": ([], [])}
    for rate in s.HIT_RATES:
        ours, limit = (
            base / timings["ours", rate].median,
            reading_flops(model, 0, n) / reading_flops(model, known[rate], n),
        )
        theirs = timings["theirs", 0.0].median / timings["theirs", rate].median if peer else None
        report.row(f"{s.MODEL}: times as soon with {rate:.1%} of {n:,} tokens known", ours, "×", claim=CLAIM,
                   spread=[base / timings["ours", rate].high, base / timings["ours", rate].low], peer=theirs,
                   peer_name="transformers, a copied cache" if peer else None, limit=limit,
                   limit_name="operations that remain", note=f"{timings['ours', rate].median * 1e3:.1f} ms" + (
                   f", transformers {timings['theirs', rate].median * 1e3:.1f} ms" if peer else ""))  # fmt: skip
        for line, value in zip(lines.values(), (ours, limit)):
            line[0].append(rate)
            line[1].append(value)
    for name, (xs, ys) in lines.items():
        report.series(name, xs, ys)
    curves(report.folder / f"project10_prompt_caching.{report.slug}.png", lines, "part of the prompt that is known",
           "times as soon as without", f"First token of {n:,}, {s.MODEL}")  # fmt: skip


def first_token(writer, prompt, params):
    """Read a prompt and draw one token; the stream is closed then, so that nothing of this prompt is remembered."""
    stream = writer.stream([prompt], [params])
    next(stream)
    stream.close()


def their_first_token(theirs, prefix, n, vocab_size, device):
    """What its documentation recommends: read the prefix once, and copy that cache for each prompt."""
    from transformers import DynamicCache

    start = DynamicCache(config=theirs.config)
    if prefix:
        theirs(torch.tensor([prefix], device=device), past_key_values=start, logits_to_keep=1)

    def run():
        cache = copy.deepcopy(start)
        rest = torch.randint(0, vocab_size, (1, n - len(prefix)), device=device)
        return int(theirs(rest, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax())

    return run


# -- what it costs


@torch.no_grad()
def measure_costs(report, s, device):
    """Copying a prompt's keys and values in and out, and the tree alone, a token."""
    model, n = model_of(s, device), s.PROMPT_TOKENS
    dtype = next(model.parameters()).dtype
    cache = ContiguousCache(model.specs, 1, model.config.block_size, dtype, device)
    tokens, size = draw(model, n, device), bytes_per_token(model.specs, dtype)
    cache.append_tokens(0, [(torch.randn(n, spec.n_kv_head, spec.head_size, dtype=dtype, device=device),) * 2
                            for spec in model.specs])  # fmt: skip
    segment = Segment(cache.read_tokens(0, 0, n))

    def restore():
        cache.truncate(0, 0)
        cache.append_tokens(0, segment.first(n))

    def remember():
        PromptCache().keep(cache, 0, tokens)

    timings = measure({"restore": restore, "keep": remember}, s.REPEATS, 1, device)
    for name, what in (("restore", "put known keys and values into a cache"), ("keep", "copy them out and remember")):
        report.row(f"{s.MODEL}: {what}", timings[name].median / n * 1e6, "µs/token", higher_is_better=False,
                   note=f"{n:,} tokens of {size:,} bytes: {timings[name].median * 1e3:.2f} ms")  # fmt: skip
    tree = RadixCache()
    texts = [tokens[: n // 2] + torch.randint(0, 100, (n // 2,)).tolist() for _ in range(200)]
    for text in texts:
        tree.insert(text, lambda start, stop: Segment([(torch.empty(stop - start, 0),) * 2]))
    synchronize(device)
    timing = measure({"match": lambda: [tree.match(text).release() for text in texts]}, s.REPEATS, 1)["match"]
    report.row("find a text in a tree of 200", timing.median / sum(map(len, texts)) * 1e6, "µs/token",
               higher_is_better=False, note=f"{n:,} tokens each, half of them shared")  # fmt: skip


# -- cached answers


def measure_responses(report, s, device):
    """How often a semantic cache gives the right answer, and how often a wrong one, by threshold."""
    del s, device
    pairs = tomllib.loads(Path(__file__).with_name("question_pairs.toml").read_text(encoding="utf-8"))
    alike, unlike = pairs["alike"], pairs["unlike"]
    thresholds = [0.5, 0.6, 0.7, 0.8, 0.9]
    right, wrong = [], []
    for threshold in thresholds:
        hits = []
        for some in (alike, unlike):
            hits.append(0)
            for asked, again in some:
                cache = SemanticCache(threshold)
                cache.put(asked, "an answer")
                hits[-1] += cache.get(again) is not None
        right.append(hits[0] / len(alike) * 100)
        wrong.append(hits[1] / len(unlike) * 100)
        report.row(f"semantic cache, threshold {threshold}: questions in other words that are recognised", right[-1],
                   "%", note=f"and {wrong[-1]:.0f}% of the questions that mean something else get the wrong answer; "
                   f"{len(alike)} and {len(unlike)} pairs")  # fmt: skip
    lines = {"the same question: hits": (thresholds, right), "another question: wrong answers": (thresholds, wrong)}
    for name, (xs, ys) in lines.items():
        report.series(f"semantic cache, {name}", xs, ys)
    curves(report.folder / f"project10_prompt_caching.responses.{report.slug}.png", lines, "threshold",
           "% of the pairs", "A semantic cache: letters as vectors")  # fmt: skip


PARTS = {
    "checks": check,
    "first_token": measure_first_token,
    "costs": measure_costs,
    "responses": measure_responses,
}


if __name__ == "__main__":
    main()
