"""Tests of loss scaling: step by step against `torch.amp.GradScaler`, planted overflows, resuming, divergence."""

import copy
import math

import pytest
import torch

from common import checkpoint
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.schedules import cosine
from phase1_foundation.project3_pretrain.trainer import DivergedError, NextToken, fit
from phase3_core_inference.project7_mixed_precision.loss_scaling import LossScaler, ScaledStep

RULE = {"scale": 2.0**14, "interval": 3}
PLANTED = {2: math.inf, 3: math.nan, 8: -math.inf}  # step -> what its gradient becomes
STEPS = 12


class Batches:
    """Two micro batches of random tokens as a pure function of the step; remembers the step."""

    def __init__(self):
        self.step = 0

    def __getitem__(self, step):
        self.step = step
        rows = torch.randint(0, 256, (2, 2, 9), generator=torch.Generator().manual_seed(step))
        return [(row[:, :-1], row[:, 1:]) for row in rows]


def model_of():
    torch.manual_seed(0)
    return Transformer(PRESETS["cpu-tiny"](n_layer=1))


def plant(model, batches):
    """From now on the gradient of one weight is spoilt in the planted steps."""

    def spoil(grad):
        if batches.step in PLANTED:
            grad = grad.clone()
            grad[0, 0] = PLANTED[batches.step]
        return grad

    model.blocks[0].mlp.up_proj.weight.register_hook(spoil)


def step_of(model, clip=1.0, **rule):
    optimizer = build_optimizer(model, "adamw", 1e-2, 0.1)
    return ScaledStep(model, NextToken(), optimizer, clip, torch.float16, LossScaler(**(RULE | rule)))


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(step, batches, start=0, stop=STEPS):
    """(scale before, norm, weights) of each step."""
    seen, scale = [], step.scaler.scale

    def remember(state):
        nonlocal scale
        seen.append((scale, state.grad_norm, weights_of(step.model)))
        scale, state.stop = step.scaler.scale, state.iter == stop

    fit(step, batches, cosine(STEPS, 2), [remember], start)
    return seen


def train_by_torch(model, batches):
    """The same with `torch.amp.GradScaler`, written as its documentation says; not clipped."""
    optimizer = build_optimizer(model, "adamw", 1e-2, 0.1)
    (adamw,) = optimizer.optimizers
    scaler = torch.amp.GradScaler("cpu", init_scale=RULE["scale"], growth_interval=RULE["interval"])
    schedule, seen = cosine(STEPS, 2), []
    for i in range(STEPS):
        adamw.zero_grad()
        before = scaler.get_scale()
        for tokens, targets in batches[i]:
            with torch.autocast("cpu", torch.float16):
                loss = model(tokens, targets=targets).sum() / 32
            scaler.scale(loss).backward()
        scaler.unscale_(adamw)
        norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters())
        optimizer.set_lr_scale(schedule[i])
        scaler.step(adamw)
        scaler.update()
        seen.append((before, float(norm), weights_of(model)))
    return seen


def test_every_step_is_that_of_grad_scaler():
    results = []
    for run in (lambda model, batches: train(step_of(model, clip=None), batches), train_by_torch):
        model, batches = model_of(), Batches()
        plant(model, batches)
        results.append(run(model, batches))
    ours, theirs = results
    for i, ((scale, norm, weights), (torch_scale, torch_norm, torch_weights)) in enumerate(zip(ours, theirs)):
        assert scale == torch_scale, f"step {i}"
        assert torch.equal(weights, torch_weights), f"step {i}"  # bit by bit
        assert norm == (math.inf if i in PLANTED else torch_norm)
        assert i == 0 or torch.equal(weights, ours[i - 1][2]) == (i in PLANTED)  # those that were left out
    assert len(ours) == len(theirs) == STEPS
    assert [scale for scale, _, _ in ours] == [2.0**n for n in (14, 14, 14, 13, 12, 12, 12, 13, 13, 12, 12, 12)]


