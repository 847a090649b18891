"""Everything together: whatever cache, drafts, chunks, sampling and loop, the text is that of plain decoding."""

import itertools
import random

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.generation import Generation, SamplingParams, Writer, append, generate
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase4_advanced_inference.project10_prompt_caching.prompt_cache import PromptCache
from phase4_advanced_inference.project11_speculative_decoding.drafts import ModelDraft, NGramDraft
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation
from phase4_advanced_inference.project11_speculative_decoding.speculative import SpeculativeWriter
from phase4_advanced_inference.project12_dynamic_batching.batcher import Batcher
from phase4_advanced_inference.project13_paged_attention.runner import Runner

V, LONG, ROWS = 61, 96, 3


def make(seed):
    """A model whose attention matters: larger weights than at the beginning of training."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "block_size": LONG, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_ff": 48, "n_kv_head": 2}
    model = Transformer(PRESETS["llama-7b"](**sizes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


MODEL, SIMILAR, TOKENIZER = make(0), make(0), NumberTokenizer(V)
for weight in SIMILAR.parameters():  # so alike that it often guesses right, and often not
    weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)


def requests():
    """Prompts that share beginnings and repeat themselves, each with its own length of text."""
    rng = random.Random(0)
    shared = [rng.randrange(V) for _ in range(33)]
    tails = [[rng.randrange(V) for _ in range(rng.randint(1, 12))] for _ in range(6)]
    prompts = [shared[: rng.choice((16, 33))] + 2 * tail for tail in tails] + [shared, [7]]
    return prompts, [rng.randint(1, 20) for _ in prompts]


PROMPTS, NEWS = requests()
KINDS = {
    "greedy": {"temperature": 0.0},
    "sampled": {
        "temperature": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.4,
        "logit_bias": {3: 1.5, 5: -100},
    },
}
PARAMS = {
    kind: [SamplingParams(n, stop_ids=(), seed=50 + i, **options) for i, n in enumerate(NEWS)]
    for kind, options in KINDS.items()
}
TEXTS = {
    kind: [generate(MODEL, TOKENIZER, *each).tokens for each in zip(PROMPTS, params)] for kind, params in PARAMS.items()
}
DRAFTS = {"no draft": None, "ngram": NGramDraft, "model": lambda: ModelDraft(SIMILAR)}
LOOPS = ("writer", "writer, paged", "batcher", "runner", "runner, ahead")


def speculation_of(draft):
    """A speculation whose text is that of plain decoding, sampled or not; None without a draft."""
    return None if DRAFTS[draft] is None else Speculation(DRAFTS[draft](), k=3, rule="coupled")


def engine_of(loop, sharing, draft, chunk):
    """What continues prompts in this way: engine(prompts, params) -> their tokens."""
    options = {"n_rows": ROWS, "capacity": LONG}
    if loop.startswith("writer"):
        options |= {"cache": "paged" if "paged" in loop else "contiguous", "chunk": chunk}
        options |= {"prefixes": PromptCache() if sharing else None}
        if DRAFTS[draft] is None:
            return Writer(MODEL, TOKENIZER, **options)
        return SpeculativeWriter(MODEL, TOKENIZER, DRAFTS[draft](), 3, "coupled", **options)
    options |= {"max_tokens": max(chunk, ROWS)}
    if loop == "batcher":
        return Batcher(MODEL, TOKENIZER, prefixes=PromptCache() if sharing else None, **options)
    ahead = "ahead" in loop
    return Runner(MODEL, TOKENIZER, share=sharing, page=4, ahead=ahead, speculation=speculation_of(draft), **options)


def possible(loop, draft):
    """Drafts need to know the text, which a loop that runs ahead does not; project 12's knows none."""
    return DRAFTS[draft] is None or loop not in ("batcher", "runner, ahead")


COMBINATIONS = [
    (loop, sharing, draft, chunk, kind)
    for loop, sharing, draft, chunk, kind in itertools.product(LOOPS, (True, False), DRAFTS, (5, 512), KINDS)
    if possible(loop, draft)
]


@pytest.mark.parametrize(("loop", "sharing", "draft", "chunk", "kind"), COMBINATIONS)
def test_every_combination_writes_the_text_of_plain_decoding(loop, sharing, draft, chunk, kind):
    engine = engine_of(loop, sharing, draft, chunk)
    for _ in range(2):  # the second time what was read is known, where it is kept
        texts = [Generation(0) for _ in PROMPTS]
        for piece in engine.stream(PROMPTS, PARAMS[kind]):
            append(texts[piece.index], piece)
        assert [text.tokens for text in texts] == TEXTS[kind]
        assert all(text.finish_reason == "length" for text in texts)
    assert engine.cache.lengths == [0] * ROWS


def test_greedy_rejection_is_plain_decoding_too():
    for draft in ("ngram", "model"):
        speculation = Speculation(DRAFTS[draft](), k=3)
        runner = Runner(MODEL, TOKENIZER, ROWS, LONG, max_tokens=8, speculation=speculation)
        assert [text.tokens for text in runner.generate(PROMPTS, PARAMS["greedy"])] == TEXTS["greedy"]
        assert speculation.tally.drafted > speculation.tally.kept >= (10 if draft == "model" else 0)


if __name__ == "__main__":
    print(f"{len(COMBINATIONS)} combinations are to write the same {len(PROMPTS)} texts, greedy and sampled")
    raise SystemExit(pytest.main([__file__]))
