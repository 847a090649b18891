"""Tests of the training loop: sums over micro batches, resuming, divergence, averages, FLOPs."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from common import checkpoint
from phase1_foundation.project3_pretrain.evaluation import score_batches
from phase1_foundation.project3_pretrain.hooks import (
    Checkpoint,
    Evaluate,
    ExponentialAverage,
    Progress,
    StopOnRequest,
    plot_metrics,
    read_metrics,
    rewind_metrics,
)
from phase1_foundation.project3_pretrain.model import ModelConfig, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.plans import Packed
from phase1_foundation.project3_pretrain.schedules import cosine
from phase1_foundation.project3_pretrain.shuffle import mix
from phase1_foundation.project3_pretrain.trainer import DivergedError, NextToken, Step, fit, flops_per_token

TINY = ModelConfig(vocab_size=31, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


class Batches:
    """Random tokens as a pure function of the step."""

    def __init__(self, micros=2, size=3):
        self.micros, self.size = micros, size

    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(0, 31, (self.micros, self.size, 9), generator=generator)
        return [(row[:, :-1], row[:, 1:]) for row in rows]


def _step(seed=0, optimizer="muon", config=TINY, clip=1.0):
    torch.manual_seed(seed)
    model = Transformer(config)
    return Step(model, NextToken(), build_optimizer(model, optimizer, 1e-2, 0.1), clip)


def _weights(step):
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


def test_a_plan_keeps_packed_documents_apart():
    model = Transformer(ModelConfig(**{**TINY.to_dict(), "dropout": 0.0}))
    objective = NextToken(lambda model, tokens: Packed.at_marks(tokens, 0, model.specs, model.kernel))
    documents = [torch.tensor([0, 5, 9]), torch.tensor([0, 7, 7, 2, 4])]
    row = torch.cat(documents)
    targets = torch.cat([torch.cat([document[1:], torch.tensor([-100])]) for document in documents])
    packed = objective(model, (row[None], targets[None]))
    alone = sum(NextToken()(model, (document[None, :-1], document[None, 1:])) for document in documents)
    torch.testing.assert_close(packed, alone)
    assert abs(packed - NextToken()(model, (row[None], targets[None]))) > 1e-4  # without it they see each other
    held_out = score_batches(model, [(row[None], targets[None])], plan=objective.plan)
    assert held_out.nats == pytest.approx(float(alone.detach()), rel=1e-5) and held_out.tokens == 6


def test_micro_batches_with_unequal_masks_give_the_gradient_of_one_batch():
    still = ModelConfig(**{**TINY.to_dict(), "dropout": 0.0})
    tokens, targets = Batches(1, 6)[0][0]
    targets = targets.clone()
    targets[0, :7] = -100  # one row counts a single token, another none
    targets[3] = -100
    whole, parts = _step(config=still), _step(config=still)
    count = whole.objective.count((tokens, targets))
    assert count == 6 * 8 - 7 - 8
    a = whole.backward([(tokens, targets)], count)
    b = parts.backward([(tokens[i : i + 2], targets[i : i + 2]) for i in (0, 2, 4)], count)
    torch.testing.assert_close(a, b)
    for p, q in zip(whole.model.parameters(), parts.model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    # and it is the mean over counted tokens, as torch computes it
    logits = whole.model.eval()(tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(a, expected.detach())


def test_update_clips_to_the_norm_and_reports_it_before():
    step = _step(clip=0.01)
    micros = Batches()[0]
    step.backward(micros, 48)
    grads = torch.cat([p.grad.flatten() for p in step.parameters])
    norm = step.update(1.0)
    clipped = torch.cat([p.grad.flatten() for p in step.parameters])
    assert norm == pytest.approx(float(grads.norm()), rel=1e-5)
    assert float(clipped.norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resuming_is_bit_exact_dropout_included(tmp_path, optimizer):
    schedule, losses = cosine(8, 2), []
    whole = _step(optimizer=optimizer)
    fit(whole, Batches(), schedule, [lambda s: losses.append(s.train_loss)])
    first = _step(optimizer=optimizer)
    hooks = [lambda s: setattr(s, "stop", s.iter == 3), Checkpoint(tmp_path, dict, every=100)]
    fit(first, Batches(), schedule, hooks)
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["iter"] == 3
    second, again = _step(seed=99, optimizer=optimizer), []
    second.model.load_state_dict(saved["model_state_dict"])
    second.load_state_dict(saved["optimizer_state_dict"])
    fit(second, Batches(), schedule, [lambda s: again.append(s.train_loss)], start=3)
    assert again == losses[3:]
    assert torch.equal(_weights(second), _weights(whole))


def test_training_learns():
    class Same(Batches):
        def __getitem__(self, step):
            return super().__getitem__(0)

    losses = []
    fit(_step(), Same(), cosine(60, 5), [lambda s: losses.append(s.train_loss)])
    assert losses[0] == pytest.approx(math.log(31), abs=0.3)
    assert losses[-1] < 0.7 * losses[0]


def test_a_nan_stops_before_the_weights_are_touched(tmp_path):
    step = _step()
    keep = Checkpoint(tmp_path, dict, every=2)
    before = {}

    def poison(state):
        if state.iter == 3:
            before["weights"] = _weights(step)
            step.objective = lambda model, batch: model(batch[0], targets=batch[1]).sum() * float("nan")
            step.objective.count = NextToken().count

    with pytest.raises(DivergedError, match=r"step 4.*lower learning rate"):
        fit(step, Batches(), cosine(8, 2), [keep, poison])
    assert torch.equal(_weights(step), before["weights"])
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 2


def test_a_loss_that_is_no_number_stops_even_if_its_gradient_is_one():
    step = _step()
    step.objective = lambda model, batch: NextToken()(model, batch) + math.inf
    step.objective.count = NextToken().count
    before = _weights(step)
    with pytest.raises(DivergedError, match="step 1: the loss became inf"):
        fit(step, Batches(), cosine(8, 2))
    assert torch.equal(_weights(step), before)


def _diverge(tmp_path, at, resume=0, **options):
    """Train with checkpoints until an update at step `at` ruins the weights; returns the message."""
    step = _step()
    ruin = lambda s: s.iter == at and torch.nn.init.constant_(s.step.model.norm.weight, math.nan)  # noqa: E731
    keep = Checkpoint(tmp_path, dict, start=resume, **options)
    with pytest.raises(DivergedError) as caught:
        fit(step, Batches(), cosine(20, 2), [ruin, keep], start=resume)
    return str(caught.value)


def _steps_of(folder):
    return {path.name: checkpoint.load(path)["iter"] for path in folder.glob("*.pt*")}


def test_after_a_divergence_the_message_names_the_file_whose_weights_are_good(tmp_path):
    assert "No checkpoint was written yet" in _diverge(tmp_path / "a", at=3, every=5)
    message = _diverge(tmp_path / "b", at=4, every=3)
    assert f"continues from {tmp_path / 'b' / 'last.pt'} (step 3)" in message
    message = _diverge(tmp_path / "c", at=4, every=2)
    assert f"delete it, and the next run continues from {tmp_path / 'c' / 'previous.pt'}" in message
    assert _steps_of(tmp_path / "c") == {"last.pt": 4, "previous.pt": 2}
    assert all(v.isfinite().all() for v in checkpoint.load(tmp_path / "c/previous.pt")["model_state_dict"].values())
    message = _diverge(tmp_path / "d", at=1, every=1)
    assert _steps_of(tmp_path / "d") == {"last.pt": 1} and "--no_resume" in message


def test_a_validation_loss_that_is_no_number_saves_nothing(tmp_path):
    run = SimpleNamespace(log=lambda **f: None, print=lambda *a, **k: None)
    hooks = [Evaluate(lambda: math.nan, 2, run), Checkpoint(tmp_path, dict, every=1)]
    with pytest.raises(DivergedError, match=r"step 2: the validation loss.*last.pt \(step 1\)"):
        fit(_step(), Batches(), cosine(8, 2), hooks)
    assert _steps_of(tmp_path) == {"last.pt": 1}


def test_a_step_without_a_token_that_counts_says_so():
    class Masked(Batches):
        def __getitem__(self, step):
            return [(tokens, torch.full_like(targets, -100)) for tokens, targets in super().__getitem__(step)]

    with pytest.raises(ValueError, match="step 1 has no token that counts") as caught:
        fit(_step(), Masked(), cosine(8, 2))
    assert not isinstance(caught.value, DivergedError)


def test_the_auxiliary_loss_weighs_the_same_under_every_mask():
    step, (tokens, targets) = _step(), Batches(1, 4)[0][0]
    step.model.auxiliary_losses = lambda: torch.tensor(0.25)
    model = lambda tokens, plan, targets: torch.zeros(tokens.shape)  # noqa: E731
    model.auxiliary_losses = step.model.auxiliary_losses
    masked = targets.clone()
    masked[:3] = -100
    for batch in ((tokens, targets), (tokens, masked)):
        assert float(step.objective(model, batch)) / step.objective.count(batch) == 0.25


def test_gradients_are_summed_where_ranks_used_different_parameters(monkeypatch):
    ours, theirs, messages = _step(), _step(), []
    for step, used in ((ours, {0, 1}), (theirs, {1, 2})):
        step.world_size = 2
        for i in used:
            step.parameters[i].grad = torch.full_like(step.parameters[i], 1.0 + i)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: messages.append(flat.clone()))
    theirs.reduce_gradients()
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.add_(messages[0]))
    ours.reduce_gradients()
    for parameter, expected in zip(ours.parameters, (1.0, 4.0, 3.0)):
        assert torch.equal(parameter.grad, torch.full_like(parameter, expected))
    assert all(parameter.grad is None for parameter in ours.parameters[3:])  # as in a single process


def test_the_seed_of_a_step_is_the_same_in_every_python():
    seen = []
    step = _step()
    step.objective = lambda model, batch: (seen.append(torch.initial_seed()), NextToken()(model, batch))[1]
    step.objective.count = NextToken().count
    fit(step, Batches(1), cosine(2, 1), seed=5)
    assert seen == [mix(5, 0, 0), mix(5, 1, 0)]


def test_the_progress_line_shows_the_learning_rate():
    lines = []
    run = SimpleNamespace(print=lambda text, **k: lines.append(text), log=lambda **f: None, device=torch.device("cpu"))
    fit(_step(), Batches(), cosine(2, 2), [Progress(run, 2, every_s=0.0, peak_lr=0.5)])
    assert "lr 0.2500" in lines[0] and "lr 0.5000" in lines[1]


def test_best_follows_the_validation_loss_and_last_the_steps(tmp_path):
    losses = iter([3.0, 2.0, 2.5, 2.4])
    run = SimpleNamespace(log=lambda **f: None, print=lambda *a, **k: None)
    describe = lambda: {"tokenizer": {"kind": "x"}}  # noqa: E731
    hooks = [Evaluate(lambda: next(losses), 2, run), Checkpoint(tmp_path, describe, every=3)]
    fit(_step(), Batches(), cosine(8, 2), hooks)
    best, last = (checkpoint.load(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert (best["iter"], best["val_loss"]) == (4, 2.0)
    assert (last["iter"], last["val_loss"], last["best_val_loss"]) == (8, 2.4, 2.0)
    assert last["recipe"] == [] and last["tokenizer"] == {"kind": "x"}


def test_a_request_to_stop_saves_and_leaves(tmp_path):
    run = SimpleNamespace(stopping=False)
    ask = lambda state: setattr(run, "stopping", state.iter == 2)  # noqa: E731
    state = fit(_step(), Batches(), cosine(8, 2), [ask, StopOnRequest(run), Checkpoint(tmp_path, dict, every=100)])
    assert state.iter == 2
    assert checkpoint.load(tmp_path / "last.pt")["iter"] == 2


def test_a_stop_of_another_hook_stays(tmp_path):
    stop = lambda state: setattr(state, "stop", state.iter == 3)  # noqa: E731
    state = fit(_step(), Batches(), cosine(8, 2), [stop, StopOnRequest(SimpleNamespace(stopping=False))])
    assert state.iter == 3


def test_exponential_average_is_the_formula_and_leaves_the_weights_alone():
    step = _step()
    average, history = ExponentialAverage(step.model, 0.5), [_weights(step)]
    state = fit(step, Batches(), cosine(4, 1), [average, lambda s: history.append(_weights(step))])
    expected = history[0]
    for weights in history[1:]:
        expected = 0.5 * expected + 0.5 * weights
    with average.applied():
        torch.testing.assert_close(_weights(step), expected)
    assert torch.equal(_weights(step), history[-1])
    assert set(state.extra["ema"]) == {name for name, _ in step.model.named_parameters()}


def test_the_average_resumes_bit_by_bit_and_best_holds_it(tmp_path):
    def train(step, start=0, average=None, stop=None):
        average = ExponentialAverage(step.model, 0.7, average)
        run = SimpleNamespace(log=lambda **f: None, print=lambda *a, **k: None)
        keep = Checkpoint(tmp_path, dict, 100, averaged=average.applied)
        hooks = [average, lambda s: setattr(s, "stop", s.iter == stop), Evaluate(lambda: 2.0, 6, run), keep]
        fit(step, Batches(), cosine(6, 1), hooks, start)
        return average.average

    whole = train(_step())
    best = checkpoint.load(tmp_path / "best.pt")["model_state_dict"]
    assert all(torch.equal(best[name], whole[name]) for name in whole)
    train(_step(), stop=3)
    saved, again = checkpoint.load(tmp_path / "last.pt"), _step(seed=9)
    again.model.load_state_dict(saved["model_state_dict"])
    again.load_state_dict(saved["optimizer_state_dict"])
    resumed = train(again, 3, saved["ema"])
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_metrics_survive_a_torn_line_and_are_rewound(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "train_loss": 5.0 - i}) for i in range(1, 5)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "tra', encoding="utf-8")
    rewind_metrics(path, 3)
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2, 3]
    plot_metrics(path, tmp_path / "curves.png", "loss")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_flops_by_hand():
    model = Transformer(ModelConfig(vocab_size=50304, block_size=64, n_layer=1, n_head=2, n_embd=32))
    matrices = 4 * 32 * 32 + 2 * 32 * 128 + 50304 * 32
    assert flops_per_token(model, 64) == 6 * matrices + 12 * 1 * 32 * 64
    model.requires_grad_(False)  # forward, and the gradient of what comes in
    assert flops_per_token(model, 64) == 4 * matrices + 12 * 1 * 32 * 64


if __name__ == "__main__":
    fit(_step(), Batches(), cosine(5, 1), [lambda s: print(f"step {s.iter}: {s.train_loss:.3f} nats a token")])
    raise SystemExit(pytest.main([__file__]))
