"""Losslessness by counting: many draws against exact odds; and what is wrong on purpose must be found out.

Pearson's chi-square over all outcomes; critical values are those of the 0.1% level, seeds are fixed.
"""

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase3_core_inference.project8_kv_cache.noise import noise_keys
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase4_advanced_inference.project11_speculative_decoding import acceptance
from phase4_advanced_inference.project11_speculative_decoding.acceptance import (
    DEAL,
    DRAFT,
    LUCK,
    draw,
    keys_for,
    odds_of,
    residual,
    verify,
)
from phase4_advanced_inference.project11_speculative_decoding.drafts import ModelDraft, NGramDraft
from phase4_advanced_inference.project11_speculative_decoding.formulas import (
    agreement,
    expected_speedup,
    expected_tokens,
    overlap,
)
from phase4_advanced_inference.project11_speculative_decoding.speculative import speculative_generate

V, K, LENGTH, ROWS = 4, 2, 3, 30_000
CRITICAL = {15: 37.70, 63: 103.44}  # 0.1% of chi-squares with so many degrees of freedom lie above


def tiny_model(seed, vocab_size):
    """A Transformer with random weights that has opinions."""
    torch.manual_seed(seed)
    config = PRESETS["cpu-tiny"](vocab_size=vocab_size, n_embd=16, block_size=8)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.5)
    return model


def chains():
    """Two chains over V tokens, (V, V): where the target goes from each token, and where the draft does."""
    generator = torch.Generator().manual_seed(3)
    target = torch.rand(V, V, generator=generator) + 0.05
    draft = 0.5 * target + torch.rand(V, V, generator=generator)
    return target / target.sum(-1, keepdim=True), draft / draft.sum(-1, keepdim=True)


