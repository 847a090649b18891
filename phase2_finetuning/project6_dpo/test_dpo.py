"""Tests of preference optimization: formulas, gradients, log-probabilities, rows, truncation, the objective."""

import functools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common import DATA
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.trainer import Step
from phase2_finetuning.project4_sft.packing import render_within
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens
from phase2_finetuning.project5_lora.lora import add_lora, without_adapters
from phase2_finetuning.project6_dpo import download_data
from phase2_finetuning.project6_dpo.dpo import (
    LOSSES,
    PreferenceObjective,
    answer_log_probs,
    dpo_gradient,
    dpo_loss,
    ipo_loss,
    log_probs_of,
    orpo_loss,
    simpo_loss,
)
from phase2_finetuning.project6_dpo.pairing import PreferenceDataset, render_pair
from phase2_finetuning.project6_dpo.preferences import Preference, check_preference, read_preferences

SETTINGS = SimpleNamespace(BETA=0.3, LABEL_SMOOTHING=0.1, IPO_TAU=0.5, SIMPO_BETA=2.0, SIMPO_GAMMA=0.5, ORPO_WEIGHT=0.2)


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(with_chat_tokens(byte_tokenizer()))


def ask(text):
    return [{"role": "user", "content": text}]


def pair(question="Hi", chosen="Hello.", rejected="No."):
    return Preference(ask(question), chosen, rejected)


def tiny(seed=0, **changes):
    """A model with opinions: larger weights than new ones."""
    torch.manual_seed(seed)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=320, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def dataset(template, pairs, block_size=64):
    return PreferenceDataset([render_pair(template, p, block_size) for p in pairs], block_size, template.start_id)


PAIRS = [pair("Hi", "Hello there.", "No."), pair("2+2?", "4", "It is 5, fool."), pair("x" * 20, "y" * 9, "z" * 12),
         pair("Why?", "So.", "Because."), pair("a", "b", "c")]  # fmt: skip


# -- formulas


def test_the_losses_are_the_papers_formulas():
    c, r, rc, rr = (torch.rand(50, dtype=torch.float64) * -8 - 0.05 for _ in range(4))
    ratio = torch.log(torch.exp(c) / torch.exp(rc)) - torch.log(torch.exp(r) / torch.exp(rr))  # as the papers write it
    sigma = lambda x: 1 / (1 + torch.exp(-x))  # noqa: E731
    wanted = -torch.log(sigma(0.3 * ratio))  # DPO, equation 7
    torch.testing.assert_close(dpo_loss(c, r, rc, rr, 0.3), wanted)
    smooth = 0.9 * wanted - 0.1 * torch.log(sigma(-0.3 * ratio))  # cDPO, equation 3
    torch.testing.assert_close(dpo_loss(c, r, rc, rr, 0.3, 0.1), smooth)
    torch.testing.assert_close(ipo_loss(c, r, rc, rr, 0.5), (ratio - 1) ** 2)  # IPO, equation 17
    torch.testing.assert_close(simpo_loss(c, r, 2.0, 0.5), -torch.log(sigma(2 * c - 2 * r - 0.5)))  # SimPO, equation 6
    odds = lambda p: p.exp() / (1 - p.exp())  # noqa: E731 - ORPO, equation 4
    wanted = -c - 0.2 * torch.log(sigma(torch.log(odds(c) / odds(r))))  # equations 6 and 7
    torch.testing.assert_close(orpo_loss(c, r, 0.2), wanted)


def test_losses_by_hand():
    c, r, rc, rr = (torch.tensor(x, dtype=torch.float64) for x in (-2.0, -5.0, -3.0, -4.0))  # ratios 1 and -1
    assert float(dpo_loss(c, r, rc, rr, beta=0.5)) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(ipo_loss(c, r, rc, rr, tau=0.25)) == pytest.approx(0.0)  # the mark is 1 / 0.5 = 2
    assert float(simpo_loss(c, r, beta=1.0, gamma=3.0)) == pytest.approx(math.log(2))
    even = torch.tensor(math.log(0.5), dtype=torch.float64)  # odds of 1, against odds of 1 / 3
    assert float(orpo_loss(even, torch.tensor(math.log(0.25)), weight=1.0)) == pytest.approx(
        math.log(2) + math.log(4 / 3)
    )
    zero = torch.zeros(1)
    assert torch.isfinite(orpo_loss(zero, zero)).all()  # certainty has infinite odds