def test_a_scale_that_is_too_large_comes_down_by_itself():
    model, batches = model_of(), Batches()
    step = step_of(model, scale=2.0**30)
    norms = [norm for _, norm, _ in train(step, batches)]
    assert not math.isfinite(norms[0]) and math.isfinite(norms[-1])
    assert step.scaler.skipped == sum(not math.isfinite(norm) for norm in norms) < STEPS


def test_powers_of_two_change_no_gradient():
    """Where nothing underflows: what the optimizer sees with a scale is what it would see without."""
    step, plain = (step_of(model_of(), scale=scale) for scale in (2.0**10, 1.0))
    for one in (step, plain):
        one.dtype = None  # float32: nothing can underflow
        one.backward(Batches()[0], 32)
    scaled = copy.deepcopy(step.gradients())
    assert not step.scaler.unscale(step.gradients())
    for grad, before, expected in zip(step.gradients(), scaled, plain.gradients(), strict=True):
        assert torch.equal(grad, expected) and torch.equal(before, expected * 2**10)


def test_a_run_goes_on_from_a_checkpoint_bit_by_bit(tmp_path):
    model, batches = model_of(), Batches()
    plant(model, batches)
    whole = train(step_of(model), batches)
    first_model, batches = model_of(), Batches()
    plant(first_model, batches)
    first = step_of(first_model)
    train(first, batches, stop=7)
    checkpoint.save(tmp_path / "last.pt", {
        "iter": 7, "model_state_dict": first.weights(), "optimizer_state_dict": first.state_dict(), "train_loss": 0.0,
        "val_loss": 0.0,
    })  # fmt: skip
    saved = checkpoint.load(tmp_path / "last.pt")
    second_model, batches = model_of(), Batches()
    plant(second_model, batches)
    second = step_of(second_model, scale=2.0**3)
    second.load_weights(saved["model_state_dict"])
    second.load_state_dict(saved["optimizer_state_dict"])
    rest = train(second, batches, start=7)
    assert [scale for scale, _, _ in rest] == [scale for scale, _, _ in whole[7:]]
    for (_, norm, weights), (_, expected_norm, expected) in zip(rest, whole[7:], strict=True):
        assert norm == expected_norm and torch.equal(weights, expected)
    assert second.scaler.skipped == len(PLANTED)


def test_a_run_that_scaled_nothing_can_be_continued():
    step = step_of(model_of())
    step.backward(Batches()[0], 32)
    step.update(1.0)
    state = {name: part for name, part in step.state_dict().items() if name != "step"}
    other = step_of(model_of())
    other.load_state_dict(state)
    assert other.scaler.state_dict() == {"scale": RULE["scale"], "good": 0, "skipped": 0}


def test_a_gradient_that_no_scale_can_save_is_a_divergence():
    model, batches = model_of(), Batches()
    model.blocks[0].mlp.up_proj.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(DivergedError, match=r"diverged at step 5.*overflows float16 even at a loss scale of"):
        train(step_of(model, scale=2.0**-11), batches)


def test_a_loss_that_is_no_number_is_a_divergence_at_once():
    model, batches = model_of(), Batches()
    with torch.no_grad():
        model.norm.weight.fill_(1e30)
    with pytest.raises(DivergedError, match="diverged at step 1: the loss became"):
        train(step_of(model), batches)


def test_no_gradients_overflow_nothing():
    assert LossScaler().unscale([]) is False


def test_the_scale_grows_no_further_than_float32():
    scaler = LossScaler(scale=2.0**127, interval=1)
    assert scaler.update(False) == 2.0**127


@pytest.mark.parametrize("rule", [{"scale": 0}, {"scale": math.inf}, {"growth": 1}, {"backoff": 1}, {"interval": 0}])
def test_a_scale_that_cannot_move_is_refused(rule):
    with pytest.raises(ValueError, match=f"{next(iter(rule))}={next(iter(rule.values()))}"):
        LossScaler(**rule)


if __name__ == "__main__":
    example, example_batches = model_of(), Batches()
    plant(example, example_batches)
    for number, (example_scale, example_norm, _) in enumerate(train(step_of(example), example_batches)):
        print(f"step {number:>2}: scale {example_scale:>7.0f}, norm {example_norm:.3f}")
    raise SystemExit(pytest.main([__file__]))
