"""What several projects do together: one command line names techniques of several floors."""

import pytest

from common import catalog
from phase1_foundation.project3_pretrain import train_pretrain
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project7_mixed_precision.float8 import Float8Linear
from phase3_core_inference.project9_flash_attention.flash_attention import flash_attention

TINY = ["--model", "cpu-tiny", "--block_size", "32", "--batch_tokens", "256", "--max_steps", "6", "--warmup_steps", "2",
        "--eval_every", "6", "--eval_tokens", "256", "--sample_tokens", "4", "--device", "cpu", "--no_compile",
        "--vocab_size", "300", "--val_fraction", "0.1"]  # fmt: skip


def test_the_names_reach_the_model():
    model = catalog.apply(Transformer(PRESETS["cpu-tiny"]()), ["flash", "fp8"])
    assert model.kernel is flash_attention and isinstance(model.blocks[0].mlp.up_proj, Float8Linear)
    assert model.recipe == []  # how it is computed is no part of a checkpoint


def test_pretraining_with_flash_and_fp8(tmp_path):
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "her", "dog"]
    lines = (" ".join(a + b for a in words for b in words[i % 7 :]) + "." for i in range(60))
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    data = ["--train_data_path", f"{tmp_path}/text.txt", "--data_dir", f"{tmp_path}/tokens", "--tokenizer",
            f"{tmp_path}/tokenizer.pkl"]  # fmt: skip
    losses = {}
    for name, uses in {"plain": [], "together": ["flash", "fp8"]}.items():
        train_pretrain.main([*TINY, *data, "--use", *uses, "--out_dir", f"{tmp_path}/{name}"])
        losses[name] = [e["train_loss"] for e in read_metrics(tmp_path / name / "metrics.jsonl") if "train_loss" in e]
    assert losses["together"] != losses["plain"]
    assert losses["together"] == pytest.approx(losses["plain"], rel=0.02)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
