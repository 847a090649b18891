"""Drafts: worked examples of lookup, and a cache that is always what the text says."""

import pytest
import torch

from common import catalog
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.sliding_cache import SlidingCache
from phase4_advanced_inference.project11_speculative_decoding.drafts import ModelDraft, NGramDraft
from phase4_advanced_inference.project11_speculative_decoding.proposals import Ask

EXAMPLES = [  # text, most, n -> what is proposed
    ([1, 2, 3, 4, 1, 2], 3, 3, [3, 4, 1]),  # 1 2 was followed by 3 4 1
    ([1, 2, 3, 9, 2, 3, 4, 1, 2, 3], 2, 3, [9, 2]),  # 1 2 3 is longer than 2 3
    ([1, 2, 3, 9, 2, 3, 4, 1, 2, 3], 2, 2, [4, 1]),  # of two places of 2 3 the newer
    ([5, 6, 5, 6], 5, 3, [5, 6, 5, 6, 5]),  # a copy that goes on into itself
    ([8, 8], 3, 3, [8, 8, 8]),
    ([1, 2, 3], 4, 3, []),  # nothing occurred before
    ([7], 4, 3, []),
    ([1, 2, 1], 0, 3, []),  # nothing was asked for
]  # fmt: skip


@pytest.mark.parametrize(("text", "most", "n", "expected"), EXAMPLES)
def test_lookup_by_hand(text, most, n, expected):
    draft = NGramDraft(n)
    draft.prepare(1, 64, 100)
    proposal = draft.propose([Ask(0, text, most)], None)
    assert proposal.tokens == [expected] and proposal.odds is None


def test_a_growing_text_is_looked_up_as_a_new_one_is():
    text = torch.randint(0, 6, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    grown = NGramDraft(3)
    grown.prepare(2, 200, 6)
    for n in range(1, 200, 3):
        fresh = NGramDraft(3)
        fresh.prepare(2, 200, 6)
        other = list(reversed(text))[:n]
        asks = [Ask(1, text[:n], 4), Ask(0, other, 4)]
        assert grown.propose(asks, None).tokens == fresh.propose(asks, None).tokens


def test_a_row_that_gets_another_text():
    draft = NGramDraft(2)
    draft.prepare(1, 64, 100)
    assert draft.propose([Ask(0, [1, 2, 3, 1, 2], 1)], None).tokens == [[3]]
    assert draft.propose([Ask(0, [4, 2, 5, 1, 2], 1)], None).tokens == [[5]]  # though nobody said so
    draft.free(0)
    assert draft.propose([Ask(0, [1], 1)], None).tokens == [[]]


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="n=0"):
        NGramDraft(0)
    with pytest.raises(ValueError, match="shortest=3"):
        NGramDraft(2, shortest=3)


def model_of(**fields):
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "block_size": 96, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_ff": 48}
    model = Transformer(PRESETS["llama-7b"](**shape | fields)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.25)
    return model


def likeliest(logits, rows, positions, drafted):
    """The likeliest tokens, and the odds that they were chosen from."""
    return logits.argmax(-1), logits.softmax(-1)


def greedy_text(model, tokens, n):
    """n tokens by whole forwards."""
    tokens = list(tokens)
    for _ in range(n):
        tokens.append(int(model(torch.tensor(tokens))[-1].argmax()))
    return tokens[-n:]


@pytest.mark.parametrize("options", [{}, {"cache": "sliding"}, {"graphs": True}, {"chunk": 2}])
def test_a_draft_is_that_of_its_model_whatever_was_rejected(options):
    model, generator = model_of(windows=(9, None)), torch.Generator().manual_seed(1)
    draft = ModelDraft(model, **options)
    draft.prepare(3, 96, 61)
    texts = [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (1, 5, 20)]
    for turn in range(12):
        fresh = ModelDraft(model)
        fresh.prepare(3, 96, 61)
        asks = [Ask(row, text, 4) for row, text in enumerate(texts)]
        asks = asks if turn % 3 else asks[1:]
        proposal, again = (who.propose(asks, likeliest) for who in (draft, fresh))
        assert proposal.tokens == again.tokens
        torch.testing.assert_close(proposal.odds, again.odds, atol=1e-5, rtol=1e-4)
        if turn < 3:
            assert proposal.tokens == [greedy_text(model, ask.tokens, 4) for ask in asks]
        for ask, drafted in zip(asks, proposal.tokens):
            kept = (turn + ask.row) % 5  # none, some, all
            texts[ask.row] += [*drafted[:kept], (drafted[min(kept, 3)] + 1) % 61]


