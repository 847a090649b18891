"""The Runner with drafts, forks, failures: whatever is drafted, cut, preempted or drawn again, texts stay the same."""

import copy
import functools
import random

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache import sampling
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token
from phase4_advanced_inference.project11_speculative_decoding.drafts import ModelDraft, NGramDraft
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation
from phase4_advanced_inference.project13_paged_attention.runner import Runner

V, LONG, PAGE = 61, 64, 4
TOKENIZER = NumberTokenizer(V)


def make():
    """A model whose attention matters: larger weights than at the beginning of training."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "block_size": LONG, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_kv_head": 2}
    model = Transformer(PRESETS["llama-7b"](**sizes, n_ff=48)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


def nearly(model):
    """A draft that often agrees: the same weights, shaken."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for parameter in draft.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return draft


MODEL = make()
SIMILAR = nearly(MODEL)
BLOCK = bytes_per_token(MODEL.specs, torch.float32) * PAGE
DRAFTS = {"ngram": NGramDraft, "model": lambda: ModelDraft(SIMILAR), "itself": lambda: ModelDraft(copy.deepcopy(MODEL))}
GREEDY = SamplingParams(12, 0.0, stop_ids=())


def crowd(n=8, greedy=False):
    """Prompts of three families, greedy and sampled, some of which end by a stop id."""
    rng, prompts, params = random.Random(3), [], []
    family = [[rng.randrange(V) for _ in range(20)] for _ in range(3)]
    for i in range(n):
        prompts.append(family[i % 3][: rng.randint(1, 20)] + [i] * rng.randint(1, 6))
        options = {"temperature": 0.0} if greedy or i % 3 == 0 else {"top_p": 0.9, "repetition_penalty": 1.2}
        params.append(SamplingParams(rng.randint(1, 24), stop_ids=(5, 7), seed=i, **options))
    return prompts, params


def alone(prompts, params):
    """What project 8 writes for each by itself."""
    return [_alone(tuple(prompt), each) for prompt, each in zip(prompts, params)]


@functools.cache
def _alone(prompt, params):
    return generate(MODEL, TOKENIZER, list(prompt), params)


def runner_of(blocks=None, n_rows=3, **options):
    """A small runner, its memory counted in blocks."""
    options = {"max_tokens": 8, "page": PAGE} | options
    return Runner(MODEL, TOKENIZER, n_rows, LONG, memory=blocks and blocks * BLOCK, **options)


def drain(runner):
    """Take steps until all is done."""
    for _ in range(2000):
        if not runner.busy:
            return
        runner.step()
    raise AssertionError("the runner does not come to an end")


def tokens_of(texts):
    return [text.tokens for text in texts]


def nothing_is_left(runner):
    """Whether all memory is free once the tree is empty."""
    runner.blocks.clear()
    return runner.cache.allocator.n_free == runner.cache.allocator.n_blocks and not any(runner.cache.lengths)


# -- drafts


@pytest.mark.parametrize("blocks", [None, 12])
@pytest.mark.parametrize("draft", DRAFTS)
def test_the_coupled_rule_writes_what_plain_decoding_writes(draft, blocks):
    """Chunks of prompts beside drafts; budgets that cut them; memory for a text and a bit."""
    (prompts, params), n_preempted = crowd(), 0
    for options in ({"max_tokens": 4}, {"max_tokens": 64, "swap_bytes": 10**6}, {"max_tokens": 9, "share": False}):
        speculation = Speculation(DRAFTS[draft](), k=5, rule="coupled")
        runner = runner_of(blocks, speculation=speculation, **options)
        assert tokens_of(runner.generate(prompts, params)) == tokens_of(alone(prompts, params))
        n_preempted += runner.scheduler.n_preempted
        assert nothing_is_left(runner) and speculation.tally.kept > 0
    assert (n_preempted > 0) == (blocks is not None)


@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_text_by_rejection_is_that_of_plain_decoding(draft):
    prompts, params = crowd(greedy=True)
    runner = runner_of(12, speculation=Speculation(DRAFTS[draft](), k=3), swap_bytes=20 * BLOCK)
    assert tokens_of(runner.generate(prompts, params)) == tokens_of(alone(prompts, params))
    assert runner.scheduler.n_preempted and nothing_is_left(runner)


def test_a_budget_cuts_drafts():
    """Three rows and four tokens a step: one token of a draft is all that fits."""
    prompts, params = [[i, i + 1] for i in range(3)], [GREEDY] * 3
    speculation = Speculation(DRAFTS["itself"](), k=5, rule="coupled")
    runner = runner_of(speculation=speculation, max_tokens=4)
    requests = [runner.add(*each) for each in zip(prompts, params)]
    while runner.busy:
        runner.step()
        assert runner.last is None or sum(n for _, n, _ in runner.last.work) <= 4
        assert all(not request.draft for request in requests)
    assert [request.tokens[2:] for request in requests] == tokens_of(alone(prompts, params))
    assert speculation.tally.kept == speculation.tally.drafted > 0


