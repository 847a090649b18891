"""Tests of the optimizers and schedules: against torch, against the formulas, and against what resuming needs."""

import copy
import math

import pytest
import torch

from phase1_foundation.project3_pretrain.optimizers import AdamW, Muon, OptimizerSet, build_optimizer, orthogonalize
from phase1_foundation.project3_pretrain.schedules import SCHEDULES, Schedule, cosine, warmup_stable_decay


def _parameters(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def test_adamw_takes_the_steps_of_torch():
    shapes = [(5, 7), (7,), (3, 2, 4)]
    ours, theirs = _parameters(shapes), _parameters(shapes)
    options = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}
    a, b = AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(25):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_adamw_leaves_parameters_without_a_gradient_alone():
    used, unused = _parameters([(3,), (3,)])
    before = unused.detach().clone()
    used.grad = torch.ones(3)
    AdamW([used, unused], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(unused, before)


def test_adamw_corrects_each_parameter_by_its_own_number_of_steps():
    ours, theirs = _parameters([(4,), (4,)]), _parameters([(4,), (4,)])
    a = AdamW(ours, lr=0.05, weight_decay=0.1)
    b = torch.optim.AdamW(theirs, lr=0.05, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 9):
        for late, (p, q) in enumerate(zip(ours, theirs)):
            if not late or step >= 5:  # as an expert that gets its first token late
                p.grad = torch.randn(4, generator=generator)
                q.grad = p.grad.clone()
        a.step()
        b.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (3, 24, 12)])
def test_orthogonalize_sends_singular_values_near_one_and_keeps_the_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    out = orthogonalize(matrix)
    values = torch.linalg.svdvals(out)
    # the quintic oscillates in about [0.7, 1.2]; directions that the norm hid (smallest values) may lag behind
    assert values.max() < 1.3
    assert values.median() > 0.65
    agreement = (out * (u @ vt)).sum() / (out.norm() * (u @ vt).norm())
    assert agreement > 0.95


def test_muon_step_is_the_formula():
    (weight,) = _parameters([(6, 10)])
    start, momentum, lr, decay = weight.detach().clone(), 0.9, 0.02, 0.1
    optimizer = Muon([weight], lr=lr, momentum=momentum, weight_decay=decay)
    buffer, expected = torch.zeros_like(start), start.clone()
    for seed in range(3):
        grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(seed))
        weight.grad = grad.clone()
        optimizer.step()
        buffer = momentum * buffer + (1 - momentum) * grad
        nesterov = (1 - momentum) * grad + momentum * buffer
        expected = expected * (1 - lr * decay) - lr * 0.2 * math.sqrt(10) * orthogonalize(nesterov)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_muon_step_has_the_size_of_an_adamw_step():
    (weight,) = _parameters([(64, 32)])
    before = weight.detach().clone()
    weight.grad = torch.randn(64, 32)
    Muon([weight], lr=1.0).step()
    size = (weight.detach() - before).square().mean().sqrt()
    assert 0.1 < size < 0.3  # Liu et al.: AdamW's steps have a root mean square of about 0.2 to 0.4 lr


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"\(4,\).*AdamW"):
        Muon(_parameters([(4, 4), (4,)]))


class _TwoBlocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 4)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.norm = torch.nn.LayerNorm(4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group_and_vectors_do_not_decay(name):
    model = _TwoBlocks()
    optimizer = build_optimizer(model, name, 0.1, 0.5, embed_lr=0.3)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.5 if p.ndim == 2 else 0.0)
            assert group["peak_lr"] == (0.3 if p is model.embed.weight else 0.1)
    optimizer.set_lr_scale(0.5)
    assert {round(group["lr"], 6) for group in optimizer.param_groups} == {0.15, 0.05}


def test_optimizer_state_survives_a_round_trip():
    model = _TwoBlocks()
    twin = copy.deepcopy(model)
    first, second = (build_optimizer(m, "muon", 0.1, 0.5) for m in (model, twin))

    def move(m, optimizer, seed):
        for p in m.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    move(model, first, 1)
    twin.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch shares tensors with the dict
    move(model, first, 2)
    move(twin, second, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))
    with pytest.raises(ValueError, match="AdamW"):
        OptimizerSet(torch.optim.SGD(model.parameters(), lr=0.1)).load_state_dict(first.state_dict())


