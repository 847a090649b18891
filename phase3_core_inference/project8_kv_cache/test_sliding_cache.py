"""Rings: they go round several times, take no more memory, and refuse what they have already forgotten."""

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache
from phase3_core_inference.project8_kv_cache.sliding_cache import SlidingCache

SMALL = {"vocab_size": 61, "block_size": 200, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_ff": 48}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(PRESETS["llama-7b"](**SMALL, windows=(6, None, 11))).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("sizes", [[1] * 200, [4] * 50, [4, 1, 1, 3, 1] * 20], ids=["decode", "chunks", "mixed"])
def test_a_ring_goes_round_many_times(model, sizes):
    tokens = torch.randint(0, 61, (200,), generator=torch.Generator().manual_seed(1))
    cache = SlidingCache(model.specs, 2, 200, chunk=4)
    assert [store.n_slots for store in cache.stores] == [9, 200, 14]
    parts = [model(part, cache.plan([(1, len(part), len(part))])) for part in tokens.split(sizes)]
    torch.testing.assert_close(torch.cat(parts), model(tokens), atol=3e-5, rtol=0)


def test_rows_that_went_round_beside_rows_that_did_not(model):
    tokens = torch.arange(60) % 61
    cache = SlidingCache(model.specs, 2, 200, chunk=4)
    for i in range(0, 48, 4):
        model(tokens[i : i + 4], cache.plan([(0, 4, 0)]))
    for i in range(12):
        pair = torch.stack((tokens[48 + i], tokens[i]))
        logits = model(pair, cache.plan([(0, 1, 1), (1, 1, 1)]))
        expected = torch.stack((model(tokens)[48 + i], model(tokens)[i]))
        torch.testing.assert_close(logits, expected, atol=3e-5, rtol=0)


def test_memory_of_a_window_does_not_grow_with_the_capacity(model):
    windowed = [spec for spec in model.specs if spec.window]
    sizes = {capacity: SlidingCache(windowed, 1, capacity, chunk=4).nbytes for capacity in (50, 100, 200)}
    assert len(set(sizes.values())) == 1
    assert sizes[200] < ContiguousCache(windowed, 1, 200).nbytes / 8


def test_steps_longer_than_the_chunk_are_refused_once_the_ring_is_full(model):
    cache = SlidingCache(model.specs, 1, 200, chunk=4)
    cache.plan([(0, 9, 0)])  # all of it fits into the smallest ring
    with pytest.raises(ValueError, match="row 0: 5 new tokens exceed chunk=4"):
        cache.plan([(0, 5, 0)])
    assert cache.lengths == [9] and cache.step_limit == 4
    cache.plan([(0, 4, 0)])


def test_only_what_is_still_there_can_be_gone_back_to(model):
    cache, tokens = SlidingCache(model.specs, 1, 200, chunk=4), torch.arange(61)
    for i in range(0, 20, 4):
        model(tokens[i : i + 4], cache.plan([(0, 4, 0)]))
    with pytest.raises(ValueError, match="cannot be truncated to 16 tokens: 20 were written"):
        cache.truncate(0, 16)
    cache.truncate(0, 18)
    cache.truncate(0, 17)
    with pytest.raises(ValueError, match="cannot be truncated to 16 tokens: 20 were written"):
        cache.truncate(0, 16)  # in two bites it is as far
    logits = model(tokens[17:21], cache.plan([(0, 4, 4)]))
    torch.testing.assert_close(logits, model(tokens[:21])[17:], atol=3e-5, rtol=0)
    cache.truncate(0, 0)  # always possible: nothing of it is seen again
    logits = model(tokens[:4], cache.plan([(0, 4, 4)]))
    torch.testing.assert_close(logits, model(tokens[:4]), atol=3e-5, rtol=0)


if __name__ == "__main__":
    config = PRESETS["llama-7b"](**SMALL, windows=(6, None, 11))
    for chunk in (1, 4, 64):
        cache = SlidingCache(Transformer(config).specs, 1, 200, chunk=chunk)
        print(f"chunk {chunk}: slots a layer {[store.n_slots for store in cache.stores]}")
    raise SystemExit(pytest.main([__file__]))