@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_against_numerical_ones(name):
    torch.manual_seed(1)
    sums, reference = (torch.rand(6, 2, dtype=torch.float64) * -20 - 1 for _ in range(2))
    lengths = torch.randint(1, 9, (6, 2)).double()
    loss = functools.partial(LOSSES[name], SETTINGS)
    assert torch.autograd.gradcheck(lambda x: loss(x, reference, lengths), sums.requires_grad_())
    gradient = torch.autograd.grad(loss(sums, reference, lengths).sum(), sums)[0]
    if name in ("simpo", "orpo"):  # IPO, and DPO with smoothed labels, pull back beyond a certain margin
        assert (gradient[:, 0] < 0).all() and (gradient[:, 1] > 0).all()


def test_the_gradient_of_dpo_in_closed_form():
    values = [(torch.rand(20, dtype=torch.float64) * -9).requires_grad_() for _ in range(4)]
    derived = torch.autograd.grad(dpo_loss(*values, beta=0.3).sum(), values[:2])
    for ours, theirs in zip(dpo_gradient(*values, beta=0.3), derived, strict=True):
        torch.testing.assert_close(ours, theirs)
    wrong, right = (dpo_gradient(*map(torch.tensor, side), 0.3)[1] for side in ((-9.0, -1.0, -5.0, -5.0),
                                                                                (-1.0, -9.0, -5.0, -5.0)))  # fmt: skip
    assert wrong > 10 * right > 0  # what is ordered wrongly pulls with all its weight


def test_means_and_sums_go_where_they_belong():
    sums, reference = torch.tensor([[-6.0, -6.0]]), torch.tensor([[-8.0, -4.0]])
    lengths = torch.tensor([[2.0, 4.0]])
    got = {name: float(loss(SETTINGS, sums, reference, lengths)) for name, loss in LOSSES.items()}
    assert got["dpo"] == pytest.approx(float(dpo_loss(*map(torch.tensor, (-6.0, -6.0, -8.0, -4.0)), 0.3, 0.1)))
    assert got["ipo"] == pytest.approx(float(ipo_loss(*map(torch.tensor, (-3.0, -1.5, -4.0, -1.0)), 0.5)))
    assert got["simpo"] == pytest.approx(float(simpo_loss(torch.tensor(-3.0), torch.tensor(-1.5), 2.0, 0.5)))
    assert got["orpo"] == pytest.approx(float(orpo_loss(torch.tensor(-3.0), torch.tensor(-1.5), 0.2)))


# -- log-probabilities of answers


def test_log_probabilities_are_those_of_the_answer_and_its_end_alone(template):
    model, one = tiny(), pair("ab", "xyz", "w")
    tokens, targets, _ = dataset(template, [one]).rows(np.arange(1), 0)
    sums, lengths = log_probs_of(model, tokens, targets, template.start_id, 1)
    for side, text in enumerate(one[1:]):
        prompt, answer = template.prompt(one.messages), [*template.tokenizer.encode(text), template.end_id]
        logits = model(torch.tensor([prompt + answer]))[0].detach()
        by_hand = 0.0
        for i, token in enumerate(answer):  # the logits that predict a token stand one place before it
            by_hand += float(F.log_softmax(logits[len(prompt) + i - 1], dim=-1)[token])
        assert float(sums[0, 0, side].detach()) == pytest.approx(by_hand, rel=1e-5)
        assert int(lengths[0, 0, side]) == len(answer) == len(text) + 1


def test_log_probabilities_by_hand():
    tokens = torch.tensor([[7, 1, 2, 7, 1, 3, 4, 7, 7]])  # 7 opens a document; two answers, then padding
    targets = torch.tensor([[-100, 2, -100, -100, 3, 4, -100, -100, -100]])
    nll = torch.tensor([[0.0, 0.5, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0]])
    sums, lengths = answer_log_probs(nll, tokens, targets, start_id=7, n=2)
    assert sums.tolist() == [[[-0.5, -3.0], [0.0, 0.0]]] and lengths.tolist() == [[[1.0, 2.0], [0.0, 0.0]]]