def speculate(p, q, rows=ROWS, k=K, bonus=None):
    """Texts of LENGTH tokens behind token 0, (rows, LENGTH), each of its own seed, by as many checks as it takes."""
    texts, lengths = torch.zeros(rows, LENGTH + k + 1, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    seeds, everyone = range(rows), torch.arange(rows)
    while int(lengths.min()) < LENGTH:
        places = [(lengths + j).tolist() for j in range(k + 1)]
        last, drafts, odds = texts[everyone, lengths], [], []  # texts[:, 0] is token 0
        context = [last]
        for j in range(k):
            odds.append(q[context[-1]])
            drafts.append(draw(odds[-1], keys_for(DRAFT, seeds, places[j], "cpu").unsqueeze(-1)))
            context.append(drafts[-1])
        theirs = torch.stack([p[token] for token in context], dim=1)
        if bonus is not None:
            theirs[:, k] = bonus[context[-1]]
        luck = torch.stack([keys_for(LUCK, seeds, places[j], "cpu") for j in range(k)], dim=1)
        deal = torch.stack([keys_for(DEAL, seeds, places[j], "cpu") for j in range(k + 1)], dim=1)
        drafted = torch.stack(drafts, dim=1)
        kept, own = verify(theirs, torch.stack(odds, dim=1), drafted, torch.full((rows,), k), luck, deal)
        for j in range(k + 1):
            token = torch.where(kept == j, own, drafted[:, min(j, k - 1)])
            at = (lengths + 1 + j).clamp(max=texts.shape[1] - 1)
            write = (j <= kept) & (lengths < LENGTH) & (lengths + 1 + j < texts.shape[1])
            texts[everyone[write], at[write]] = token[write]
        lengths = torch.where(lengths < LENGTH, lengths + kept + 1, lengths)
    return texts[:, 1 : LENGTH + 1]


def exact(p):
    """The odds of every text of LENGTH tokens behind token 0, in the order of `cells`."""
    odds = p[0]
    for _ in range(LENGTH - 1):
        odds = (odds.view(-1, V, 1) * p).flatten()
    return odds


def cells(texts, base=V):
    """How often each text occurred."""
    index = torch.zeros(len(texts), dtype=torch.long)
    for column in texts.T:
        index = index * base + column
    return torch.bincount(index, minlength=base ** texts.shape[1]).double()


def chi_square(counts, odds):
    """Pearson's statistic."""
    expected = odds.double() * counts.sum()
    assert float(expected.min()) >= 5  # below, the statistic is no chi-square
    return float(((counts - expected) ** 2 / expected).sum())


def test_texts_have_the_odds_of_the_target():
    p, q = chains()
    # 64 texts of three tokens: 63 degrees of freedom
    counts = cells(speculate(p, q))
    assert chi_square(counts, exact(p)) < CRITICAL[63]
    assert chi_square(counts, exact(q)) > 10 * CRITICAL[63]  # which are not those of the draft


def test_a_draft_of_one_token_is_no_exception():
    p, q = chains()
    assert chi_square(cells(speculate(p, q, k=1)), exact(p)) < CRITICAL[63]


PLANTED = {
    "all are kept": ("acceptance", lambda p, q, drafts: torch.ones(drafts.shape)),
    "the residual is p": ("residual", lambda p, q: p),
    "the residual is not clamped": ("residual", lambda p, q: (p - q).abs() / (p - q).abs().sum(-1, keepdim=True)),
    "q / p instead of p / q": ("acceptance", lambda p, q, drafts: acceptance_upside_down(p, q, drafts)),
}
_ACCEPTANCE = acceptance.acceptance


def acceptance_upside_down(p, q, drafts):
    """The ratio the other way round."""
    return _ACCEPTANCE(q, p, drafts)


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(name, monkeypatch):
    p, q = chains()
    monkeypatch.setattr(acceptance, *PLANTED[name])
    assert chi_square(cells(speculate(p, q)), exact(p)) > CRITICAL[63]


def test_a_last_token_of_the_draft_is_found():
    p, q = chains()
    assert chi_square(cells(speculate(p, q, k=1, bonus=q)), exact(p)) > CRITICAL[63]


@pytest.mark.parametrize(("rule", "kind"), [("rejection", "model"), ("rejection", "ngram"), ("coupled", "model")])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.4, "top_k": 4, "repetition_penalty": 1.3}])
def test_whole_texts_of_models_have_their_odds(rule, kind, settings):
    """Three tokens by Transformers over 5 tokens, 2,048 texts: against the odds of all 125 texts."""
    target, draft, n = tiny_model(0, vocab_size=5), tiny_model(1, vocab_size=5), 2048
    params = [SamplingParams(3, seed=seed, stop_ids=(), **settings) for seed in range(n)]
    draft, prompt = (ModelDraft(draft), [2, 1]) if kind == "model" else (NGramDraft(), [2, 1, 2, 1, 2])
    texts = speculative_generate(
        target, NumberTokenizer(5), [prompt] * n, params, draft, k=2, rule=rule, n_rows=2048, capacity=8
    )
    counts = cells(torch.tensor([text.tokens for text in texts]), base=5)
    odds = exact_odds(target, prompt, params[0])
    often = odds * n >= 8
    assert int(often.sum()) > 10 and float(odds.sum()) == pytest.approx(1)
    counts, odds = (torch.cat([x[often], x[~often].sum().view(1)]) for x in (counts, odds))  # rare ones are one cell
    if odds[-1] == 0:  # cut off, all of them
        assert counts[-1] == 0
        counts, odds = counts[:-1], odds[:-1]
    assert float(((counts - odds * n) ** 2 / (odds * n)).sum()) < critical(len(odds) - 1)


def critical(df):
    """The 0.1% level of a chi-square with df degrees of freedom (Wilson and Hilferty's approximation)."""
    return df * (1 - 2 / (9 * df) + 3.0902 * (2 / (9 * df)) ** 0.5) ** 3


@torch.no_grad()
def exact_odds(model, prompt, params):
    """The odds of all texts of three tokens, computed without a cache, a draft or noise."""
    found = []
    cuts, limits = params.cuts, torch.tensor([[params.temperature, params.top_k or 5, 1.0, 0.0, 1.0]])

    def odds_behind(tokens):
        logits = model(torch.tensor([tokens]))[0, -1:, :5].double()
        seen = torch.zeros(1, 5, dtype=torch.bool)
        seen[0, tokens] = True
        penalty = params.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        return odds_of(cuts, logits, limits)[0]

    for a, p_a in enumerate(odds_behind(prompt)):
        for b, p_b in enumerate(odds_behind([*prompt, a])):
            found.append(p_a * p_b * odds_behind([*prompt, a, b]))
    return torch.cat(found)


