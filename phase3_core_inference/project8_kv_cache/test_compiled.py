"""The forward over a cache compiles as one graph, once for each shape, and computes the same."""

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.decoder import Decoder, FastDecoder
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache
from phase3_core_inference.project8_kv_cache.sliding_cache import SlidingCache

SMALL = {"vocab_size": 61, "block_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32}
SHAPES = {
    "gpt2": PRESETS["gpt2"](**SMALL),
    "windows": PRESETS["llama-7b"](**SMALL, n_ff=48, n_kv_head=2, windows=(6, None)),
}


@pytest.fixture(params=SHAPES)
def model(request):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Transformer(SHAPES[request.param]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


def caches(specs):
    yield ContiguousCache(specs, 2, 96, padded=True, round_keys=lambda n: 96)
    yield SlidingCache(specs, 2, 96, chunk=20, padded=True, round_keys=lambda n: 96)


def test_decode_and_prefill_compile_without_a_break_and_never_again(model):
    """`backend="eager"`: what is tested is the tracing, not the code."""
    compiles = []

    def backend(graph, inputs):
        compiles.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    tokens = torch.arange(80) % 61
    exact = model(tokens)
    for cache in caches(model.specs):
        before = len(compiles)
        for start in (0, 20):  # two prefills of one shape
            plan = cache.plan([(0, 20, 1)], tokens[start : start + 20].tolist())
            torch.testing.assert_close(compiled(plan.tokens, plan)[0], exact[start + 19], atol=2e-5, rtol=0)
        for i in range(40, 60):
            plan = cache.plan([(0, 1, 1)], tokens[i : i + 1].tolist())
            torch.testing.assert_close(compiled(plan.tokens, plan)[0], exact[i], atol=2e-5, rtol=0)
        for i in range(60, 72, 4):
            plan = cache.plan([(0, 4, 4)], tokens[i : i + 4].tolist())
            torch.testing.assert_close(compiled(plan.tokens, plan), exact[i : i + 4], atol=2e-5, rtol=0)
        cache.truncate(0, 70)
        plan = cache.plan([(0, 4, 4)], tokens[70:74].tolist())
        torch.testing.assert_close(compiled(plan.tokens, plan), exact[70:74], atol=2e-5, rtol=0)
        # prefill, decode, verify; a ring without a window to forget by is the same code again
        assert len(compiles) - before == (0 if before and not model.config.windows else 3)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_fast_decoder_takes_the_steps_of_a_plain_one(model, compiled):
    plain = Decoder(model, ContiguousCache(model.specs, 3, 96))
    fast = FastDecoder(model, ContiguousCache(model.specs, 3, 96, padded=True), compiled=compiled)
    works = [[(0, 9, 1), (2, 5, 1)], [(0, 1, 1), (2, 1, 1)], [(1, 30, 0)], [(0, 3, 3), (1, 3, 3), (2, 3, 3)],
             [(0, 1, 1), (1, 1, 1), (2, 1, 1)]]  # fmt: skip
    works += [[(2, 1, 1), (0, 1, 1)]] * 40  # into the next bucket of lengths
    for number, work in enumerate(works):
        tokens = [(7 * number + i) % 61 for i in range(sum(n for _, n, _ in work))]
        expected, got = plain.step(work, tokens), fast.step(work, tokens)
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert plain.cache.lengths == fast.cache.lengths
    assert all(fast.cache.keeps(plan) for plan in fast._steps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_steps_compute_the_same(model):
    model.to("cuda")
    plain = Decoder(model, ContiguousCache(model.specs, 3, 96, device="cuda"))
    fast = FastDecoder(model, ContiguousCache(model.specs, 3, 96, device="cuda", padded=True), graphs=True)
    for number in range(60):
        work = [(row, 1, 1) for row in range(3) if number % (row + 2)]
        tokens = [(7 * number + i) % 61 for i in range(len(work))]
        torch.testing.assert_close(fast.step(work, tokens), plain.step(work, tokens), atol=1e-3, rtol=0)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
