"""Tests of project 3's training in the precisions of this project, which it finds by name in the catalog."""

import functools
import importlib
import itertools
import random

import pytest
import torch

from common import catalog, checkpoint, settings
from phase1_foundation.project3_pretrain import config, running
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.trainer import NextToken, Step
from phase3_core_inference.project7_mixed_precision.precision import MasterStep, ScaledMasterStep, ScaledStep

train_pretrain = importlib.import_module("phase1_foundation.project3_pretrain.train_pretrain")

TINY = ["--model", "cpu-tiny", "--block_size", "32", "--batch_tokens", "256", "--max_steps", "8", "--warmup_steps", "2",
        "--decay_fraction", "0.6", "--eval_every", "4", "--eval_tokens", "256", "--save_every", "4", "--sample_tokens",
        "4", "--device", "cpu", "--no_compile", "--vocab_size", "300", "--micro_batch", "4"]  # fmt: skip
STEPS = {
    "float32": Step, "bfloat16": Step, "float16": ScaledStep, "master_bfloat16": MasterStep,
    "master_float16": ScaledMasterStep,
}  # fmt: skip


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A small text, its tokens and its tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    syllables = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "her", "dog"]
    words = syllables + [a + b for a in syllables for b in syllables]
    lines = (" ".join(rng.choices(words, k=30)) + "." for _ in range(200))
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return [*TINY, "--train_data_path", f"{folder}/text.txt", "--data_dir", f"{folder}/tokens", "--val_fraction", "0.1",
            "--tokenizer", f"{folder}/tokenizer.pkl"]  # fmt: skip


def losses_of(folder):
    return [entry["train_loss"] for entry in read_metrics(folder / "metrics.jsonl") if "train_loss" in entry]


@pytest.fixture(scope="module")
def plain(flags, tmp_path_factory):
    """The losses of a run in float32."""
    out = tmp_path_factory.mktemp("float32")
    train_pretrain.main([*flags, "--dtype", "float32", "--use", "--out_dir", str(out)])
    return losses_of(out)


@pytest.mark.parametrize(
    ("dtype", "uses"),
    [("float16", []), ("bfloat16", ["fp8"]), ("master_float16", []), ("master_bfloat16", ["fp8:scaling=row"])],
)
def test_a_run_learns_as_in_float32_and_leaves_a_plain_model(flags, plain, tmp_path, dtype, uses):
    train_pretrain.main([*flags, "--dtype", dtype, "--use", *uses, "--out_dir", str(tmp_path)])
    losses = losses_of(tmp_path)
    assert losses == pytest.approx(plain, rel=0.02) and losses[-1] < losses[0] - 0.1
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["recipe"] == [] and ("step" in saved["optimizer_state_dict"]) == ("float16" in dtype.split("_"))
    assert {tensor.dtype for tensor in saved["model_state_dict"].values()} == {torch.float32}
    model, tokenizer = load(tmp_path / "best.pt")
    assert model(torch.tensor([tokenizer.encode("the cat sat")])).dtype == torch.float32


@pytest.mark.parametrize("dtype", STEPS)
def test_the_step_is_found_by_the_name_of_the_precision(dtype):
    s = settings.load(config, ["--dtype", dtype])
    step = running.build_step(s, Transformer(PRESETS["cpu-tiny"]()), NextToken())
    assert type(step) is STEPS[dtype] is catalog.resolve("steps", dtype)
    assert step.dtype == {"float32": None}.get(dtype, getattr(torch, dtype.split("_")[-1]))


def test_a_run_resumes_with_its_scale(flags, tmp_path, capsys):
    train_pretrain.main([*flags, "--dtype", "float16", "--use", "--out_dir", str(tmp_path)])
    scaler = checkpoint.load(tmp_path / "last.pt")["optimizer_state_dict"]["step"]
    assert scaler == {"scale": 2.0**16, "good": 8, "skipped": 0}
    train_pretrain.main([*flags, "--dtype", "float16", "--use", "--out_dir", str(tmp_path), "--max_steps", "9"])
    assert "resuming" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "last.pt")["optimizer_state_dict"]["step"]["good"] == 9


@functools.cache
def steps_of(dtype, before=None):
    """(losses, weights, state) of two steps, after two in another precision."""
    torch.manual_seed(0)
    s = settings.load(config, ["--dtype", dtype, "--learning_rate", "1e-3"])
    step = running.build_step(s, Transformer(PRESETS["cpu-tiny"](n_layer=1)), NextToken())
    if before:
        step.load_weights(steps_of(before)[1])
        step.load_state_dict(steps_of(before)[2])
    tokens, losses = torch.arange(65, 74).unsqueeze(0), []
    for _ in range(2):
        losses.append(float(step.backward([(tokens[:, :-1], tokens[:, 1:])], 8)))
        assert step.update(1.0) < 100
    return losses, step.weights(), step.state_dict()


@pytest.mark.parametrize("after", STEPS)
@pytest.mark.parametrize("before", STEPS)
def test_a_run_goes_on_in_another_precision(before, after):
    losses = [*steps_of(before)[0], *steps_of(after, before)[0]]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="DTYPE=float8 is unknown: use one of float32, bfloat16, float16, master_"):
        settings.load(config, ["--dtype", "float8"])
    with pytest.raises(ValueError, match=r"EMA=0.9 .* DTYPE=master_bfloat16 .*use EMA=0, or DTYPE=bfloat16"):
        settings.load(config, ["--dtype", "master_bfloat16", "--ema", "0.9"])


if __name__ == "__main__":
    for name, kind in STEPS.items():
        print(f"--dtype {name:<16} {kind.__name__}")
    raise SystemExit(pytest.main([__file__]))