@pytest.mark.parametrize("name", list(LOSSES))
def test_packing_changes_no_pairs_log_probabilities_loss_or_gradient(template, name):
    model, objective = tiny(), PreferenceObjective(functools.partial(LOSSES[name], SETTINGS), template.start_id)
    packed, alone = dataset(template, PAIRS), [dataset(template, [one]) for one in PAIRS]
    assert packed.epoch_size < len(PAIRS) and np.isnan(packed.reference).any()  # rows with fewer pairs than others

    def outcome(datasets):
        model.zero_grad()
        total, found = 0.0, []
        for data in datasets:
            with torch.no_grad():  # a reference of its own for every pair, wherever it lies
                tokens, targets, reference = data.rows(np.arange(data.epoch_size), 0)
                sums, lengths = objective.log_probs(model, tokens, targets, reference.shape[1])
                reference += sums - lengths * torch.tensor([0.1, 0.2])
            loss = objective(model, (tokens, targets, reference))
            loss.backward()
            total += float(loss.detach())
            found += sums[lengths[..., 0] > 0].tolist()
        return total, torch.tensor(sorted(found)), torch.cat([p.grad.flatten() for p in model.parameters()])

    for together, one_by_one in zip(outcome([packed]), outcome(alone), strict=True):
        torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_absent_pairs_pull_at_nothing(monkeypatch, name):
    sums = torch.tensor([[[-3.0, -4.0], [0.0, 0.0]]], requires_grad=True)  # a row with room for two pairs, and one
    lengths, reference = torch.tensor([[[2.0, 3.0], [0.0, 0.0]]]), torch.tensor([[[-4.0, -3.0], [torch.nan] * 2]])
    objective = PreferenceObjective(functools.partial(LOSSES[name], SETTINGS), start_id=0)
    monkeypatch.setattr(objective, "log_probs", lambda *args: (sums, lengths))
    objective(tiny(), (torch.zeros(1, 9), torch.zeros(1, 9), reference)).backward()
    assert objective.count((None, None, reference)) == 1
    assert sums.grad.isfinite().all() and sums.grad[0, 1].abs().sum() == 0 < sums.grad[0, 0].abs().min()


def test_micro_batches_weigh_every_pair_the_same(template):
    pairs = [pair("q" * (i % 11), "a" * (i % 7 + 1), "b" * (i % 5 + 1)) for i in range(24)]
    data, loss = dataset(template, pairs, 48), functools.partial(LOSSES["dpo"], SETTINGS)
    objective, gradients = PreferenceObjective(loss, template.start_id), []
    for micro in (data.epoch_size, 1):  # one micro batch, or rows one by one, with unequal numbers of pairs
        model = tiny()
        step = Step(model, objective, build_optimizer(model, "adamw", 1e-3, 0.0), 1.0)
        micros = data.batches(0, data.epoch_size, micro)[0]
        counts = [objective.count(batch) for batch in micros]
        assert sum(counts) == len(pairs) and (micro > 1 or len(set(counts)) > 1)
        step.backward(micros, sum(counts))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_step_prefers_the_chosen_answers(template):
    model, data = tiny(), dataset(template, PAIRS)
    before = [p.detach().clone() for p in model.parameters()]
    for name in LOSSES:
        with torch.no_grad():
            for parameter, old in zip(model.parameters(), before):
                parameter.copy_(old)
        objective = PreferenceObjective(functools.partial(LOSSES[name], SETTINGS), template.start_id)
        batch = data.rows(np.arange(data.epoch_size), 0)
        with torch.no_grad():
            old, lengths = objective.log_probs(model, *batch[:2], batch[2].shape[1])
        batch = (*batch[:2], torch.where(lengths > 0, old, torch.nan))
        step = Step(model, objective, build_optimizer(model, "adamw", 1e-4, 0.0), 1.0)
        step.backward([batch], len(PAIRS))
        step.update(1.0)
        model.eval()
        with torch.no_grad():
            new, _ = objective.log_probs(model, *batch[:2], batch[2].shape[1])
        gained = ((new - old) / lengths.clamp(min=1))[lengths[..., 0] > 0]
        assert (gained[:, 0] > gained[:, 1]).all(), name


