"""Sampling: every parameter as transformers has it, even noise, requests that do not depend on their neighbours."""

import pytest
import torch
import transformers

from phase1_foundation.project1_minimal_gpt.sampling import next_token_probabilities
from phase3_core_inference.project8_kv_cache.adjusting import penalize
from phase3_core_inference.project8_kv_cache.drawing import RecordedDraws, cut_tail, draw_among
from phase3_core_inference.project8_kv_cache.noise import gumbel, noise_keys, scramble, uniform
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase3_core_inference.project8_kv_cache.sampling import Sampler
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams

V = 50


def draw_logits(rows=4, seed=0, scale=3.0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale


def column(*values):
    return torch.tensor(values).unsqueeze(-1)


@pytest.mark.parametrize("seed", range(5))
def test_each_cut_is_that_of_transformers(seed):
    logits, ids = draw_logits(seed=seed), torch.zeros(4, 1, dtype=torch.long)
    off_k, off_p, off_m = column(V, V, V, V), column(1.0, 1.0, 1.0, 1.0), column(0.0, 0.0, 0.0, 0.0)
    ks, ps, ms = [1, 3, 20, V], [0.05, 0.5, 0.9, 0.999], [0.001, 0.05, 0.5, 1.0]
    theirs = {
        "k": torch.cat([transformers.TopKLogitsWarper(k)(ids[:1], row[None]) for k, row in zip(ks, logits)]),
        "p": torch.cat([transformers.TopPLogitsWarper(p)(ids[:1], row[None]) for p, row in zip(ps, logits)]),
        "m": torch.cat([transformers.MinPLogitsWarper(m)(ids[:1], row[None]) for m, row in zip(ms, logits)]),
    }
    torch.testing.assert_close(cut_tail(logits, column(*ks), off_p, off_m), theirs["k"])
    torch.testing.assert_close(cut_tail(logits, off_k, column(*ps), off_m), theirs["p"])
    torch.testing.assert_close(cut_tail(logits, off_k, off_p, column(*ms)), theirs["m"])


@pytest.mark.parametrize("seed", range(3))
def test_all_cuts_together_are_transformers_in_their_order(seed):
    logits, ids = draw_logits(seed=seed), torch.zeros(4, 1, dtype=torch.long)
    for k, p, m in ((10, 0.8, 0.1), (3, 0.99, 0.0), (V, 0.7, 0.3)):
        theirs = transformers.LogitsProcessorList(
            [transformers.TopKLogitsWarper(k), transformers.TopPLogitsWarper(p), transformers.MinPLogitsWarper(m)]
        )(ids, logits)
        ours = cut_tail(logits, column(*[k] * 4), column(*[p] * 4), column(*[m] * 4))
        torch.testing.assert_close(ours, theirs)


def test_cuts_are_those_of_project_1():
    logits = draw_logits()
    for k, p in ((5, 1.0), (V, 0.6), (7, 0.9)):
        ours = cut_tail(logits / 0.7, column(*[k] * 4), column(*[p] * 4), column(*[0.0] * 4)).softmax(-1)
        torch.testing.assert_close(ours, next_token_probabilities(logits, 0.7, k, p))


def test_the_penalty_is_that_of_transformers():
    logits, ids = draw_logits(), torch.tensor([[1, 2, 2], [0, 0, 0], [49, 5, 7], [3, 4, 5]])
    seen = torch.zeros(4, V, dtype=torch.bool).scatter(1, ids, True)
    theirs = transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)
    torch.testing.assert_close(penalize(logits, seen, column(*[1.3] * 4)), theirs)


def test_uniform_noise_fills_the_open_interval_evenly():
    u = uniform(column(*noise_keys(range(40_000), [3] * 40_000)))
    assert u.shape == (40_000, 1) and float(u.min()) > 0 and float(u.max()) < 1
    counts = (u * 16).long().flatten().bincount(minlength=16).double()
    assert float(((counts - 2500) ** 2 / 2500).sum()) < 37.7  # 15 degrees of freedom, the 0.1% level


