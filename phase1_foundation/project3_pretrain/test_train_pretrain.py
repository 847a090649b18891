"""Tests of the training script as a user runs it: kills, several processes, and everything that can be wrong."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch

from common import checkpoint, settings
from phase1_foundation.project3_pretrain import config, running, train_pretrain
from phase1_foundation.project3_pretrain.benchmark import NANOGPT_RECIPE, run_training
from phase1_foundation.project3_pretrain.data import TokenDataset
from phase1_foundation.project3_pretrain.evaluation import validation_loss
from phase1_foundation.project3_pretrain.hooks import StopOnRequest, read_metrics
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer

TINY = ["--model", "cpu-tiny", "--block_size", "32", "--batch_tokens", "256", "--max_steps", "12",
        "--warmup_steps", "2", "--decay_fraction", "0.6", "--eval_every", "6", "--eval_tokens", "512",
        "--save_every", "1", "--sample_tokens", "8", "--device", "cpu", "--dtype", "float32", "--no_compile", "--use",
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


def test_a_learning_rate_that_ruins_the_weights_can_be_taken_back(data, capsys, tmp_path):
    out = ["--out_dir", str(tmp_path)]
    _main(*data, *out, "--max_steps", "4")
    message = _fails(capsys, *data, *out, "--learning_rate", "1e30", "--embed_learning_rate", "1e30")
    previous = tmp_path / "previous.pt"
    assert "diverged at step 6" in message and f"delete it, and the next run continues from {previous}" in message
    assert checkpoint.load(previous)["iter"] == 4
    (tmp_path / "last.pt").unlink()
    _main(*data, *out)  # with the old learning rate: the new flags count, not the file's
    printed = capsys.readouterr().out
    assert f"resuming {previous} after step 4" in printed
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 12


def test_a_run_that_was_killed_between_two_renames_goes_on(whole, data, capsys, tmp_path):
    shutil.copy(whole[1] / "last.pt", tmp_path / "previous.pt")
    _main(*data, "--out_dir", str(tmp_path), "--max_steps", "13", "--warmup_steps", "2")
    printed = capsys.readouterr().out
    assert f"resuming {tmp_path / 'previous.pt'} after step 12" in printed
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 13


def _stop_at(monkeypatch, step):
    """Press Ctrl-C in a step."""
    ask = StopOnRequest.__call__

    def press(self, state):
        self.run.stopping = self.run.stopping or state.iter == step
        ask(self, state)

    monkeypatch.setattr(StopOnRequest, "__call__", press)


def test_a_stopped_run_says_how_to_continue_and_claims_no_files(data, capsys, tmp_path, monkeypatch):
    _stop_at(monkeypatch, 3)
    with pytest.raises(SystemExit) as stopped:
        _main(*data, "--out_dir", str(tmp_path), "--no_resume")
    printed = capsys.readouterr().out
    assert stopped.value.code == 130
    assert f"stopped after step 3 of 12, saved in {tmp_path / 'last.pt'}" in printed and "but --resume" in printed
    assert "wrote" not in printed and not (tmp_path / "best.pt").exists()


def test_the_average_of_a_stopped_run_continues_and_is_what_best_holds(data, tmp_path, monkeypatch):
    flags = [*data, "--ema", "0.8"]
    _main(*flags, "--out_dir", str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        _stop_at(patch, 5)
        with pytest.raises(SystemExit):
            _main(*flags, "--out_dir", str(tmp_path / "parts"))
    _main(*flags, "--out_dir", str(tmp_path / "parts"))
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole["ema"][name], parts["ema"][name]) for name in whole["ema"])
    assert whole["val_loss"] == parts["val_loss"]
    best = checkpoint.load(tmp_path / "parts" / "best.pt")
    assert best["iter"] == 12
    val = TokenDataset(Path(data[3]) / "val.bin", 32)
    assert best["val_loss"] == validation_loss(load(tmp_path / "parts" / "best.pt")[0], val, max_tokens=512)
    assert all(torch.equal(best["model_state_dict"][name], tensor) for name, tensor in parts["ema"].items())


@pytest.mark.parametrize("flags", [["--no_resume"], []])
def test_a_new_run_leaves_nothing_of_an_old_one_to_be_resumed(whole, data, capsys, tmp_path, monkeypatch, flags):
    names = ["best.pt", "metrics.jsonl", *(["last.pt"] if flags else [])]  # without last.pt there is nothing to resume
    for name in names:
        shutil.copy(whole[1] / name, tmp_path / name)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "fit", killed)
        with pytest.raises(SystemExit):
            _main(*data, "--out_dir", str(tmp_path), *flags)
    assert "of an earlier run to *.old" in capsys.readouterr().out
    for name in names:
        assert (tmp_path / f"{name}.old").read_bytes() == (whole[1] / name).read_bytes()
        assert name == "metrics.jsonl" or not (tmp_path / name).exists()
    _main(*data, "--out_dir", str(tmp_path), "--max_steps", "4")
    assert "resuming" not in capsys.readouterr().out
    assert [e["step"] for e in read_metrics(tmp_path / "metrics.jsonl") if "train_loss" in e] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda saved: saved.pop("config"), "lacks 'config'"),
        (lambda saved: saved.pop("data_position"), "lacks 'data_position'"),
        (lambda saved: saved.update(config=None), "cannot be continued"),
        (lambda saved: saved.update(optimizer_state_dict={"Muon": None, "AdamW": None}), "cannot be continued"),
        (lambda saved: saved.update(optimizer_state_dict={"AdamW": {}}), "the optimizers ['AdamW']"),
        (lambda saved: saved["model_state_dict"].popitem(), "cannot be continued"),
        (lambda saved: saved.update(ema={}), "EMA"),
    ],
)
def test_a_foreign_or_incomplete_checkpoint_is_named(whole, data, capsys, tmp_path, change, words):
    saved = checkpoint.load(whole[1] / "last.pt")
    change(saved)
    checkpoint.save(tmp_path / "last.pt", saved)
    message = _fails(capsys, *data, "--out_dir", str(tmp_path))
    assert message.startswith(f"error: {tmp_path / 'last.pt'}") and words in message and "--no_resume" in message


def test_changes_of_a_resumed_run_are_noted(whole, data, capsys, tmp_path):
    shutil.copy(whole[1] / "last.pt", tmp_path / "last.pt")
    other = tmp_path / "text.txt"
    other.write_text(Path(data[1]).read_text(encoding="utf-8")[5:], encoding="utf-8")
    flags = [*data, "--train_data_path", str(other), "--data_dir", str(tmp_path / "tokens"), "--max_steps", "13"]
    _main(
        *flags,
        "--out_dir",
        str(tmp_path),
        "--seed",
        "3",
        "--batch_tokens",
        "512",
        "--dropout",
        "0",
        "--eval_every",
        "5",
    )
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == ["BATCH_TOKENS", "DROPOUT", "MAX_STEPS", "SEED", "the"]
    assert "BATCH_TOKENS was 256 and is now 512: the run is no longer the same" in notes[0]
    assert "the data were" in notes[-1]


def test_an_unchanged_run_is_resumed_without_notes(whole, data, capsys):
    _main(*data, "--out_dir", str(whole[1]), "--sample_every", "3")
    assert "note: " not in capsys.readouterr().out


def test_micro_batches_are_the_largest_that_divide():
    model, cpu = Transformer(PRESETS["cpu-tiny"]()), torch.device("cpu")
    sizes = [running.choose_micro_batch(model, sequences, cpu, 64) for sequences in (1, 48, 64, 96, 480, 67)]
    assert sizes == [1, 48, 64, 48, 60, 1]


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


def _altered(whole, path, **fields):
    """Save the best model with changes; returns its path."""
    saved = checkpoint.load(whole[1] / "best.pt")
    checkpoint.save(path, saved | fields)
    return str(path)


def test_a_checkpoint_trains_in_float32_with_this_runs_dropout(whole, data, capsys, tmp_path):
    weights = checkpoint.load(whole[1] / "best.pt")["model_state_dict"]
    narrow = _altered(whole, tmp_path / "narrow.pt", model_state_dict={k: v.bfloat16() for k, v in weights.items()})
    _main(*data, "--out_dir", str(tmp_path), "--checkpoint", narrow, "--max_steps", "3", "--dropout", "0.3")
    saved = checkpoint.load(tmp_path / "last.pt")
    assert {tensor.dtype for tensor in saved["model_state_dict"].values()} == {torch.float32}
    assert saved["config"]["model"]["dropout"] == 0.3
    printed = capsys.readouterr().out
    assert f"{narrow}: 0.0" in printed and "MODEL=cpu-tiny is ignored, DROPOUT=0.3 applies" in printed


def test_a_checkpoint_of_other_tokens_is_refused(whole, data, capsys, tmp_path):
    _main(*data, "--out_dir", str(tmp_path), "--tokenizer", f"{tmp_path}/t.pkl", "--data_dir", f"{tmp_path}/tokens",
          "--vocab_size", "290", "--max_steps", "3")  # fmt: skip
    out = ["--out_dir", str(tmp_path / "out")]
    assert "has another tokenizer" in _fails(capsys, *data, *out, "--checkpoint", f"{tmp_path}/best.pt")
    small = Transformer(PRESETS["cpu-tiny"](block_size=32))
    shape = {"kind": "transformer", "model": small.config.to_dict()}
    bare = _altered(whole, tmp_path / "bare.pt", tokenizer=None, config=shape, model_state_dict=small.state_dict())
    message = _fails(capsys, *data, *out, "--checkpoint", bare)
    assert "vocab_size=256" in message and "are 300" in message
    message = _fails(capsys, *data, *out, "--checkpoint", f"{whole[1]}/best.pt", "--block_size", "64")
    assert "BLOCK_SIZE=64" in message and "--block_size 32" in message


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
        (["--clip", "-1"], ["CLIP=-1.0", "at least 0"]),
        (["--clip", "nan"], ["CLIP=nan"]),
        (["--learning_rate", "nan"], ["LEARNING_RATE=nan", "above 0"]),
        (["--momentum", "1"], ["MOMENTUM=1.0", "below 1"]),
        (["--weight_decay", "-0.1"], ["WEIGHT_DECAY=-0.1"]),
        (["--sample_every", "-1"], ["SAMPLE_EVERY=-1"]),
        (["--sample_tokens", "-1"], ["SAMPLE_TOKENS=-1"]),
        (["--num_workers", "0"], ["NUM_WORKERS=0", "at least 1"]),
        (["--decay_fraction", "0"], ["DECAY_FRACTION=0.0", "above 0"]),
        (["--max_steps", "0"], ["MAX_STEPS=0 must be at least 1"]),
        (["--warmup_steps", "6"], ["WARMUP_STEPS=6", "DECAY_FRACTION=", "leaves 5 steps"]),
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


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    s = settings.load(config, [*TINY, "--batch_tokens", "288"])  # 9 sequences
    s.BATCH_TOKENS = 256
    with pytest.raises(ValueError, match=r"BATCH_TOKENS=256.*shared by 3 processes: use BATCH_TOKENS=288"):
        config.validate_config(s)


def test_the_defaults_are_valid():
    config.validate_config()


if __name__ == "__main__":
    config.print_config()
    raise SystemExit(pytest.main([__file__]))
