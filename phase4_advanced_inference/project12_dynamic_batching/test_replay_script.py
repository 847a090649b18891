"""The script: what it shows, with and without a model, and what it refuses."""

import pytest
import torch

from common import checkpoint
from phase1_foundation.project3_pretrain import loading
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer
from phase4_advanced_inference.project12_dynamic_batching import config, replay

SMALL = ["--device", "cpu", "--dtype", "float32", "--n_requests", "5", "--rate", "inf", "--n_rows", "2", "--max_tokens",
         "16", "--new_tokens", "4", "--prompt_tokens", "6", "--no_graphs"]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model.pt"
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320))
    checkpoint.save(path, {
        "iter": 0, "model_state_dict": model.state_dict(), "optimizer_state_dict": {}, "train_loss": 0.0,
        "val_loss": 0.0, "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "tokenizer": byte_tokenizer().to_dict(),
    })  # fmt: skip
    return ["--checkpoint", str(path)]


def test_a_trace_with_both_policies(model, capsys, tmp_path):
    plot = tmp_path / "timeline.png"
    replay.main([*SMALL, *model, "--compare", "--check", "--plot", str(plot)])
    out = capsys.readouterr().out
    assert "continuous batching (a letter" in out and "static batching (a letter" in out and "row 1 │B" in out
    assert "rows in use" in out and "between tokens: 99th percentile" in out and "end to end, a token: median" in out
    assert "continuous: 5 of 5 texts are what they are alone\nstatic: 5 of 5" in out
    assert f"wrote {plot}" in out and plot.read_bytes()[:4] == b"\x89PNG"
    numbers = [line.split()[-4:] for line in out.splitlines() if line.startswith(("first token:", "between tokens:"))]
    assert len({cell for line in numbers for cell in line[::2]}) > 4  # each cell says something else


def test_one_policy_without_pictures(model, capsys):
    replay.main([*SMALL, *model, "--policy", "static", "--width", "0", "--temperature", "1"])
    out = capsys.readouterr().out
    assert "static" in out and "continuous" not in out and "row 0" not in out and "are alone" not in out


def test_prompts_of_ones_own(model, capsys):
    replay.main([*SMALL, *model, "--prompt", "Hello", "a", "b", "--max_new_tokens", "5", "--compare", "--check"])
    out = capsys.readouterr().out
    assert "--- 1 (length)\nHello" in out and out.count("--- 3") == 1 and "row 0 │A" in out
    assert "continuous: 3 of 3 texts are what they are alone\nstatic: 3 of 3" in out


def test_without_any_model(monkeypatch, tmp_path, capsys):
    for name in ("MODELS", "CHECKPOINTS"):
        monkeypatch.setattr(loading, name, tmp_path)
    replay.main([*SMALL, "--check"])
    out = capsys.readouterr().out
    assert "there is no model yet: a small one with random weights writes" in out and "5 of 5 texts" in out
    with pytest.raises(SystemExit):
        replay.main([*SMALL, "--checkpoint", str(tmp_path / "ghost.pt")])
    assert "ghost.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--n_rows", "0"], "N_ROWS=0 must be at least 1"), (["--max_tokens", "1"], "MAX_TOKENS=1 must be at least"),
        (["--rate", "0"], "RATE=0.0 must be positive"), (["--policy", "luck"], "POLICY=luck is unknown"),
        (["--cache", "ghost"], "CACHE=ghost is unknown"), (["--seed", "-1"], "SEED=-1 must be at least 0"),
        (["--check", "--dtype", "bfloat16"], "DTYPE=bfloat16 rounds"), (["--text", "nowhere"], "TEXT=nowhere"),
        (["--prompt", "x" * 99], "leaves no room to go on"), (["--spread", "-1"], "SPREAD=-1.0 must be at least 0"),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong(model, more, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        replay.main([*SMALL, *model, *more])
    assert exit_.value.code == 2 and said in capsys.readouterr().err


if __name__ == "__main__":
    config.print_config()
    raise SystemExit(pytest.main([__file__]))
