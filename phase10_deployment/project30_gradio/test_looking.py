"""What is shown of a model is true: maps against the kernel, odds against formulas, guesses against plain decoding."""

import math
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from phase1_foundation.project3_pretrain.plans import LayerSpec, sdpa
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase10_deployment.project30_gradio.backend import with_adapter
from phase10_deployment.project30_gradio.blocks_now import MOST_SHOWN, Row, Snapshot, shown_blocks, snapshot
from phase10_deployment.project30_gradio.guessing import guess
from phase10_deployment.project30_gradio.looking import (
    LONGEST,
    Watching,
    attention_maps,
    entropy,
    next_logprobs,
    reshaped,
    shape_of,
)

TEXT = [72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100]


# -- attention


@pytest.mark.parametrize("window", [None, 3])
def test_the_maps_are_the_weights_by_which_the_kernel_mixes(window):
    torch.manual_seed(0)
    T, H, G, D = 7, 4, 2, 8
    q, k, v = torch.randn(1, T, H, D), torch.randn(1, T, G, D), torch.randn(1, T, G, D)
    plan = Watching(torch.zeros(1, T, dtype=torch.long), [LayerSpec(H, G, D, D, window, D**-0.5)], sdpa, layer=0)
    mixed = plan.attend(0, q, k, v)
    values = v[0].transpose(0, 1).repeat_interleave(H // G, dim=0)  # (H, T, D)
    assert torch.allclose((plan.maps @ values).transpose(0, 1), mixed[0], atol=1e-6)
    assert torch.allclose(plan.maps.sum(-1), torch.ones(H, T))


def test_watching_changes_nothing_of_what_the_model_computes(build):
    model, tokens = build().model, torch.tensor([TEXT])
    for layer in range(2):
        assert torch.equal(model(tokens, Watching(tokens, model.specs, model.kernel, layer)), model(tokens))


def test_maps_of_a_layer(build):
    engine = build()
    first, second = (torch.tensor(attention_maps(engine, TEXT, layer)) for layer in range(2))
    assert first.shape == (4, 11, 11) and not torch.allclose(first, second)
    assert torch.equal(first.triu(1), torch.zeros(4, 11, 11))  # nobody sees what comes later
    assert shape_of(engine) == (2, 4, 256)
    for tokens in ([], [1] * (LONGEST + 1)):
        with pytest.raises(ValueError, match="at least 1 and at most"):
            attention_maps(engine, tokens, 0)


# -- the next token


def test_the_next_tokens_odds_are_the_models(build, tokenizer):
    engine = build()
    logprobs = torch.tensor(next_logprobs(engine, TEXT))
    expected = engine.model(torch.tensor([TEXT]))[0, -1, : tokenizer.vocab_size].log_softmax(-1)
    assert torch.allclose(logprobs, expected, atol=1e-5)
    drawn = generate(engine.model, tokenizer, TEXT, SamplingParams(1, 0.0, stop_ids=())).tokens[0]
    assert int(logprobs.argmax()) == drawn
    assert len(next_logprobs(engine, TEXT * 40)) == len(logprobs)  # longer than block_size: its end counts


def test_temperature_and_cuts_are_the_formulas():
    logprobs = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    bent = [p**2 for p in (0.4, 0.3, 0.2, 0.1)]
    assert reshaped(logprobs, 0.5, 0, 1.0, 0.0) == pytest.approx([p / sum(bent) for p in bent])
    assert reshaped(logprobs, 1.0, 2, 1.0, 0.0) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert reshaped(logprobs, 1.0, 0, 0.75, 0.0) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert reshaped(logprobs, 1.0, 0, 1.0, 0.6) == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert entropy(reshaped(logprobs, 0.0, 0, 1.0, 0.0)) == 0.0


def test_an_adapter_is_under_the_forward_that_asks_for_it_alone(build, adapters):
    engine = build(adapters=adapters)
    base = next_logprobs(engine, TEXT)
    polite = with_adapter(engine, "polite", next_logprobs, TEXT)
    assert polite != base and with_adapter(engine, "tiny", next_logprobs, TEXT) == base
    request = engine.add(TEXT, SamplingParams(1, 0.0, stop_ids=()), adapter="polite")
    while engine.busy:
        engine.step()
    assert request.tokens[-1] == max(range(len(polite)), key=polite.__getitem__)
    with pytest.raises(ValueError):
        with_adapter(engine, "polite", attention_maps, [], 0)
    assert next_logprobs(engine, TEXT) == base


# -- guesses


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_guessed_and_checked_the_text_is_that_of_plain_decoding(build, tokenizer, temperature):
    engine, tokens, guesses = build(), [*TEXT, *TEXT, *TEXT[:4]], []
    text, n = list(tokens), 40
    while len(text) < len(tokens) + n:
        guesses.append(guess(engine, text, 4, temperature, seed=5))
        text += guesses[-1].gained
    plain = generate(engine.model, tokenizer, tokens, SamplingParams(n, temperature, seed=5, stop_ids=())).tokens
    assert text[len(tokens) :][:n] == plain
    assert all(len(each.draft) <= 4 and each.kept <= len(each.draft) for each in guesses)


def counting(x):
    """A model that counts to 5, again and again."""
    return 9.0 * F.one_hot((x + 1) % 5, 8)


def test_what_repeats_is_guessed_right_and_the_first_wrong_guess_ends_it():
    counting.config = SimpleNamespace(block_size=16)
    engine = SimpleNamespace(model=counting, vocab_size=lambda: 8, device="cpu", tokenizer=NumberTokenizer(8))
    assert guess(engine, [0, 1, 2, 3, 4, 0, 1], 4) == ([2, 3, 4, 0], 4, 1)
    assert guess(engine, [0, 1, 2, 7, 7, 0, 1], 4) == ([2, 7, 7, 0], 1, 3)
    assert guess(engine, [0, 1, 2], 4) == ([], 0, 3)
    assert guess(engine, [0] * 14, 4).draft == [0]  # there is room for two
    assert guess(engine, [0] * 15, 4) is None


# -- blocks


def test_a_snapshot_tells_who_has_what(build):
    engine, prompt = build(), [*range(40, 80)]  # two full blocks of 16, and a half
    for i in range(3):
        engine.add(prompt, SamplingParams(20, 1.0, seed=i, stop_ids=()))
    for _ in range(6):
        engine.step()
    now = snapshot(engine)
    assert len(now.rows) == 3 and now.saved == 4  # two blocks that three texts have
    counts, tree = engine.cache.allocator.counts, set(now.kept)
    for block in range(now.n_blocks):
        assert counts[block] == len(now.owners.get(block, [])) + (block in tree)
    assert [row.n_tokens for row in now.rows] == [engine.cache.lengths[row.row] for row in now.rows]
    assert pickle.loads(pickle.dumps(now)) == now
    while engine.busy:
        engine.step()
    after = snapshot(engine)
    assert not after.rows and not after.owners and len(after.kept) >= 3 and after.found == 2 * 32


def test_of_very_many_blocks_those_in_use_are_shown():
    now = Snapshot((Row(0, "", 20, (7, 90_000)),), (50_000,), 100_000, 16, 64, 0, 0, 0)
    blocks = shown_blocks([now])
    assert {7, 50_000, 90_000} <= set(blocks) and len(blocks) == 35 and blocks == sorted(blocks)
    crowd = Snapshot((Row(0, "", 20, tuple(range(5000))),), (), 100_000, 16, 64, 0, 0, 0)
    assert len(shown_blocks([crowd])) == MOST_SHOWN


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