def test_a_resumed_run_keeps_its_own_hyperparameters():
    model = _TwoBlocks()
    first, second = build_optimizer(model, "muon", 0.1, 0.5), build_optimizer(model, "muon", 0.01, 0.2, (0.5, 0.6))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.set_lr_scale(1.0)
    assert {group["lr"] for group in second.param_groups} == {0.01}
    assert {group["weight_decay"] for group in second.param_groups} == {0.2, 0.0}
    assert second.optimizers[1].param_groups[0]["betas"] == (0.5, 0.6)
    moments = [o.state[model.norm.weight]["exp_avg"] for o in (first.optimizers[1], second.optimizers[1])]
    assert torch.equal(*moments) and moments[0].any()


def test_state_of_other_groups_is_refused():
    model = _TwoBlocks()
    saved = build_optimizer(model, "adamw", 0.1, 0.1).state_dict()
    model.embed.requires_grad_(False)
    with pytest.raises(ValueError, match=r"AdamW has groups of \[1, 4, 2\]"):
        build_optimizer(model, "adamw", 0.1, 0.1).load_state_dict(saved)


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        ("blocks.0.weight", {"muon": ["Muon"], "adamw": ["AdamW"]}),  # what LoRA leaves
        ("norm.weight", {"muon": ["AdamW"], "adamw": ["AdamW"]}),  # frozen blocks
    ],
)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_partly_frozen_models_get_the_optimizers_they_need(name, trained, expected):
    model = _TwoBlocks().requires_grad_(False)
    model.get_parameter(trained).requires_grad_(True)
    optimizer = build_optimizer(model, name, 0.1, 0.1)
    assert [type(member).__name__ for member in optimizer.optimizers] == expected[name]
    assert [p for group in optimizer.param_groups for p in group["params"]] == [model.get_parameter(trained)]


def test_an_embedding_rate_of_zero_is_zero():
    model = _TwoBlocks()
    rates = {
        id(p): g["lr"] for g in build_optimizer(model, "muon", 0.1, 0.1, embed_lr=0.0).param_groups for p in g["params"]
    }
    assert rates[id(model.embed.weight)] == 0.0


def test_build_optimizer_says_what_is_wrong():
    model = _TwoBlocks()
    with pytest.raises(ValueError, match="OPTIMIZER=lion"):
        build_optimizer(model, "lion", 0.1, 0.1)
    with pytest.raises(ValueError, match="frozen"):
        build_optimizer(model.requires_grad_(False), "adamw", 0.1, 0.1)


def test_cosine_by_hand():
    schedule = cosine(total=110, warmup=10, floor=0.1)
    assert [schedule[0], schedule[4], schedule[9]] == pytest.approx([0.1, 0.5, 1.0])
    assert schedule[10] == pytest.approx(1.0)
    assert schedule[60] == pytest.approx(0.55)
    assert schedule[109] == pytest.approx(0.1, abs=1e-3)
    assert len(schedule) == 110


def test_wsd_by_hand():
    schedule = warmup_stable_decay(total=100, warmup=10, decay_fraction=0.4)
    assert schedule[5] == pytest.approx(0.6)
    assert [schedule[i] for i in (10, 35, 60)] == pytest.approx([1.0, 1.0, 1.0])
    assert schedule[80] == pytest.approx(0.5)
    assert 0 < schedule[99] <= 0.025 + 1e-9


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_in_range_and_never_stand_still(name):
    schedule = SCHEDULES[name](50, 5)
    values = [schedule[i] for i in range(50)]
    assert all(0 < value <= 1 for value in values)
    assert max(values) == 1
    assert list(schedule) == values  # iterable, for plots


def test_a_decay_that_begins_within_the_warm_up_is_refused():
    warmup_stable_decay(10, 4, 0.6)
    with pytest.raises(ValueError, match=r"warm-up of 5 steps.*overlap"):
        warmup_stable_decay(10, 5, 0.6)


@pytest.mark.parametrize(("total", "warmup"), [(0, 0), (10, 11), (10, -1)])
def test_bad_schedules_are_refused(total, warmup):
    with pytest.raises(ValueError, match="warm-up"):
        Schedule(total, warmup, lambda progress: 1.0)
    with pytest.raises(ValueError, match="decay_fraction=0"):
        warmup_stable_decay(10, 1, 0)


if __name__ == "__main__":
    for label, values in (("cosine", cosine(20, 4)), ("wsd", warmup_stable_decay(20, 4))):
        print(f"{label:>7}:", " ".join(f"{value:.2f}" for value in values))
    raise SystemExit(pytest.main([__file__]))