def test_noise_is_splitmix64_and_gumbel():
    keys = noise_keys([3, -1], [0, 10**6])
    assert all(-(2**63) <= key < 2**63 for key in keys)
    noise = gumbel(column(*keys), torch.arange(5))
    ids = torch.tensor([[4, 0], [1, 3]])
    assert torch.equal(gumbel(column(*keys), ids), noise.gather(1, ids))  # of a token, wherever it stands
    for key, row in zip(keys, noise):
        for token, value in enumerate(row):
            u = ((scramble(key + (token + 1) * 0x9E3779B97F4A7C15) >> 24) + 0.5) / 2**40
            exact = -torch.log(-torch.log1p(torch.tensor(-u, dtype=torch.float64)))
            assert float(value) == pytest.approx(float(exact), rel=1e-4, abs=1e-5)


def test_noise_draws_from_the_distribution():
    """Chi-square over 20,000 positions: at the 0.1% level for 7 degrees of freedom, the seed fixed."""
    p = torch.tensor([0.4, 0.2, 0.15, 0.1, 0.08, 0.04, 0.02, 0.01])
    for keys in (noise_keys([5] * 20_000, range(20_000)), noise_keys(range(20_000), [5] * 20_000)):
        drawn = (p.log() + gumbel(column(*keys), torch.arange(8))).argmax(-1).bincount(minlength=8)
        expected = p * 20_000
        assert float(((drawn - expected) ** 2 / expected).sum()) < 24.3


def test_noise_of_neighbours_is_independent():
    noise = gumbel(column(*noise_keys([1] * 200, range(200))), torch.arange(500))
    for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert abs(float(correlation)) < 0.015  # five standard deviations of 100,000 pairs
    assert noise.isfinite().all() and float(noise.mean()) == pytest.approx(0.5772, abs=0.02)


MIX = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, seed=1),
    SamplingParams(temperature=1.5, top_k=5, seed=2),
    SamplingParams(temperature=1.0, top_p=0.5, repetition_penalty=1.4, seed=3, logprobs=2),
    SamplingParams(temperature=1.0, min_p=0.2, frequency_penalty=0.7, logit_bias={3: 4.0, 9: -100}, seed=4),
]
PROMPTS = [[1, 2], [3], [4, 4], [5, 6, 7], [8]]


def test_a_request_draws_the_same_alone_and_in_any_batch():
    for step in range(30):
        logits = draw_logits(5, seed=step)
        alone = []
        for i in range(5):
            sampler = Sampler.of([MIX[i]], [i], [PROMPTS[i]], V, "cpu")
            alone += sampler.draw(logits[i : i + 1], [0], [10 + step]).tokens
        together = Sampler.of(MIX, range(5), PROMPTS, V, "cpu")
        assert together.draw(logits, range(5), [10 + step] * 5).tokens == alone
        some = Sampler.of(MIX, range(5), PROMPTS, V, "cpu").draw(logits[[4, 2]], [4, 2], [10 + step] * 2)
        assert some.tokens == [alone[4], alone[2]]


def test_all_of_the_distribution_is_all_of_it_beside_a_neighbour_that_cuts(monkeypatch):
    """In float32 the sum of the first of 20,000 odds reaches 1 long before the last."""
    logits = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(1)) * 3
    cut = cut_tail(logits, column(20_000, 20_000), column(1.0, 0.9), column(0.0, 0.0))
    assert cut[0].isfinite().all() and not cut[1].isfinite().all()
    rarest = int(logits[0].argmin())
    luck = torch.zeros(20_000).index_fill(0, torch.tensor([rarest]), 100.0)
    monkeypatch.setattr("phase3_core_inference.project8_kv_cache.drawing.gumbel", lambda keys, tokens: luck[tokens])
    params = [SamplingParams(top_p=1.0), SamplingParams(top_p=0.9)]
    for n in (1, 2):  # alone and beside
        sampler = Sampler.of(params[:n], range(n), [[1]] * n, 20_000, "cpu")
        assert sampler.draw(logits[:n], range(n), [0] * n).tokens[0] == rarest


CUTS = [
    SamplingParams(top_k=5), SamplingParams(top_k=300), SamplingParams(top_p=0.9), SamplingParams(top_p=0.9, top_k=30),
    SamplingParams(min_p=0.02), SamplingParams(top_p=0.3, min_p=0.001), SamplingParams(top_k=9, top_p=0.999),
    SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(temperature=3.0, top_p=0.97),
]  # fmt: skip


