"""Tests of the lesson on underflow and of the conversion of a checkpoint, as a user runs them."""

import os

import pytest
import torch
from torch import nn

from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.running import write_plain
from phase3_core_inference.project7_mixed_precision import show_underflow, to_float8, to_float8_config
from phase3_core_inference.project7_mixed_precision.float8_inference import StoredFloat8Linear
from phase3_core_inference.project7_mixed_precision.underflow import GradientRecorder, histogram, losses_of_formats

TINY = ["--device", "cpu", "--model", "cpu-tiny", "--block_size", "16", "--rows", "4", "--steps", "5"]


def test_the_recorder_keeps_the_gradients_of_outputs_and_goes_away():
    layers = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(5, 4, requires_grad=True)
    with GradientRecorder(layers) as recorder:
        layers(x).square().sum().backward()
    hidden = layers[0](x).detach().requires_grad_()
    y = layers[2](hidden.relu())
    y.retain_grad()
    y.square().sum().backward()
    torch.testing.assert_close(recorder.tensors["2"], y.grad)
    torch.testing.assert_close(recorder.tensors["0"], hidden.grad)
    assert not layers[0]._backward_hooks


def test_the_histogram_counts_powers_of_two():
    exponents, shares = histogram({"a": torch.tensor([1.0, -1.9, 0.0]), "b": torch.tensor([2.0**-30, 2.0**-100])})
    found = {e: share for e, share in zip(exponents, shares) if share}
    assert found == {0: 50.0, -30: 25.0, -60: 25.0}
    assert sum(histogram({"a": torch.zeros(3)})[1]) == 0


def test_shares_are_weighed_by_the_values_there_are():
    tensors = {"small": torch.full((3,), 2.0**-26), "large": torch.tensor([1.0, 0.0])}
    found = losses_of_formats(tensors, 2.0**4)
    assert found["float16"] == (0.75, 0.0, 0.0) and found["bfloat16"] == (0.0, 0.0, 0.0)
    assert found["e4m3"] == (0.75, 0.75, 0.0)


def test_the_lesson_shows_what_a_scale_saves(tmp_path, capsys):
    show_underflow.main([*TINY, "--picture", f"{tmp_path}/a.png"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("float16 ", "e4m3 "))]
    shares = [[float(cell.rstrip("%")) for cell in row[1:]] for row in rows if all("%" in cell for cell in row[1:])]
    (bare, scaled, own), (bare_8, scaled_8, own_8) = shares
    assert bare > 50 and scaled < 10 and own < 1
    assert bare_8 == 100 and scaled_8 > 50 and own_8 < 10
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "huge"], "MODEL=huge is unknown"),
        (["--text", "nowhere.txt"], "TEXT=nowhere.txt is no file"),
        (["--scale", "0"], "SCALE=0.0 must be positive"),
        (["--block_size", "1000000"], "is shorter than two windows"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        show_underflow.main([*TINY, *flags])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_checkpoint_is_converted(tmp_path, capsys):
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"]()).eval()
    write_plain(model, None, tmp_path / "plain.pt")
    flags = ["--checkpoint", f"{tmp_path}/plain.pt", "--stored", f"{tmp_path}/small.pt"]
    to_float8.main([*flags, "--skip", "down_proj"])
    stored, tokenizer = load(tmp_path / "small.pt")
    layers = [module for module in stored.modules() if isinstance(module, StoredFloat8Linear)]
    assert len(layers) == 12 and tokenizer is None and stored.recipe == [["fp8_weights", {"skip": ["down_proj"]}]]
    size, plain = (tmp_path / "small.pt").stat().st_size, 2 * model.n_parameters()
    said = f"a file of {size / 1e6:.2f} MB; the weights would take {plain / 1e6:.2f} MB if all were bfloat16"
    assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        to_float8.main([*flags[:2], "--stored", f"{tmp_path}/plain.pt"])
    assert "would replace CHECKPOINT" in capsys.readouterr().err


def test_without_a_name_the_newest_model_that_was_trained_is_converted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(to_float8_config, "CHECKPOINTS", tmp_path)
    flags = ["--stored", f"{tmp_path}/project7/float8.pt"]
    with pytest.raises(SystemExit):
        to_float8.main(flags)
    assert "there is no model yet" in capsys.readouterr().err
    for age, folder in enumerate(("project4", "project3")):
        write_plain(Transformer(PRESETS["cpu-tiny"](n_layer=1)), None, tmp_path / folder / "best.pt")
        os.utime(tmp_path / folder / "best.pt", (1e9 - age, 1e9 - age))
    for _ in range(2):  # what it wrote is the newest of all by then
        to_float8.main(flags)
        assert f"stored {tmp_path}/project4/best.pt" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        to_float8.main(["--checkpoint", flags[1], "--stored", f"{tmp_path}/again.pt"])
    assert "is stored in float8 already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        to_float8.main(["--stored", f"{tmp_path}/project4/best.pt"])
    assert "would replace CHECKPOINT" in capsys.readouterr().err


if __name__ == "__main__":
    print(losses_of_formats({"gradients": torch.randn(1000) * 2.0**-28}, 2.0**16))
    raise SystemExit(pytest.main([__file__]))
