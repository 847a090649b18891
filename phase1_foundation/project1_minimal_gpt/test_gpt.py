"""Tests of project 1: the model against transformers, sampling against its definitions, the tokenizer."""

import math

import pytest
import torch
import torch.nn.functional as F

from phase1_foundation.project1_minimal_gpt import benchmark
from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project1_minimal_gpt.model import GPT, GPTConfig, explicit_attention, fast_attention
from phase1_foundation.project1_minimal_gpt.optimization import build_optimizer, training_step
from phase1_foundation.project1_minimal_gpt.sampling import draw, next_token_probabilities, stream
from phase1_foundation.project1_minimal_gpt.sampling import generate as generate_tokens

TINY = {"vocab_size": 17, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**TINY, **changes})).eval()


def some_tokens(rows=3, length=8, seed=1):
    return torch.randint(TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- the model


def test_logits_and_gradients_are_those_of_transformers():
    for tie, gelu in ((True, "tanh"), (False, "exact")):
        ours = tiny(n_layer=3, tie_head=tie, gelu=gelu, init_std=0.2)
        theirs = benchmark.huggingface_twin(ours)
        x, y = some_tokens(), some_tokens(seed=2)
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-5, rtol=1e-5)
        loss = F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
        torch.testing.assert_close(ours(x, y), loss, atol=1e-6, rtol=1e-6)
        loss.backward()
        ours(x, y).backward()
        wanted = theirs.transformer.h[1].mlp.c_proj.weight.grad.T
        torch.testing.assert_close(ours.blocks[1].mlp.down_proj.weight.grad, wanted, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(
            ours.token_embedding.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-6, rtol=1e-4
        )


def test_a_position_sees_itself_and_the_past_alone():
    for attention in ("fast", "explicit"):
        model = tiny(attention=attention, init_std=0.2)
        before = some_tokens()
        after = before.clone()
        after[:, 5] = (after[:, 5] + 1) % TINY["vocab_size"]
        changed = (model(before) - model(after)).abs().amax(dim=(0, 2)) > 1e-6
        assert changed.tolist() == [False] * 5 + [True] * 3


def test_fast_attention_is_explicit_attention():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    slow, fast = explicit_attention(*inputs), fast_attention(*inputs)
    torch.testing.assert_close(slow, fast)
    weight = torch.randn_like(slow)
    for a, b in zip(torch.autograd.grad(slow, inputs, weight), torch.autograd.grad(fast, inputs, weight)):
        torch.testing.assert_close(a, b)
    model, other = tiny(attention="fast"), tiny(attention="explicit")
    torch.testing.assert_close(model(some_tokens()), other(some_tokens()))


def test_attention_dropout_acts_in_training_alone():
    for attention in ("fast", "explicit"):
        model, x = tiny(attention=attention, dropout=0.5), some_tokens()
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_initial_weights_are_gpt2s():
    model = tiny(n_layer=8, n_embd=128, n_head=4, block_size=64, vocab_size=65)
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if "norm" in name and name.endswith("weight"):
            assert (weight == 1).all(), name
        elif name.endswith("bias"):
            assert (weight == 0).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(16) if residual else 0.02, rel=0.05), name
    x = torch.randint(65, (4, 64))
    assert model(x, x.roll(-1, 1)).item() == pytest.approx(math.log(65), abs=0.1)


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768))
        untied = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, tie_head=False))
    assert gpt2.n_parameters() == 124_439_808
    assert untied.n_parameters() - gpt2.n_parameters() == 50257 * 768
    assert "head.weight" in untied.state_dict() and "head.weight" not in gpt2.state_dict()
    assert not [name for name in tiny(bias=False).state_dict() if name.endswith("bias")]


def test_tied_head_is_trained_through_both_uses_and_survives_copies():
    import copy

    model = copy.deepcopy(tiny())
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    assert (model(some_tokens()) == 0).all()  # the head multiplies by the copy's own embedding


def test_the_model_overfits_one_batch():
    model = tiny().train()
    optimizer = build_optimizer(model, 1e-2, 0.0, (0.9, 0.99))
    x, y = some_tokens(rows=2), some_tokens(rows=2, seed=5)
    for _ in range(150):
        loss = training_step(model, optimizer, x, y, 1.0, torch.autocast("cpu", enabled=False))
    assert loss.item() < 0.02


