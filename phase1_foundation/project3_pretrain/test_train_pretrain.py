"""Tests of the training script as a user runs it: kills, several processes, and everything that can be wrong."""

import json
import os
import random

import pytest
import torch

from common import checkpoint
from phase1_foundation.project3_pretrain import config, train_pretrain
from phase1_foundation.project3_pretrain.benchmark import NANOGPT_RECIPE, run_training
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.loading import load

TINY = ["--model", "cpu-tiny", "--block_size", "32", "--batch_tokens", "256", "--max_steps", "12",
        "--warmup_steps", "2", "--eval_every", "6", "--eval_tokens", "512", "--save_every", "1",
        "--sample_tokens", "8", "--device", "cpu", "--dtype", "float32", "--no_compile", "--use",
        "--vocab_size", "300", "--dropout", "0.1"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags that name a small text, its tokens and its tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    syllables = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "her", "dog"]
    words = syllables + [a + b for a in syllables for b in syllables]
    lines = (" ".join(rng.choices(words, k=30)) + "." for _ in range(200))
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return ["--train_data_path", f"{folder}/text.txt", "--data_dir", f"{folder}/tokens", "--val_fraction", "0.1",
            "--tokenizer", f"{folder}/tokenizer.pkl"]  # fmt: skip


def test_a_text_too_poor_for_the_vocabulary_is_refused(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("one two three\n" * 50, encoding="utf-8")
    flags = [
        "--train_data_path",
        f"{tmp_path}/text.txt",
        "--tokenizer",
        f"{tmp_path}/t.pkl",
        "--data_dir",
        str(tmp_path),
    ]
    assert "VOCAB_SIZE=300, but the text has only enough" in _fails(capsys, *flags, "--out_dir", str(tmp_path))


@pytest.fixture(scope="module")
def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def whole(data, environment, tmp_path_factory):
    """The losses of a run that nothing disturbed, and its folder."""
    out = tmp_path_factory.mktemp("whole")
    return run_training([*TINY, *data, "--out_dir", str(out)], environment=environment), out


def test_a_run_leaves_a_model_that_loads(whole):
    losses, out = whole
    assert len(losses) == 12 and losses[-1] < losses[0]
    model, tokenizer = load(out / "best.pt")
    tokens = torch.tensor([tokenizer.encode("the cat sat")])
    assert model(tokens).shape == (1, tokens.shape[1], model.config.vocab_size)
    assert tokenizer.decode(tokens[0].tolist()) == "the cat sat"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    saved = checkpoint.load(out / "last.pt")
    assert saved["iter"] == 12 and saved["config"]["kind"] == "transformer" and saved["recipe"] == []


@pytest.mark.parametrize("kill_at", [random.Random(i).randint(1, 10) for i in range(2)])
def test_kill_9_and_resume_give_the_losses_of_an_undisturbed_run(whole, data, environment, tmp_path, kill_at):
    assert run_training([*TINY, *data, "--out_dir", str(tmp_path)], kill_at, environment=environment) == whole[0]


def test_two_processes_give_the_losses_of_one(whole, data, environment, tmp_path):
    still = [*TINY, *data, "--dropout", "0"]
    one = run_training([*still, "--out_dir", str(tmp_path / "one")], environment=environment)
    two = run_training([*still, "--out_dir", str(tmp_path / "two")], processes=2, environment=environment)
    assert two == pytest.approx(one, rel=1e-4)
    assert len(two) == 12


def _main(*flags):
    train_pretrain.main([*TINY, *flags])


def _fails(capsys, *flags):
    """Run with flags that cannot work; returns the one line that says so."""
    with pytest.raises(SystemExit) as stopped:
        _main(*flags)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_finished_run_says_so_and_changes_nothing(whole, data, capsys):
    _, out = whole
    before = (out / "last.pt").read_bytes()
    _main(*data, "--out_dir", str(out))
    assert "--max_steps" in capsys.readouterr().out
    assert (out / "last.pt").read_bytes() == before


def test_another_shape_or_another_tokenizer_is_refused(whole, data, capsys, tmp_path):
    _, out = whole
    assert "another shape" in _fails(capsys, *data, "--out_dir", str(out), "--block_size", "16")
    other = [*data, "--out_dir", str(out), "--tokenizer", str(tmp_path / "other.pkl"), "--vocab_size", "310"]
    assert "tokenizer" in _fails(capsys, *other, "--data_dir", str(tmp_path / "tokens"))


def test_a_damaged_checkpoint_is_named(whole, data, capsys, tmp_path):
    (tmp_path / "last.pt").write_bytes((whole[1] / "last.pt").read_bytes()[:-1000])
    assert "last.pt is damaged" in _fails(capsys, *data, "--out_dir", str(tmp_path))


def test_a_diverging_run_stops_and_keeps_the_good_checkpoint(data, capsys, tmp_path):
    _main(*data, "--out_dir", str(tmp_path), "--max_steps", "4")
    good = (tmp_path / "last.pt").read_bytes()
    saved = checkpoint.load(tmp_path / "last.pt")
    saved["model_state_dict"]["norm.weight"][0] = float("nan")  # what a broken update would leave
    checkpoint.save(tmp_path / "poisoned" / "last.pt", saved)
    message = _fails(capsys, *data, "--out_dir", str(tmp_path / "poisoned"))
    assert "diverged at step 5" in message and "lower learning rate" in message
    assert (tmp_path / "last.pt").read_bytes() == good
    assert checkpoint.load(tmp_path / "poisoned" / "last.pt")["iter"] == 4


def test_a_full_disk_is_an_error_message_and_keeps_the_old_checkpoint(whole, data, capsys, tmp_path, monkeypatch):
    _main(*data, "--out_dir", str(tmp_path), "--max_steps", "4")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "No space left" in _fails(capsys, *data, "--out_dir", str(tmp_path))
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 4


def test_training_can_start_from_another_checkpoint(whole, data, tmp_path):
    _main(*data, "--out_dir", str(tmp_path), "--checkpoint", str(whole[1] / "best.pt"), "--max_steps", "3")
    first = read_metrics(tmp_path / "metrics.jsonl")[0]["train_loss"]
    assert first < whole[0][0] - 0.2  # it did not begin anew


def test_options_reach_the_run(data, tmp_path):
    _main(*data, "--out_dir", str(tmp_path), *NANOGPT_RECIPE[2:], "--use", "checkpointing", "--ema", "0.9",
          "--max_steps", "3", "--sample_every", "2")  # fmt: skip
    saved = checkpoint.load(tmp_path / "last.pt")
    assert set(saved["optimizer_state_dict"]) == {"AdamW"} and "ema" in saved
    assert saved["config"]["settings"]["USE"] == ["checkpointing"]
    assert json.dumps(saved["config"])  # plain values only


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch_tokens", "100"], ["BATCH_TOKENS=100", "BLOCK_SIZE=32", "BATCH_TOKENS=96"]),
        (["--warmup_steps", "99"], ["WARMUP_STEPS=99", "MAX_STEPS=12"]),
        (["--model", "gpt5"], ["MODEL=gpt5", "llama-125m"]),
        (["--optimizer", "lion"], ["OPTIMIZER=lion", "muon, adamw"]),
        (["--vocab_size", "100"], ["VOCAB_SIZE=100", "257"]),
        (["--dropout", "1"], ["DROPOUT=1.0"]),
        (["--use", "warp"], ["warp", "known are"]),
        (["--tokenizer", "nowhere.json"], ["nowhere.json"]),
        (["--train_data_path", "nowhere.txt"], ["nowhere.txt"]),
        (["--checkpoint", "nowhere.pt"], ["nowhere.pt"]),
    ],
)
def test_bad_flags_are_explained(flags, words, data, capsys, tmp_path):
    message = _fails(capsys, *data, "--out_dir", str(tmp_path), *flags)
    assert message.startswith("error: ") and message.count("\n") == 1
    for word in words:
        assert word in message


def test_the_defaults_are_valid():
    config.validate_config()


if __name__ == "__main__":
    config.print_config()
    raise SystemExit(pytest.main([__file__]))
