"""Tests of project 1: the model against transformers, sampling against its definitions, training and its scripts."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common import checkpoint
from common import settings as common_settings
from phase1_foundation.project1_minimal_gpt import benchmark, config, data, download_data, generate, train
from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project1_minimal_gpt.loading import load_model
from phase1_foundation.project1_minimal_gpt.model import GPT, GPTConfig, explicit_attention, fast_attention
from phase1_foundation.project1_minimal_gpt.optimization import build_optimizer, learning_rate_at, training_step
from phase1_foundation.project1_minimal_gpt.sampling import draw, next_token_probabilities, stream
from phase1_foundation.project1_minimal_gpt.sampling import generate as generate_tokens

TINY = {"vocab_size": 17, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
FLAGS = ["--device", "cpu", "--dtype", "float32", "--no_compile", "--n_layer", "1", "--n_head", "2", "--n_embd", "16",
         "--block_size", "8", "--batch_size", "4", "--warmup_iters", "2", "--eval_every", "10", "--log_every", "1",
         "--eval_windows", "8", "--max_iters", "20", "--max_new_tokens", "5", "--dropout", "0.1"]  # fmt: skip


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**TINY, **changes})).eval()


def some_tokens(rows=3, length=8, seed=1):
    return torch.randint(TINY["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    """Train for 20 steps and give the output folder."""
    out = tmp_path_factory.mktemp("trained")
    train.main([*FLAGS, "--out_dir", str(out)])
    return out


@pytest.fixture
def trained(trained_once, tmp_path):
    """A copy of that folder for one test to work in."""
    return Path(shutil.copytree(trained_once, tmp_path / "trained"))


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


# ---- text


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


def test_the_split_is_nanogpts():
    text = data.read_text(config.TRAIN_DATA_PATH)
    tokenizer = CharTokenizer.from_text(text)
    first, second = data.split(text, tokenizer, 0.1, 64)
    assert (tokenizer.vocab_size, len(first), len(second)) == (65, 1_003_854, 111_540)
    assert tokenizer.decode(first.tolist()) + tokenizer.decode(second.tolist()) == text
    with pytest.raises(ValueError, match="validation part has only 5 characters"):
        data.split("x" * 50, CharTokenizer("x"), 0.1, 8)


def test_batches_are_a_function_of_seed_and_step():
    tokens = torch.arange(1000)
    x, y = data.batch(tokens, step=3, seed=1, batch_size=16, block_size=8)
    assert x.shape == y.shape == (16, 8) and torch.equal(y, x + 1)
    torch.manual_seed(99)  # the global generator plays no part
    assert torch.equal(x, data.batch(tokens, 3, 1, 16, 8)[0])
    assert not torch.equal(x, data.batch(tokens, 4, 1, 16, 8)[0])
    assert not torch.equal(x, data.batch(tokens, 3, 2, 16, 8)[0])
    shortest = data.batch(torch.arange(9), 0, 0, 4, 8)  # exactly one place to start at
    assert torch.equal(shortest[1][0], torch.arange(1, 9))


def test_windows_cover_the_text_once():
    tokens = torch.arange(100)
    x = torch.cat([inputs for inputs, _ in data.windows(tokens, 8, 5)])
    y = torch.cat([targets for _, targets in data.windows(tokens, 8, 5)])
    assert torch.equal(x.flatten(), torch.arange(96)) and torch.equal(y, x + 1)
    few = torch.cat([inputs for inputs, _ in data.windows(tokens, 8, 5, limit=4)])
    assert few[:, 0].tolist() == [0, 24, 48, 72]


def test_evaluation_is_the_mean_over_all_characters():
    model, tokens = tiny(), some_tokens(rows=1, length=701)[0]
    s = common_settings.load(config, FLAGS)
    rows = torch.stack([tokens[i : i + 9] for i in range(0, 696, 8)])
    wanted = model(rows[:, :-1], rows[:, 1:])
    assert train.evaluate(model, tokens, s, torch.device("cpu")) == pytest.approx(wanted.item(), rel=1e-6)


# ---- optimisation


def test_only_matrices_decay():
    model = tiny()
    decayed, free = build_optimizer(model, 1e-3, 0.1, (0.9, 0.99)).param_groups
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_learning_rate_warms_up_and_falls_in_half_a_cosine():
    rates = [learning_rate_at(step, 2.0, 0.2, warmup=10, total=110) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.1) and rates[110] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[:10] == sorted(rates[:10])


def test_gradients_are_clipped_together():
    moved = []
    for clip in (0.0, 1e-3):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        training_step(model, optimizer, some_tokens(), some_tokens(seed=3), clip, torch.autocast("cpu", enabled=False))
        moved.append((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item())
    assert moved[0] > 0.01 and moved[1] == pytest.approx(1e-3, rel=1e-2)


# ---- the scripts


def test_training_leaves_a_checkpoint_of_the_agreed_format(trained, capsys):
    saved = checkpoint.load(trained / "best.pt")
    assert saved["config"]["kind"] == "minimal_gpt" and saved["tokenizer"]["kind"] == "char"
    assert {"iter", "model_state_dict", "optimizer_state_dict", "train_loss", "val_loss"} <= saved.keys()
    assert {"data_position", "rng_state", "recipe"} <= saved.keys()
    model, tokenizer, _ = load_model(trained / "best.pt")
    assert model.config.vocab_size == tokenizer.vocab_size == 65 and not model.training
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [10, 20]
    assert [line["step"] for line in lines if "train_loss" in line] == list(range(1, 21))
    assert "final_val_loss" in lines[-1]


def test_a_resumed_run_is_bit_exact(trained, tmp_path, monkeypatch):
    """Ctrl-C in step 7 of a run with dropout, resumed: the same weights and losses as without."""
    real, out = train.batch, tmp_path / "interrupted"

    def interrupt(tokens, step, *rest):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return real(tokens, step, *rest)

    monkeypatch.setattr(train, "batch", interrupt)
    with pytest.raises(SystemExit) as stopped:
        train.main([*FLAGS, "--out_dir", str(out)])
    assert stopped.value.code == 130
    assert checkpoint.load(out / "last.pt")["iter"] == checkpoint.load(out / "best.pt")["iter"] == 7
    monkeypatch.setattr(train, "batch", real)
    train.main([*FLAGS, "--out_dir", str(out), "--resume"])
    whole, parts = checkpoint.load(trained / "last.pt"), checkpoint.load(out / "last.pt")
    assert all(torch.equal(parts["model_state_dict"][n], w) for n, w in whole["model_state_dict"].items())
    assert parts["val_loss"] == whole["val_loss"] and parts["best_val_loss"] == whole["best_val_loss"]
    a, b = ([line for line in train.read_metrics(p / "metrics.jsonl") if "train_loss" in line] for p in (trained, out))
    assert a == b


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoints(trained, capsys, monkeypatch):
    kept = {name: (trained / name).read_bytes() for name in ("best.pt", "last.pt")}
    monkeypatch.setattr(train, "training_step", lambda *_: torch.tensor(math.nan))
    with pytest.raises(SystemExit) as stopped:
        train.main([*FLAGS, "--out_dir", str(trained)])
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and "the training loss became nan at step 1" in message
    assert "best.pt is kept" in message and "LEARNING_RATE" in message
    assert kept == {name: (trained / name).read_bytes() for name in kept}


def test_generate_writes_prompt_and_continuation(trained, capsys):
    flags = ["--checkpoint", str(trained / "best.pt"), "--device", "cpu", "--max_new_tokens", "30"]
    texts = []
    for seed in ("1", "1", "2"):
        generate.main([*flags, "--prompt", "ROMEO:", "--top_k", "20", "--top_p", "0.95", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("ROMEO:") and len(texts[0]) == len("ROMEO:") + 30 + 1


def test_generate_converses_and_survives_unknown_characters(trained, capsys, monkeypatch):
    lines = iter(["To be", "Ünd", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    generate.main(
        ["--checkpoint", str(trained / "best.pt"), "--device", "cpu", "--interactive", "--max_new_tokens", "5"]
    )
    out = capsys.readouterr().out
    assert "To be" in out and "the vocabulary has no 'Ü'" in out


def test_ctrl_c_at_the_prompt_leaves_at_once(trained, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt: signal.raise_signal(signal.SIGINT) or "went on")
    generate.main(["--checkpoint", str(trained / "best.pt"), "--device", "cpu", "--interactive"])  # returns: status 0
    assert capsys.readouterr().out.endswith("an empty line ends.\n\n")


def test_user_errors_are_one_line(trained, tmp_path, capsys):
    best, last = str(trained / "best.pt"), trained / "last.pt"
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    (tmp_path / "other.txt").write_text(data.read_text(config.TRAIN_DATA_PATH)[:-1], encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    out = ["--out_dir", str(trained)]
    for main, flags, message in (
        (generate.main, ["--checkpoint", best, "--prompt", "café"], "the vocabulary has no 'é'"),
        (generate.main, ["--checkpoint", best, "--prompt", ""], "the prompt is empty"),
        (generate.main, ["--checkpoint", str(tmp_path / "none.pt")], "project1_minimal_gpt/train.py"),
        (generate.main, ["--checkpoint", config.__file__], "damaged or no checkpoint"),
        (generate.main, ["--checkpoint", best, "--temperature", "-1"], "TEMPERATURE=-1.0"),
        (train.main, [*FLAGS, *out, "--n_embd", "15"], "N_EMBD=15 must be divisible by N_HEAD=2: use 14 or 16"),
        (train.main, [*FLAGS, *out, "--train_data_path", str(tmp_path / "nothing.txt")], "download_data.py"),
        (train.main, [*FLAGS, *out, "--train_data_path", str(tmp_path / "short.txt")], "training part has only 4"),
        (train.main, [*FLAGS, *out, "--train_data_path", str(tmp_path / "binary.txt")], "not UTF-8"),
        (train.main, [*FLAGS, *out, "--resume", "--n_embd", "32"], "n_embd=16 there, 32 here"),
        (train.main, [*FLAGS, *out, "--resume", "--train_data_path", str(tmp_path / "other.txt")], "another text"),
        (train.main, [*FLAGS, "--out_dir", str(tmp_path / "empty"), "--resume"], "nothing to resume"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(flags if main is train.main else [*flags, "--device", "cpu"])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1, (flags, error)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(SystemExit):
        train.main([*FLAGS, *out, "--resume"])
    assert "damaged" in capsys.readouterr().err


def test_settings_are_validated():
    config.validate_config()
    for flags, message in (
        (["--warmup_iters", "50", "--max_iters", "50"], "WARMUP_ITERS=50 must be below MAX_ITERS=50"),
        (["--min_learning_rate", "1"], "MIN_LEARNING_RATE=1.0 must not exceed"),
        (["--val_fraction", "1"], "VAL_FRACTION=1.0"),
        (["--dropout", "1"], "DROPOUT=1.0"),
        (["--batch_size", "0"], "BATCH_SIZE=0 must be positive"),
        (["--gelu", "relu"], "GELU=relu is unknown"),
        (["--top_k", "0"], "TOP_K=0 must be at least 1"),
        (["--top_p", "1.1"], "TOP_P=1.1 must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            common_settings.load(config, flags)


def test_every_script_explains_its_flags(capsys):
    for main, flag in (
        (train.main, "--n_embd"),
        (generate.main, "--top_p"),
        (download_data.main, "--source"),
        (benchmark.main, "--repeats"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["--help"])
        assert stopped.value.code == 0 and flag in capsys.readouterr().out


def test_the_bundled_text_is_checked(tmp_path, capsys, monkeypatch):
    download_data.main([])
    assert "checksum right" in capsys.readouterr().out
    monkeypatch.setattr(download_data, "DATA", tmp_path)
    for content in (None, "not Shakespeare"):
        if content:
            (tmp_path / "shakespeare.txt").write_text(content)
        with pytest.raises(SystemExit) as stopped:
            download_data.main([])
        assert stopped.value.code == 2 and "git checkout" in capsys.readouterr().err


def test_other_texts_come_from_the_hub_with_the_bundled_sample_as_fallback(monkeypatch):
    calls = []
    monkeypatch.setattr(download_data, "download_text", lambda path, **options: calls.append((path, options)))
    download_data.main(["--source", "wikitext", "--size", "medium", "--no_fallback"])
    download_data.main(["--source", "wikipedia"])
    (path, options), (_, other) = calls
    assert path.name == "wikitext_characters.txt" and options["max_bytes"] == 10_000_000 and options["no_fallback"]
    assert options["fallback"].is_file() and not other["no_fallback"] and "wikipedia" in other["dataset"]


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
