"""Tests of master weights: what they keep, what is lost without them, what a checkpoint holds."""

import copy

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.trainer import NextToken, Step
from phase3_core_inference.project7_mixed_precision.master_weights import (
    MasterStep,
    ScaledMasterStep,
    lowered_parameters,
)

TOKENS = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(0))
MICROS = [(TOKENS[:2, :-1], TOKENS[:2, 1:]), (TOKENS[2:, :-1], TOKENS[2:, 1:])]
KINDS = {torch.bfloat16: MasterStep, torch.float16: ScaledMasterStep}


def model_of(**changes):
    torch.manual_seed(0)
    return Transformer(PRESETS["cpu-tiny"](**{"qkv_bias": True} | changes))


def step_of(kind, model=None, lr=1e-3, optimizer="muon", **options):
    model = model or model_of()
    return kind(model, NextToken(), build_optimizer(model, optimizer, lr, 0.1), 1.0, **options)


def take(step, steps=1):
    """The losses of some steps on the same batch."""
    losses = []
    for _ in range(steps):
        losses.append(float(step.backward(MICROS, 32)))
        step.update(1.0)
    return losses


@pytest.mark.parametrize("dtype", KINDS)
def test_matrices_have_16_bits_and_norms_32(dtype):
    model = step_of(KINDS[dtype]).model
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert all((kind == torch.float32) == ("norm" in name) for name, kind in kinds.items())
    assert kinds["blocks.0.attention.q_proj.bias"] == kinds["embed.tokens.weight"] == dtype
    logits = model(TOKENS)  # without autocast, as samples are drawn
    assert logits.dtype == dtype and logits.isfinite().all()


@pytest.mark.parametrize("dtype", KINDS)
def test_masters_move_as_the_optimizer_moves_float32_weights(dtype):
    """The same gradients, given to an optimizer of a float32 model."""
    step, plain = step_of(KINDS[dtype]), step_of(Step)
    twins = dict(plain.model.named_parameters())
    for _ in range(3):
        step.backward(MICROS, 32)
        for name, parameter in step.model.named_parameters():
            grad = step.masters[name].grad if name in step.masters else parameter.grad
            scale = step.scaler.scale if dtype == torch.float16 else 1.0
            twins[name].grad = grad / scale
            assert name not in step.masters or parameter.grad is None
        assert step.update(1.0) == pytest.approx(plain.update(1.0), rel=1e-6)
        for name, parameter in step.model.named_parameters():
            torch.testing.assert_close(step.masters.get(name, parameter), twins[name], rtol=1e-6, atol=1e-7)
            assert torch.equal(parameter, step.masters.get(name, parameter).to(parameter.dtype))  # rounded


@pytest.mark.parametrize("dtype", KINDS)
def test_training_goes_as_in_float32(dtype):
    ours, plain = take(step_of(KINDS[dtype], lr=1e-2), 12), take(step_of(Step, lr=1e-2), 12)
    assert ours == pytest.approx(plain, rel=0.02) and plain[-1] < 0.8 * plain[0]


def test_without_masters_small_updates_are_lost():
    """A rate whose updates are below half of the last bit of most bfloat16 weights."""
    start, lr = model_of().bfloat16(), 2e-5
    without = step_of(Step, copy.deepcopy(start), lr, "adamw", dtype=torch.bfloat16)
    with_masters = step_of(MasterStep, copy.deepcopy(start).float(), lr, "adamw")
    take(without, 50)
    take(with_masters, 50)
    name = "blocks.0.mlp.up_proj.weight"
    old, new = dict(start.named_parameters())[name], dict(without.model.named_parameters())[name]
    assert (old == new).double().mean() > 0.5  # most weights have not moved at all
    assert (with_masters.masters[name] == old.float()).double().mean() < 0.01
    moved = (with_masters.masters[name] - old.float()).abs().mean()
    assert (new.float() - old.float()).abs().mean() < 0.6 * moved


def test_gradients_of_many_micro_batches_are_summed_in_float32():
    step = step_of(MasterStep)
    many = [MICROS[0]] * 300  # in bfloat16 a sum stops growing at 256 times its addend
    step.backward(many, 16)
    name = "blocks.0.mlp.up_proj.weight"
    total = step.masters[name].grad.clone()
    step.backward([MICROS[0]], 16)
    torch.testing.assert_close(total, 300 * step.masters[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_checkpoint_holds_the_masters_and_goes_on_bit_by_bit(dtype):
    step = step_of(KINDS[dtype])
    take(step, 3)
    saved = copy.deepcopy((step.weights(), step.state_dict()))
    assert all(tensor.dtype == torch.float32 for tensor in saved[0].values())
    other = step_of(KINDS[dtype], model_of(dropout=0.0))
    other.load_weights(saved[0])
    other.load_state_dict(saved[1])
    assert take(other, 3) == take(step, 3)
    for name, tensor in step.weights().items():
        assert torch.equal(other.weights()[name], tensor)
    plain = model_of()
    plain.load_state_dict(saved[0])  # it is what any other DTYPE would have written


def test_a_block_that_stands_in_the_stack_twice_has_one_master():
    model = model_of()
    model.blocks[1] = model.blocks[0]
    step = step_of(MasterStep, model)
    take(step, 2)
    weights = step.weights()
    assert weights.keys() == model.state_dict().keys()
    names = [name for name in weights if name.startswith("blocks.0.")]
    assert all(torch.equal(weights[name], weights[name.replace("blocks.0", "blocks.1")]) for name in names)


def test_what_an_earlier_step_left_does_not_stay_in_another_type():
    model = model_of()
    take(step_of(Step, model))
    MasterStep(model, NextToken(), build_optimizer(model, "adamw", 1e-3, 0.1))
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())


def test_frozen_weights_stay_as_they_are():
    model = model_of()
    model.embed.requires_grad_(False)
    step = step_of(MasterStep, model)
    take(step)
    assert model.embed.tokens.weight.dtype == torch.float32
    assert "embed.tokens.weight" in lowered_parameters(model) and "embed.tokens.weight" not in step.masters


if __name__ == "__main__":
    for example in (Step, MasterStep):
        print(f"{example.__name__}: " + " ".join(f"{loss:.4f}" for loss in take(step_of(example, lr=1e-2), 5)))
    raise SystemExit(pytest.main([__file__]))