def test_steps_have_few_shapes():
    """After a draft that was kept whole two tokens are missing, else one: all rows read equally many."""
    draft = ModelDraft(model_of())
    draft.prepare(2, 96, 61)
    texts = [[1, 2, 3], [4, 5, 6, 7]]
    first = draft.propose([Ask(row, text, 3) for row, text in enumerate(texts)], likeliest).tokens
    works, step = [], draft.decoder.step
    draft.decoder.step = lambda work, tokens: works.append(list(work)) or step(work, tokens)
    texts = [texts[0] + first[0] + [9], texts[1] + [8]]  # one kept whole, one rejected at once
    draft.propose([Ask(row, text, 3) for row, text in enumerate(texts)], likeliest)
    assert works == [[(0, 2, 2), (1, 2, 2)], [(0, 1, 1), (1, 1, 1)], [(0, 1, 1), (1, 1, 1)]]
    assert draft.cache.lengths == [len(text) + 2 for text in texts]


def test_a_ring_that_cannot_go_back_reads_again():
    model = model_of(windows=(5, 5))
    draft = ModelDraft(model, cache=lambda *arguments, **options: SlidingCache(*arguments, chunk=3, **options))
    draft.prepare(1, 96, 61)
    text = list(range(40))
    draft.propose([Ask(0, text, 2)], likeliest)
    back = [*text[:20], 60]
    assert draft.propose([Ask(0, back, 2)], likeliest).tokens == [greedy_text(model, back, 2)]


@pytest.mark.parametrize("options", [{}, {"cache": "sliding"}, {"graphs": True}])
@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_a_draft_that_failed_half_way_goes_on_from_its_text(options, fails_at):
    """What was read for the failed draft lies in the cache, and is no part of the text."""
    model, text = model_of(windows=(9, None)), torch.randint(0, 61, (30,)).tolist()
    draft = ModelDraft(model, **options)
    draft.prepare(2, 96, 61)

    def failing(logits, rows, positions, drafted):
        return likeliest(logits, rows, positions, drafted if drafted.shape[1] < fails_at else 1 / 0)

    for n in (20, 22, 24):
        with pytest.raises(ZeroDivisionError):
            draft.propose([Ask(0, text[:n], 4), Ask(1, text[:5], 4)], failing)
    asks = [Ask(0, text[:25], 4), Ask(1, text[:5], 4)]
    assert draft.propose(asks, likeliest).tokens == [greedy_text(model, ask.tokens, 4) for ask in asks]
    assert draft.cache.lengths[:2] == [28, 8]


def test_rows_that_want_less_and_texts_that_are_too_long():
    model = model_of(block_size=24)
    draft = ModelDraft(model)
    draft.prepare(4, 96, 61)
    asks = [Ask(0, [1, 2], 3), Ask(1, [3], 0), Ask(2, list(range(23)), 4), Ask(3, list(range(40)), 4)]
    proposal = draft.propose(asks, likeliest)
    assert [len(tokens) for tokens in proposal.tokens] == [3, 0, 2, 0]
    assert proposal.odds.shape == (4, 3, 61)
    assert proposal.odds.sum(-1).tolist() == [
        pytest.approx([1, 1, 1]), [0, 0, 0], pytest.approx([1, 1, 0]), [0, 0, 0],
    ]  # fmt: skip
    assert draft.propose([asks[1], asks[3]], likeliest).tokens == [[], []]


def test_drafts_have_names():
    assert catalog.resolve("drafts", "ngram") is NGramDraft and catalog.resolve("drafts", "model") is ModelDraft
    with pytest.raises(ValueError, match="chunk=0"):
        ModelDraft(model_of(), chunk=0)


if __name__ == "__main__":
    for text, _most, _n, expected in EXAMPLES:
        print(text, "->", expected)
    raise SystemExit(pytest.main([__file__]))
