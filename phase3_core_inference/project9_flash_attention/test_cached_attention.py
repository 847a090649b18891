"""Tests of decoding through project 8's cache on the split-KV kernel."""

import pytest
import torch

from common import catalog
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project9_flash_attention.cached_attention import flash_cache, split_attention

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 128, "block_size": 64}
MODELS = {
    "gpt2": PRESETS["gpt2"](**SHAPE),
    "grouped": PRESETS["llama-7b"](**SHAPE, n_kv_head=2),
    "windows": PRESETS["llama-7b"](**SHAPE, n_kv_head=2, windows=(8, None)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_decoding_gives_the_logits_of_a_whole_forward(name, padded):
    torch.manual_seed(0)
    model = Transformer(MODELS[name]).eval()
    rows = [torch.randint(0, 128, (n,)) for n in (30, 17)]
    cache = flash_cache(model.specs, 2, 64, padded=padded)
    with torch.no_grad():
        exact = [model(row[None])[0] for row in rows]
        for row, tokens in enumerate(rows):  # all but the last 8 as prompts, then one by one, both rows in a step
            plan = cache.plan([(row, len(tokens) - 8, 0)], tokens[:-8].tolist())
            model(plan.tokens, plan)
        for i in range(-8, 0):
            plan = cache.plan([(0, 1, 1), (1, 1, 1)], [int(tokens[i]) for tokens in rows])
            logits = model(plan.tokens, plan)[:2]
            torch.testing.assert_close(logits, torch.stack([x[i] for x in exact]), atol=1e-4, rtol=1e-4)


def test_what_lies_behind_a_rows_end_is_not_read():
    q, (k, v) = torch.randn(2, 1, 4, 8), torch.randn(2, 2, 2, 20, 8)
    bias, ends = torch.zeros(2, 1, 20), torch.tensor([5, 20])
    bias[0, 0, 5:] = -torch.inf
    expected = split_attention(q, k, v, bias, 0.3)  # without ends: by the mask
    k[0, :, 5:] = v[0, :, 5:] = float("nan")
    torch.testing.assert_close(split_attention(q, k, v, bias, 0.3, ends), expected)


def test_the_catalog_knows_it():
    assert catalog.resolve("caches", "flash") is flash_cache


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