@pytest.mark.parametrize("step", [None, 0.5])
def test_the_likeliest_tokens_are_enough_or_all_are_looked_at(monkeypatch, step):
    """The same draws whether candidates are looked at first or not, also where many logits are equal."""
    generator, size, n = torch.Generator().manual_seed(5), 2000, len(CUTS)
    for position in range(20):
        logits = torch.randn(n, size, generator=generator) * 2
        logits = (logits / step).round() * step if step else logits
        rounds = []

        def among(n, *arguments, rounds=rounds):
            rounds.append((n, draw_among(n, *arguments)))
            return rounds[-1][1]

        sampler, drawn = Sampler.of(CUTS, range(n), [[1]] * n, size, "cpu", among), []
        for candidates in (64, size):
            monkeypatch.setattr("phase3_core_inference.project8_kv_cache.sampling.CANDIDATES", candidates)
            drawn.append(sampler.draw(logits, range(n), [position] * n).tokens)
        assert drawn[0] == drawn[1]
        (first, some), (rest, others), _ = rounds
        settled = (some >= 0).tolist()
        assert (first, rest, len(others)) == (64, size, settled.count(False))
        assert not settled[1] and not settled[8], "300 tokens, or all, are more than 64"
        if not step:
            assert all(settled[i] for i in (0, 3, 6, 7)), "these leave fewer than 64"


def test_equals_of_the_kth_beyond_the_candidates_are_looked_for():
    """1,999 tokens are as likely as the 1,024th: the nucleus is measured among all of them."""
    logits = torch.zeros(200, 2000)
    logits[:, 700] = torch.tensor(1500.0).log()
    sampler = Sampler.of([SamplingParams(top_k=1024, top_p=0.5)] * 200, range(200), [[1]] * 200, 2000, "cpu")
    drawn = sampler.draw(logits, range(200), [5] * 200).tokens
    assert 150 < drawn.count(700) < 200  # 1500 of 1749.5, which the nucleus keeps of 3499


def test_a_tokenizer_may_know_more_tokens_than_the_model():
    from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
    from phase3_core_inference.project8_kv_cache.generation import generate

    model = Transformer(PRESETS["cpu-tiny"](vocab_size=64)).eval()
    for params in (SamplingParams(4), SamplingParams(4, top_p=0.9, repetition_penalty=1.2, seed=1)):
        assert max(generate(model, NumberTokenizer(70), [1, 2], params).tokens) < 64


def test_recorded_draws_fill_up_rows_and_draw_the_same():
    draws = RecordedDraws()
    for n in (1, 2, 3, 5):
        params = MIX[:n]
        samplers = [Sampler.of(params, range(n), PROMPTS, V, "cpu", among) for among in (draw_among, draws)]
        ours, theirs = (s.draw(draw_logits(n), range(n), range(n)).tokens for s in samplers)
        assert ours == theirs
    # A lone greedy request draws nothing, and rows that cut are drawn from all 50 without a record.
    assert list(draws._recorded) == [(V, False, 2, V)]
    logits = torch.randn(3, 1500, generator=torch.Generator().manual_seed(1)) * 4
    samplers = [Sampler.of(MIX[1:4], range(3), PROMPTS, 1500, "cpu", among) for among in (draw_among, draws)]
    ours, theirs = (s.draw(logits, range(3), range(3)).tokens for s in samplers)
    assert ours == theirs and (1024, True, 4, 1500) in draws._recorded


def test_greedy_rows_stay_greedy_in_a_batch_that_draws():
    logits = draw_logits(5)
    assert Sampler.of(MIX, range(5), PROMPTS, V, "cpu").draw(logits, range(5), [3] * 5).tokens[0] == int(
        logits[0].argmax()
    )


def test_padding_of_the_vocabulary_is_never_drawn():
    logits = torch.zeros(1, V + 14)
    logits[:, V:] = 50.0
    for temperature in (0.0, 1.0):
        sampler = Sampler.of([SamplingParams(temperature=temperature)], [0], [[1]], V, "cpu")
        assert all(sampler.draw(logits, [0], [p]).tokens[0] < V for p in range(20))