def test_log_probabilities_beside_drafts():
    prompts, _ = crowd(4)
    params = [SamplingParams(9, 0.0, stop_ids=(), logprobs=2), SamplingParams(9, seed=1, stop_ids=(), logprobs=0),
              SamplingParams(9, seed=2, stop_ids=()), SamplingParams(9, 0.0, stop_ids=(), logprobs=1)]  # fmt: skip
    for options in ({"speculation": Speculation(DRAFTS["model"](), rule="coupled")}, {"ahead": True}, {}):
        texts = runner_of(12, **options).generate(prompts, params)
        for text, other in zip(texts, alone(prompts, params)):
            assert text.tokens == other.tokens and len(text.logprobs) == len(other.logprobs)
            assert [x.chosen for x in text.logprobs] == pytest.approx([x.chosen for x in other.logprobs], abs=1e-4)
            assert [[t for t, _ in x.top] for x in text.logprobs] == [[t for t, _ in x.top] for x in other.logprobs]


def test_a_draft_that_lies_ends_the_step_and_leaves_a_usable_runner():
    draft = NGramDraft()
    runner = runner_of(speculation=Speculation(draft, k=2, rule="coupled"))
    request, propose = runner.add([1, 2, 1, 2], GREEDY), draft.propose
    draft.propose = lambda asks, draw: type(propose(asks, draw)).of([[V]] * len(asks))
    with pytest.raises(ValueError, match="some are no tokens"):
        drain(runner)
    draft.propose = propose
    assert request.finish_reason == "abort" and nothing_is_left(runner)
    assert runner.generate([1, 2, 1, 2], GREEDY).tokens == alone([[1, 2, 1, 2]], [GREEDY])[0].tokens


# -- forks


MODES = {
    "plain": lambda: {},
    "ahead": lambda: {"ahead": True},
    "drafts": lambda: {"speculation": Speculation(DRAFTS["model"](), k=3, rule="coupled")},
    "one row": lambda: {"n_rows": 1},
    "recorded": lambda: {"graphs": True, "ahead": True},
}


@pytest.mark.parametrize("mode", MODES)
def test_forks_at_any_moment_of_a_text(mode):
    """Waiting, read in part, at rest, in flight, ended: a fork goes on from what the text is then."""
    runner, prompt = runner_of(18, **MODES[mode]()), list(range(18))
    request = runner.add(prompt, SamplingParams(20, 0.7, seed=1, stop_ids=()))
    forks = []
    for i in range(14):
        params = SamplingParams(3, 0.0 if i % 2 else 0.9, seed=i, stop_ids=())
        forks.append((list(request.tokens), params, runner.fork(request, params)))
        runner.step()
    drain(runner)
    assert request.tokens[18:] == alone([prompt], [request.params])[0].tokens
    for said, params, fork in forks:
        assert fork.tokens[len(said) :] == alone([said], [params])[0].tokens
    assert nothing_is_left(runner)


def test_a_text_that_fills_its_room_cannot_be_forked():
    runner = runner_of(6)  # 24 tokens
    request = runner.add(list(range(20)), GREEDY)
    drain(runner)
    assert len(request.tokens) == 24
    with pytest.raises(ValueError, match="a prompt of 24 tokens leaves no room to go on"):
        runner.fork(request)
    assert not runner.busy


# -- drawn again, and failed


def test_what_was_drawn_behind_a_missing_token_is_not_penalized(monkeypatch):
    """Ahead of the host, a token is drawn behind one that turns out to be missing; the text never had it."""
    params = [
        SamplingParams(9, 0.4, top_p=0.9, repetition_penalty=1.8, frequency_penalty=0.5, stop_ids=(), seed=i)
        for i in range(40)
    ]
    prompts = [[i % V, 2 * i % 7] for i in range(40)]
    expected = tokens_of(generate(MODEL, TOKENIZER, prompts, params))
    monkeypatch.setattr(sampling, "CANDIDATES", 30)
    runner, again = runner_of(n_rows=20, ahead=True, max_tokens=64), []
    draw_again = runner._draw_again
    runner._draw_again = lambda request: again.append(request) or draw_again(request)
    assert tokens_of(runner.generate(prompts, params)) == expected
    assert len(again) > 20


@pytest.mark.parametrize("broken", ["swap_out", "swap_in"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_copy_to_or_from_the_host_that_fails_leaves_a_usable_runner(monkeypatch, ahead, broken):
    runner = runner_of(16, n_rows=2, swap_bytes=10**6, ahead=ahead)
    requests = [runner.add(list(range(20)), GREEDY) for _ in range(2)]
    for _ in range(6):
        runner.step()
    requests.append(runner.add([1, 2], GREEDY, priority=1))
    with monkeypatch.context() as patch:
        patch.setattr(runner.cache, broken, lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            drain(runner)
    assert all(request.finish_reason for request in requests) and not runner.busy
    assert runner.cache.allocator.n_free == 16 and sorted(runner.blocks._rows) == [0, 1]
    prompts, params = crowd(4)
    assert tokens_of(runner.generate(prompts, params)) == tokens_of(alone(prompts, params))


def test_a_stream_that_is_closed_leaves_nothing_and_others_alone():
    runner = runner_of(12, ahead=True)
    stream = runner.stream([list(range(20)), [1, 2]], [GREEDY] * 2)
    next(stream)
    other = runner.add([4, 5], GREEDY)
    stream.close()
    assert list(runner.scheduler.everyone()) == [other]
    drain(runner)
    assert other.tokens[2:] == alone([[4, 5]], [GREEDY])[0].tokens and nothing_is_left(runner)


if __name__ == "__main__":
    test_a_budget_cuts_drafts()
    print("three rows and four tokens a step: a draft is cut, and the text stays the same")
    raise SystemExit(pytest.main([__file__]))