def test_the_level_is_that_of_the_tables():
    assert critical(63) == pytest.approx(CRITICAL[63], rel=5e-3)
    assert critical(15) == pytest.approx(CRITICAL[15], rel=5e-3)


def test_what_rules_keep_is_what_the_formulas_say():
    torch.manual_seed(0)
    p, q = torch.randn(6).softmax(-1), torch.randn(6).softmax(-1)
    n = 200_000
    kept = torch.rand(n) <= acceptance.acceptance(p.expand(n, 6), q.expand(n, 6), q.multinomial(n, True))
    assert float(kept.double().mean()) == pytest.approx(float(overlap(p, q)), abs=5e-3)
    keys = torch.tensor(noise_keys(range(n), [7] * n)).unsqueeze(-1)
    same = draw(p.expand(n, 6), keys) == draw(q.expand(n, 6), keys)
    assert float(same.double().mean()) == pytest.approx(float(agreement(p, q)), abs=5e-3)
    tv = 1 - float(overlap(p, q))
    assert (1 - tv) / (1 + tv) <= float(agreement(p, q)) <= 1 - tv


def test_a_token_that_cannot_win_does_not_count():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert float(overlap(p, q)) == 0.5
    assert float(agreement(p, q)) == pytest.approx(1 / 3)  # 1 / (1 + 1 + 1): the middle one wins both races
    assert float(agreement(p, p)) == pytest.approx(1.0)


def test_the_residual_completes_what_is_kept():
    p, q = (x.double() for x in chains())
    kept = p.minimum(q)
    torch.testing.assert_close(kept + (1 - kept.sum(-1, keepdim=True)) * residual(p, q), p)
    torch.testing.assert_close(residual(p, p), p)  # nothing is left over: any draw will do
    torch.testing.assert_close(residual(p, torch.zeros_like(p)), p)


def test_odds_of_greedy_and_cut_requests():
    logits = torch.tensor([[1.0, 3.0, 2.0]]).expand(3, 3)
    limits = torch.tensor([[1.0, 1, 1.0, 0.0, 0.0], [1.0, 2, 1.0, 0.0, 1.0], [2.0, 3, 1.0, 0.0, 1.0]])
    odds = odds_of(True, logits, limits)
    assert odds[0].tolist() == [0, 1, 0] and odds[1, 0] == 0 and float(odds[1].sum()) == pytest.approx(1)
    torch.testing.assert_close(odds[2], (logits[2] / 2).softmax(-1))
    assert odds_of(True, torch.tensor([[5.0, 5.0, 1.0]]), limits[:1]).tolist() == [[1, 0, 0]]  # one of equals


def test_formulas():
    assert expected_tokens(0.8, 5) == pytest.approx((1 - 0.8**6) / (1 - 0.8))
    assert expected_speedup(0.8, 5, 0.02) == pytest.approx((1 - 0.8**6) / ((1 - 0.8) * 1.1))
    assert expected_speedup(0.8, 5, 0.02, verification=1.5) == pytest.approx((1 - 0.8**6) / ((1 - 0.8) * 1.6))


def test_plain_drawing_passes_the_same_test():
    target, n = tiny_model(0, vocab_size=5), 2048
    params = [SamplingParams(3, seed=seed, stop_ids=()) for seed in range(n)]
    texts = generate(target, NumberTokenizer(5), [[2, 1]] * n, params, n_rows=2048, capacity=8)
    counts, odds = cells(torch.tensor([t.tokens for t in texts])[:, :1], base=5), exact_odds(target, [2, 1], params[0])
    odds = odds.view(5, -1).sum(-1)
    assert float(((counts - odds * n) ** 2 / (odds * n)).sum()) < critical(4)


if __name__ == "__main__":
    chain_p, chain_q = chains()
    print("lossless:", chi_square(cells(speculate(chain_p, chain_q)), exact(chain_p)), "of", CRITICAL[63])
    raise SystemExit(pytest.main([__file__]))
