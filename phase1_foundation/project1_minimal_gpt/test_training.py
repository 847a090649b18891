"""Tests of project 1: text and batches, optimisation, and the scripts: training, generation, download."""

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch

from common import checkpoint
from common import settings as common_settings
from phase1_foundation.project1_minimal_gpt import benchmark, config, data, download_data, generate, train
from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project1_minimal_gpt.loading import load_model
from phase1_foundation.project1_minimal_gpt.optimization import build_optimizer, learning_rate_at, training_step
from phase1_foundation.project1_minimal_gpt.test_gpt import some_tokens, tiny

FLAGS = ["--device", "cpu", "--dtype", "float32", "--no_compile", "--n_layer", "1", "--n_head", "2", "--n_embd", "16",
         "--block_size", "8", "--batch_size", "4", "--warmup_iters", "2", "--eval_every", "10", "--log_every", "1",
         "--eval_windows", "8", "--max_iters", "20", "--max_new_tokens", "5", "--dropout", "0.1"]  # fmt: skip


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


# ---- text


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


if __name__ == "__main__":
    rates = [round(learning_rate_at(step, 1.0, 0.1, warmup=2, total=8), 3) for step in range(9)]
    print("learning rates, 2 steps of warmup, then half a cosine:", rates)
    inputs, targets = data.batch(torch.arange(100), step=0, seed=1, batch_size=2, block_size=5)
    print(f"a batch of the text 0, 1, 2, ...: {inputs.tolist()} -> {targets.tolist()}")
    raise SystemExit(pytest.main([__file__, "-q"]))