def test_what_was_drawn_is_penalized_from_then_on():
    logits = torch.zeros(1, V)
    logits[0, 7], logits[0, 8] = 2.0, 1.9
    sampler = Sampler.of([SamplingParams(temperature=0.0, repetition_penalty=1.2)], [0], [[1]], V, "cpu")
    assert [sampler.draw(logits, [0], [p]).tokens[0] for p in range(3)] == [7, 8, 7]
    prompted = Sampler.of([SamplingParams(temperature=0.0, repetition_penalty=1.2)], [0], [[7]], V, "cpu")
    assert prompted.draw(logits, [0], [0]).tokens == [8]


def test_penalties_and_biases_are_those_of_the_formula():
    """Greedy texts against the formula, counted in Python: the prompt counts for repetition alone."""
    params = [
        SamplingParams(temperature=0.0, presence_penalty=0.6),
        SamplingParams(temperature=0.0, frequency_penalty=0.4),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, presence_penalty=-0.2, frequency_penalty=0.3),
        SamplingParams(temperature=0.0, frequency_penalty=0.2, logit_bias={4: 1.5, 11: -100.0}),
        SamplingParams(temperature=0.0),
    ]
    sampler = Sampler.of(params, range(5), PROMPTS, V, "cpu")
    logits, texts = draw_logits(5), [[] for _ in params]
    for step in range(40):
        expected = []
        for row, (own, prompt, text) in enumerate(zip(params, PROMPTS, texts)):
            moved = logits[row].tolist()
            for token in range(V):
                if token in prompt or token in text:
                    factor = own.repetition_penalty
                    moved[token] = moved[token] / factor if moved[token] > 0 else moved[token] * factor
                times = text.count(token)
                moved[token] -= own.presence_penalty * (times > 0) + own.frequency_penalty * times
                moved[token] += (own.logit_bias or {}).get(token, 0.0)
            expected.append(max(range(V), key=moved.__getitem__))
        drawn = sampler.draw(logits, range(5), [step] * 5).tokens
        assert drawn == expected
        for text, token in zip(texts, drawn):
            text.append(token)
    assert len(set(texts[1])) > 5 and len(set(texts[4])) == 1 and 11 not in texts[3]


def test_a_row_that_another_request_gets_forgets_what_was_counted():
    sampler = Sampler(2, V, "cpu")
    sampler.put(0, SamplingParams(temperature=0.0, frequency_penalty=2.0, logit_bias={3: 50.0}), 1, [1])
    logits = draw_logits(2)
    for step in range(3):
        sampler.draw(logits[:1], [0], [step])
    sampler.put(0, SamplingParams(temperature=0.0), 1, [1])
    assert sampler.draw(logits, [0, 1], [0, 0]).tokens == logits.argmax(-1).tolist()
    sampler.put(0, SamplingParams(temperature=0.0, frequency_penalty=2.0), 1, [], [5, 5, 6])  # a text that comes back
    adjusted = sampler.penalized(logits[:1], [0])
    assert (logits[:1] - adjusted)[0, [5, 6, 7]].tolist() == pytest.approx([4.0, 2.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("wish", [{"presence_penalty": 1.0}, {"repetition_penalty": 1.2}, {"logit_bias": {3: 1.0}}])
def test_steps_cost_nothing_more_once_nobody_asks_for_penalties_any_more(wish):
    sampler, logits = Sampler(2, V, "cpu"), draw_logits(2)
    assert sampler.adjustments.idle and sampler.penalized(logits, [0, 1]) is logits
    sampler.put(1, SamplingParams(**wish), 1, [1])
    assert not sampler.adjustments.idle and sampler.penalized(logits, [0, 1]) is not logits
    sampler.put(0, SamplingParams(), 1, [1])
    assert not sampler.adjustments.idle
    sampler.put(1, SamplingParams(), 1, [1])
    assert sampler.adjustments.idle and sampler.penalized(logits, [0, 1]) is logits


def test_what_a_draft_puts_behind_a_text_counts_as_written():
    sampler = Sampler(1, V, "cpu")
    sampler.put(0, SamplingParams(presence_penalty=0.5, frequency_penalty=1.0), 1, [1], [5])
    logits, none = draw_logits(1).expand(3, V), V
    moved = logits - sampler.penalized(logits, [0] * 3, torch.tensor([[none, none], [5, none], [6, 6]]))
    assert moved[:, 5].tolist() == pytest.approx([1.5, 2.5, 1.5], abs=1e-5)
    assert moved[:, 6].tolist() == pytest.approx([0.0, 0.0, 2.5], abs=1e-5)


def test_logprobs_are_those_of_the_model():
    logits = draw_logits(5)
    exact = logits.log_softmax(-1)
    drawn = Sampler.of(MIX, range(5), PROMPTS, V, "cpu").draw(logits, range(5), [3] * 5)
    assert [own is None for own in drawn.logprobs] == [True, True, True, False, True]
    own = drawn.logprobs[3]
    assert own.chosen == pytest.approx(float(exact[3, drawn.tokens[3]]), abs=1e-6)
    values, ids = exact[3].topk(2)
    assert [token for token, _ in own.top] == ids.tolist()
    assert [value for _, value in own.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = draw_logits(1)
    sampler = Sampler.of([SamplingParams(temperature=1e-30)], [0], [[1]], V, "cpu")
    assert {sampler.draw(logits, [0], [p]).tokens[0] for p in range(20)} == {int(logits.argmax())}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"), ({"top_k": 0}, "top_k=0"), ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"), ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"presence_penalty": 2.1}, "presence_penalty=2.1 must lie between -2 and 2"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty=nan"), ({"logit_bias": {-1: 2.0}}, "{-1: 2.0}"),
        ({"logit_bias": {3: 101}}, "{3: 101}"), ({"logit_bias": {"3": 1}}, "{'3': 1}"),
        ({"stop": ("a", "")}, "empty text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"logprobs": -1}, "logprobs=-1"),
    ],
)  # fmt: skip
def test_values_that_make_no_distribution_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        SamplingParams(**arguments)
    assert SamplingParams(stop="###").stop == ("###",)