def test_the_reference_is_the_model_without_its_adapters(template):
    data, base = dataset(template, PAIRS), tiny(dropout=0.2)
    loss = functools.partial(LOSSES["dpo"], SETTINGS)
    stored = PreferenceObjective(loss, template.start_id)
    batch = data.rows(np.arange(data.epoch_size), 0)
    with torch.no_grad():
        sums, lengths = stored.log_probs(base, *batch[:2], batch[2].shape[1])
    stored_batch = (*batch[:2], torch.where(lengths > 0, sums, torch.nan))
    model = add_lora(base, rank=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # adapters that do something
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    asked = PreferenceObjective(loss, template.start_id, without_adapters)
    torch.testing.assert_close(asked(model, batch), stored(model, stored_batch))
    assert float(asked(model, batch).detach()) != pytest.approx(len(PAIRS) * math.log(2), rel=1e-3)
    assert not model.training
    model.train()  # the reference has no dropout, whatever the model has
    torch.testing.assert_close(asked.ask_reference(model, *batch[:2], batch[2].shape[1]), sums)
    assert model.training


def test_the_objective_compiles(template):
    model, data = tiny(), dataset(template, PAIRS)
    objective = PreferenceObjective(functools.partial(LOSSES["simpo"], SETTINGS), template.start_id)
    batch = data.rows(np.arange(data.epoch_size), 0)
    plain = objective(model, batch)
    model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(objective(model, batch), plain)


# -- pairs in rows


def test_rows_hold_both_answers_of_every_pair(template):
    pairs = [pair(f"{i}" * (i % 9), "yes" * (i % 3 + 1), "no" * (i % 4 + 1)) for i in range(40)]
    data = dataset(template, pairs, 32)
    assert data.n_pairs == np.isfinite(data.reference[..., 0]).sum() == 40 and data.fill > 0.8
    text = "".join(template.tokenizer.decode(row.tolist()) for row in data.packed.tokens)
    documents = [part for part in text.split("<|endoftext|>") if part]
    sides = [[document.split("<|assistant|>") for document in documents[side::2]] for side in (0, 1)]
    wanted = sorted((f"<|user|>{one.messages[0]['content']}<|end|>", one.chosen, one.rejected) for one in pairs)
    got = sorted((prompt, chosen.removesuffix("<|end|>"), rejected)  # the last token of a pair is only a target
                 for (prompt, chosen), (other, rejected) in zip(*sides, strict=True) if prompt == other)  # fmt: skip
    assert got == wanted


def test_evaluation_reads_all_rows_or_some_spread_evenly(template):
    data = dataset(template, [pair("q" * 9, "a" * 9, f"b{i}") for i in range(30)], 32)
    whole = torch.cat([tokens for tokens, _, _ in data.windows(4)])
    assert whole.tolist() == data.packed.tokens.tolist()
    some = torch.cat([tokens for tokens, _, _ in data.windows(4, max_tokens=3 * 64)])
    assert some.tolist() == data.packed.tokens[[0, data.epoch_size // 3, 2 * data.epoch_size // 3]].tolist()


def test_whatever_the_length_the_difference_is_left_to_learn(template):
    rng = np.random.default_rng(0)
    for _ in range(300):
        messages = ask("q" * int(rng.integers(80)))
        if rng.integers(2):
            messages = [{"role": "system", "content": "s" * 30}, *ask("first"),
                        {"role": "assistant", "content": "1"}, *messages]  # fmt: skip
        shared = "s" * int(rng.integers(60))
        one = Preference(messages, shared + "a" * int(rng.integers(60)), shared + "b" * int(rng.integers(1, 60)))
        limit = int(rng.integers(16, 120))
        (chosen, mask), (rejected, other_mask) = render_pair(template, one, limit)
        for tokens, learned in ((chosen, mask), (rejected, other_mask)):
            assert len(tokens) == len(learned) <= limit and sum(learned) >= 1
            assert tokens[0] == template.start_id and tokens.count(template.start_id) == 1
        start, other_start = mask.index(1), other_mask.index(1)
        assert chosen[:start] == rejected[:other_start]  # the same prompt
        assert chosen[start:] != rejected[other_start:]
        whole = render_within(template, [*messages, {"role": "assistant", "content": one.chosen}], 10_000)
        if max(len(whole[0]), len(whole[0]) - len(one.chosen) + len(one.rejected)) <= limit:
            assert chosen == whole[0] and mask[-len(one.chosen) - 1 :] == whole[1][-len(one.chosen) - 1 :]


def test_what_is_cut_and_what_is_not(template):
    def texts(one, limit):
        sides = render_pair(template, one, limit)
        return [template.tokenizer.decode(tokens) for tokens, _ in sides]

    start = "<|endoftext|><|user|>"
    cut = [f"{start}123456789<|end|><|assistant|>{side}<|end|>" for side in ("ab", "c")]  # the same prompt for both
    assert texts(pair("0123456789", "ab", "c"), 16) == cut
    long, brief = texts(pair("0", "a" * 30, "b"), 16)
    assert long == f"{start}0<|end|><|assistant|>{'a' * 11}" and brief == f"{start}0<|end|><|assistant|>b<|end|>"
    late, later = texts(pair("0", "s" * 30 + "xy", "s" * 30 + "z"), 16)  # the answers part behind the cut
    assert late.endswith("sxy<|end|>") and later.endswith("sz<|end|>") and late.startswith(start)
    talk = Preference([*ask("first"), {"role": "assistant", "content": "1"}, *ask("last")], "ab", "c")
    assert texts(talk, 16)[0] == f"{start}last<|end|><|assistant|>ab<|end|>"  # the oldest exchange goes first
    with pytest.raises(ValueError, match="limit=15 leaves no room"):
        render_pair(template, pair(), 15)


# -- reading


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chosen": None}, "chosen is None"),
        ({"rejected": 5}, "rejected is 5"),
        ({"rejected": "Hello."}, "same answer"),
        ({"prompt_messages": []}, "at least one message"),
        ({"prompt_messages": [*ask("a"), {"role": "assistant", "content": "b"}]}, "must be the user's"),
        ({"prompt_messages": [{"role": "assistant", "content": "b"}]}, "assistant's, where it is the user's turn"),
        ({"prompt_messages": [{"role": "bot", "content": "b"}]}, "role 'bot'"),
    ],
)
def test_what_is_no_preference_is_refused(change, said):
    good = {"prompt_messages": ask("Hi"), "chosen": "Hello.", "rejected": "No."}
    assert check_preference(good) == pair()
    with pytest.raises(ValueError, match=said):
        check_preference(good | change)
    for name in good:
        with pytest.raises(ValueError, match=f"no object with {name}"):
            check_preference({key: value for key, value in good.items() if key != name})


def test_a_broken_line_is_named(tmp_path):
    path, good = tmp_path / "pairs.jsonl", json.dumps({"prompt_messages": ask("a"), "chosen": "b", "rejected": "c"})
    for bad, said in (("{", "line 3: "), ('{"text": 1}', "no object with prompt_messages"), ("[]", "line 3")):
        path.write_text(f"{good}\n\n{bad}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=said) as error:
            read_preferences(path)
        assert str(path) in str(error.value)
    path.write_bytes((good + "\n").encode() + b"\xff\xfe\n")
    with pytest.raises(ValueError, match="damaged behind line"):
        read_preferences(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no preference"):
        read_preferences(path)
    with pytest.raises(FileNotFoundError):
        read_preferences(tmp_path / "nowhere.jsonl")


def test_the_bundled_pairs_are_whole():
    train, test = (read_preferences(DATA / f"polite_{part}.jsonl.xz") for part in ("train", "test"))
    assert (len(train), len(test)) == (984, 110)


def test_rows_of_public_sets_become_preferences():
    wanted = {"prompt_messages": ask("Hi"), "chosen": "Hello.", "rejected": "No."}
    said = lambda text: [*ask("Hi"), {"role": "assistant", "content": text}]  # noqa: E731
    rows = [{"chosen": said("Hello."), "rejected": said("No.")}, {"chosen": said("x"), "rejected": said("x")},
            {"chosen": said("x"), "rejected": [*ask("Ho"), {"role": "assistant", "content": "y"}]},
            {"chosen": [], "rejected": []}]  # fmt: skip
    assert list(download_data.conversations(rows)) == [wanted]
    text = "\n\nHuman: Hi\n\nAssistant: "
    rows = [{"chosen": text + "Hello.", "rejected": text + "No."}, {"chosen": "nothing", "rejected": text + "No."}]
    assert list(download_data.transcripts(rows)) == [wanted]


if __name__ == "__main__":
    demonstration = ChatTemplate(with_chat_tokens(byte_tokenizer()))
    for tokens, mask in render_pair(demonstration, pair(), 64):
        print("".join(f"[{demonstration.tokenizer.decode([t])}]" if m else demonstration.tokenizer.decode([t])
                      for t, m in zip(tokens, mask)), "(in brackets: what is added up)")  # fmt: skip
    print("loss of a pair that the model orders as the reference does:", float(dpo_loss(*torch.zeros(4))), "= ln 2")
    raise SystemExit(pytest.main([__file__]))
