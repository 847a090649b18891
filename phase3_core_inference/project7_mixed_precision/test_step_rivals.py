"""Tests of the rivals of a training step: a step that was left out shows, in ours and in torch's."""

import math

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.trainer import NextToken
from phase3_core_inference.project7_mixed_precision.loss_scaling import ScaledStep
from phase3_core_inference.project7_mixed_precision.step_rivals import TorchScaledStep, loss_scale


@pytest.mark.parametrize("kind", [ScaledStep, TorchScaledStep])
@pytest.mark.parametrize("spoilt", [False, True])
def test_the_scale_falls_where_a_step_is_left_out(kind, spoilt):
    if kind is TorchScaledStep and not torch.cuda.is_available():
        pytest.skip("its GradScaler is for GPUs")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transformer(PRESETS["cpu-tiny"](n_layer=1)).to(device)
    step = kind(model, NextToken(), build_optimizer(model, "adamw", 1e-3, 0.0), 1.0, torch.float16)
    if spoilt:
        model.blocks[0].mlp.up_proj.weight.register_hook(lambda grad: grad * math.nan)
    before, tokens = loss_scale(step), torch.randint(0, 256, (1, 8))
    step.backward([(tokens, tokens)], 8)
    step.update(1.0)
    assert (loss_scale(step) < before) == spoilt


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