def test_a_row_can_be_given_to_another_request():
    logits, others = draw_logits(5), draw_logits(5, seed=1)
    sampler = Sampler.of(MIX, range(5), PROMPTS, V, "cpu")
    sampler.draw(others, range(5), [3] * 5)
    for row in (3, 1):
        sampler.put(row, MIX[4 - row], 70 + row, PROMPTS[4 - row])
    fresh = Sampler.of([MIX[0], MIX[3], MIX[2], MIX[1], MIX[4]], [0, 71, 2, 73, 4],
                       [PROMPTS[i] for i in (0, 3, 2, 1, 4)], V, "cpu")  # fmt: skip
    for row in (0, 2, 4):  # what these drew counts for their penalties
        fresh.adjustments.written[row] = sampler.adjustments.written[row]
    assert sampler.draw(logits, range(5), [9] * 5).tokens == fresh.draw(logits, range(5), [9] * 5).tokens


def test_launching_says_where_candidates_were_not_enough():
    """Flat logits with top-p 0.9: candidates hold half of the odds, so the row is drawn from all, now and later."""
    flat, narrow = torch.zeros(2048), torch.zeros(2048)
    narrow[:3] = 50.0
    logits = torch.stack((flat, narrow))
    sampler = Sampler.of([SamplingParams(top_p=0.9)] * 2, [5, 6], [[1]] * 2, 2048, "cpu")
    first = sampler.launch(logits, [0, 1], [7, 7])
    assert first[0] == -1 and 0 <= first[1] < 3
    chosen = sampler.choose(logits, [0, 1], [7, 7])
    assert chosen[0] >= 0 and chosen[1] == first[1]
    assert sampler.launch(logits, [0, 1], [7, 7]).tolist() == chosen  # from now on from all at once
    sampler.remember([0], torch.tensor([-1]))  # nothing
    sampler.put(0, SamplingParams(top_p=0.9), 5, [1])
    assert sampler.launch(logits, [0, 1], [7, 7])[0] == -1


if __name__ == "__main__":
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for params in (
        SamplingParams(),
        SamplingParams(top_k=2),
        SamplingParams(top_p=0.6),
        SamplingParams(temperature=0.3),
    ):
        sampler = Sampler.of([params], [0], [[0]], 4, "cpu")
        drawn = [sampler.draw(logits, [0], [p]).tokens[0] for p in range(2000)]
        print(params, [drawn.count(i) / 2000 for i in range(4)])
    raise SystemExit(pytest.main([__file__]))