def test_impossible_shapes_are_refused():
    for changes, message in (
        ({"n_embd": 15}, "n_embd=15 must be divisible by n_head=2: use 14 or 16"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"attention": "quick"}, "attention='quick' is not known: use one of"),
        ({"gelu": "relu"}, "gelu='relu' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            GPTConfig(**{**TINY, **changes})
    with pytest.raises(ValueError, match="9 tokens exceed block_size=8"):
        tiny()(some_tokens(length=9))


# ---- sampling


def test_truncation_is_that_of_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(64, 65, generator=torch.Generator().manual_seed(0))
    for temperature, top_k, top_p in (
        (0.7, None, None),
        (1.0, 5, None),
        (1.3, None, 0.8),
        (0.8, 20, 0.9),
        (1.0, 1, 0.1),
    ):
        wanted = TemperatureLogitsWarper(temperature)(None, logits)
        wanted = TopKLogitsWarper(top_k)(None, wanted) if top_k else wanted
        wanted = TopPLogitsWarper(top_p)(None, wanted) if top_p else wanted
        ours = next_token_probabilities(logits, temperature, top_k, top_p)
        torch.testing.assert_close(ours, F.softmax(wanted, dim=-1))


def test_nucleus_is_the_smallest_set_that_reaches_p():
    probabilities = torch.rand(100, 20, generator=torch.Generator().manual_seed(0)).double()
    probabilities /= probabilities.sum(-1, keepdim=True)
    kept = next_token_probabilities(probabilities.log(), top_p=0.7) > 0
    for row, mask in zip(probabilities, kept):
        inside = row[mask]
        assert inside.sum() >= 0.7 - 1e-6 and inside.sum() - inside.min() < 0.7 + 1e-6
        assert inside.min() >= row[~mask].max()


def test_extreme_settings_stay_distributions():
    logits = torch.tensor([[1e4, -1e4, 9e3, 0.0]])
    for arguments in ({"temperature": 1e-6}, {"temperature": 1e6}, {"top_k": 99}, {"top_p": 1e-9}, {"top_p": 1.0}):
        probabilities = next_token_probabilities(logits, **arguments)
        assert probabilities.isfinite().all() and probabilities.sum().item() == pytest.approx(1.0)
    assert next_token_probabilities(logits, temperature=0.0).tolist() == [[1, 0, 0, 0]]


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(draw(probabilities.expand(20_000, 5), generator), minlength=5)
    assert counts[4] == 0
    expected = 20_000 * probabilities[:4]
    assert ((counts[:4] - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001


def test_generation_is_greedy_reproducible_and_long():
    model, prompt = tiny(init_std=0.3), some_tokens(rows=2, length=3)
    greedy = generate_tokens(model, prompt, 12, temperature=0.0)  # far beyond block_size=8
    assert greedy.shape == (2, 15) and torch.equal(greedy[:, :3], prompt)
    for t in range(3, 15):
        wanted = model(greedy[:, max(0, t - 8) : t])[:, -1].argmax(-1)
        assert torch.equal(greedy[:, t], wanted)
    assert torch.equal(greedy, generate_tokens(model, prompt, 12, top_k=1))
    seeded = [generate_tokens(model, prompt, 12, generator=torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    one = list(stream(model, prompt[0].tolist(), 12, generator=torch.Generator().manual_seed(3)))
    again = generate_tokens(model, prompt[:1], 12, generator=torch.Generator().manual_seed(3))
    assert one == again[0, 3:].tolist()


def test_generation_stops_at_stop_tokens():
    model, prompt = tiny(init_std=0.3), some_tokens(rows=2, length=3)
    free = generate_tokens(model, prompt, 20, generator=torch.Generator().manual_seed(0))
    stop = free[0, 6].item()
    out = generate_tokens(model, prompt, 20, generator=torch.Generator().manual_seed(0), stop={stop})
    ends = []
    for row, whole in zip(out.tolist(), free.tolist()):
        end = row.index(stop, 3) if stop in row[3:] else len(row)
        assert row[:end] == whole[:end] and set(row[end:]) <= {stop}
        ends.append(end)
    assert ends[0] <= 6 and out.size(1) == min(23, max(ends) + 1)
    assert list(stream(model, prompt[0].tolist(), 0)) == []


def test_bad_sampling_values_are_refused():
    model, prompt = tiny(), some_tokens()
    for arguments, message in (
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_tokens(model, prompt, 1, **arguments)
    with pytest.raises(ValueError, match="cannot be continued"):
        generate_tokens(model, torch.zeros(1, 0, dtype=torch.long), 1)


# ---- the tokenizer


def test_tokenizer_round_trips_and_names_what_it_does_not_know():
    text = "Grüße, 世界!\n\0 \U0001f600"
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text)) and tokenizer.chars == "".join(sorted(set(text)))
    assert CharTokenizer.from_dict(tokenizer.to_dict()).chars == tokenizer.chars
    with pytest.raises(ValueError, match="the vocabulary has no 'Q' 'q'"):
        tokenizer.encode("qQ")
    with pytest.raises(ValueError, match="token -1 is not in the vocabulary"):
        tokenizer.decode([-1])
    for bad in ({"kind": "bpe"}, {"kind": "char"}, None):
        with pytest.raises(ValueError, match="'char' one is needed"):
            CharTokenizer.from_dict(bad)
    for bad, message in (("", "empty"), ("aba", "'a' occurs twice")):
        with pytest.raises(ValueError, match=message):
            CharTokenizer(bad)


def show_examples():
    """Print what a reader may check by eye."""
    tokenizer = CharTokenizer.from_text("hello world")
    print(f"tokens of 'hello': {tokenizer.encode('hello')}; and back: {tokenizer.decode(tokenizer.encode('hello'))}")
    model = tiny()
    x = some_tokens()
    print(f"a tiny GPT: {model.n_parameters():,} parameters; {tuple(x.shape)} tokens -> {tuple(model(x).shape)} logits")
    print(f"loss before training: {model(x, x.roll(-1, 1)):.3f}; ln {TINY['vocab_size']} = {math.log(17):.3f}")
    print(f"greedy continuation: {generate_tokens(model, x[:1], 5, temperature=0.0)[0].tolist()}")


if __name__ == "__main__":
    show_examples()
    raise SystemExit(pytest.main([__file__, "-q"]))
