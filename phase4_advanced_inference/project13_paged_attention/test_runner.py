"""The engine core: random requests that come, fork and are called off, memory that ends, and the traps on the way."""

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache import sampling
from phase3_core_inference.project8_kv_cache.constraints import bits_of
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation
from phase4_advanced_inference.project13_paged_attention.runner import Runner

V, LONG, PAGE = 61, 64, 4


def make(vocab_size=V):
    """A model whose attention matters: larger weights than at the beginning of training."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "block_size": LONG, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_kv_head": 2}
    model = Transformer(PRESETS["llama-7b"](**sizes, n_ff=48)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


MODEL, TOKENIZER = make(), NumberTokenizer(V)
BLOCK = bytes_per_token(MODEL.specs, torch.float32) * PAGE
GREEDY = SamplingParams(12, 0.0, stop_ids=())
_known = {}


def alone(prompt, params):
    """What project 8 writes for one request."""
    key = (tuple(prompt), params)
    if key not in _known:
        _known[key] = generate(MODEL, TOKENIZER, list(prompt), params).tokens
    return _known[key]


def runner_of(blocks=None, n_rows=3, **options):
    """A small runner, its memory counted in blocks."""
    options = {"max_tokens": 8, "page": PAGE} | options
    return Runner(MODEL, TOKENIZER, n_rows, LONG, memory=blocks and blocks * BLOCK, **options)


def drain(runner, limit=2000):
    """Take steps until all is done: the tokens of each request by its number."""
    texts = {}
    for _ in range(limit):
        if not runner.busy:
            return texts
        for piece in runner.step():
            if piece.token is not None:
                texts.setdefault(piece.index, []).append(piece.token)
    raise AssertionError("the runner does not come to an end")


def check_books(runner):
    """Every block has as many references as owners; what the tree has is marked; lengths fit the blocks."""
    cache, blocks = runner.cache, runner.blocks
    owners = [0] * cache.allocator.n_blocks
    for row in range(len(cache.lengths)):
        for block in cache.blocks(row):
            owners[block] += 1
        assert cache.lengths[row] <= cache.n_held[row] * cache.page
    in_tree = [block for _, span in blocks.tree.spans() for block in span.blocks] if blocks.tree else []
    assert len(set(in_tree)) == len(in_tree)
    assert sorted(in_tree) == blocks.in_tree.nonzero()[0].tolist()
    for block in in_tree:
        owners[block] += 1
    assert owners == cache.allocator.counts.tolist()
    assert cache.allocator.n_free == owners.count(0)
    running = {request.row for request in runner.scheduler.running}
    assert len(running) == len(runner.scheduler.running) and None not in running
    assert all(cache.n_held[row] == 0 for row in range(len(cache.lengths)) if row not in running)


def all_free(runner):
    """Whether nothing is left when the tree is emptied."""
    runner.blocks.clear()
    check_books(runner)
    return runner.cache.allocator.n_free == runner.cache.allocator.n_blocks


# -- anything, in any order


class Machine(RuleBasedStateMachine):
    """Requests with shared beginnings over too little memory."""

    def __init__(self):
        super().__init__()
        self.runner, self.requests, self.texts, self.gone = None, {}, {}, set()

    @precondition(lambda self: self.runner is None)
    @rule(blocks=st.integers(6, 14), share=st.booleans(), swap=st.booleans(),
          mode=st.sampled_from(("plain", "ahead", "speculation", "recorded")), budget=st.integers(3, 20))  # fmt: skip
    def begin(self, blocks, share, swap, mode, budget):
        speculation = Speculation(k=2, rule="coupled") if mode == "speculation" else None
        self.runner = runner_of(blocks, share=share, swap_bytes=swap * 2**20, speculation=speculation,
                                ahead=mode in ("ahead", "recorded"), graphs=mode == "recorded",
                                max_tokens=budget)  # fmt: skip

    @precondition(lambda self: self.runner is not None)
    @rule(seed=st.integers(0, 7), n=st.integers(1, 14), new=st.integers(1, 8), priority=st.integers(0, 1),
          sampled=st.booleans())  # fmt: skip
    def add(self, seed, n, new, priority, sampled):
        beginning = random.Random(seed % 3)  # of three families
        prompt = [beginning.randrange(V) for _ in range(n)] + [seed]
        params = SamplingParams(new, 0.9 if sampled else 0.0, stop_ids=(5,), seed=seed)
        request = self.runner.add(prompt, params, priority, user=f"user {seed % 2}")
        self.requests[request.index] = (request, prompt, params)

    @precondition(lambda self: self.runner is not None)
    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            for piece in self.runner.step():
                assert piece.index not in self.gone
                if piece.token is not None:
                    self.texts.setdefault(piece.index, []).append(piece.token)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 100))
    def abort(self, which):
        number = sorted(self.requests)[which % len(self.requests)]
        request = self.requests[number][0]
        if request.finish_reason is None:
            self.gone.add(number)
        self.runner.abort(request)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 100), seed=st.integers(0, 3))
    def fork(self, which, seed):
        request = self.requests[sorted(self.requests)[which % len(self.requests)]][0]
        if len(request.tokens) < self.runner.room and request.finish_reason is None:
            params = SamplingParams(3, 0.9, stop_ids=(5,), seed=seed)
            prompt = list(request.tokens)
            other = self.runner.fork(request, params)
            self.requests[other.index] = (other, prompt, params)

    @invariant()
    def books_are_right(self):
        if self.runner is not None:
            check_books(self.runner)

    def teardown(self):
        if self.runner is None:
            return
        for number, tokens in drain(self.runner).items():
            self.texts.setdefault(number, []).extend(tokens)
        for number, (request, prompt, params) in self.requests.items():
            whole, text = alone(prompt, params)[: self.runner.room - len(prompt)], self.texts.get(number, [])
            assert text == (whole[: len(text)] if number in self.gone else whole)
            assert request.row is None and request.finish_reason
        assert all_free(self.runner)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


# -- the known traps


@pytest.mark.parametrize("ahead", [False, True])
def test_a_beginning_whose_blocks_were_used_again_is_not_found(ahead):
    rng = random.Random(1)
    prompts = [[rng.randrange(V) for _ in range(24)] for _ in range(6)]
    runner = runner_of(10, n_rows=1, ahead=ahead)  # 40 tokens: each text drives the one before it out
    for prompt in [*prompts, *prompts, [*prompts[0][:16], 3, 4]]:
        request = runner.add(prompt, GREEDY)
        assert drain(runner)[request.index] == alone(prompt, GREEDY)
        check_books(runner)
    assert runner.blocks.tree.statistics.evicted > 0


def test_a_prompt_that_is_known_whole_is_read_by_a_token_at_least():
    runner, prompt = runner_of(), list(range(16))
    first, again = (drain_one(runner, prompt) for _ in range(2))
    assert first == again == alone(prompt, GREEDY)
    assert runner.blocks.tree.statistics.found == 12  # of 16 tokens three blocks: the last block holds the last token


def drain_one(runner, prompt, params=GREEDY):
    """The text of one request."""
    number = runner.add(prompt, params).index
    return drain(runner)[number]


@pytest.mark.parametrize("swap", [0, 2**20])
@pytest.mark.parametrize("ahead", [False, True])
def test_preemption_in_the_middle_of_a_prompt(ahead, swap):
    long, short = list(range(40)), [7, 8]
    runner = runner_of(16, n_rows=2, ahead=ahead, max_tokens=4, swap_bytes=swap, share=False)
    request = runner.add(long, GREEDY)
    for _ in range(4):
        runner.step()
    assert request.reading and request.fed == 16
    urgent = [runner.add(short, GREEDY, priority=1) for _ in range(2)]  # both rows
    runner.step()
    assert request.row is None and (request.fed == 16 if swap else request.fed == 0)
    drain(runner)
    assert request.tokens[40:] == alone(long, GREEDY)
    assert all(each.tokens[2:] == alone(short, GREEDY) for each in urgent)
    assert runner.scheduler.n_preempted and bool(swap) == bool(runner.blocks.n_swapped) and all_free(runner)


def test_a_prompt_longer_than_the_cache_is_refused_and_one_that_fills_it_is_not():
    runner = runner_of(6)  # 24 tokens
    fine = runner.add([1, 2, 3], GREEDY)
    with pytest.raises(ValueError, match="leaves no room"):
        runner.add(list(range(24)), GREEDY)
    full = runner.add(list(range(23)), GREEDY)  # room for one token more
    texts = drain(runner)
    assert texts[fine.index] == alone([1, 2, 3], GREEDY)
    assert texts[full.index] == alone(range(23), GREEDY)[:1] and full.finish_reason == "length"


def test_equal_prompts_of_one_step_share_blocks_that_are_being_written():
    runner, prompt = runner_of(n_rows=3, max_tokens=64), list(range(18))
    requests = [runner.add(prompt, SamplingParams(6, 0.9, stop_ids=(), seed=i)) for i in range(3)]
    runner.step()
    tables = [runner.cache.blocks(request.row)[:4] for request in requests]
    assert tables[0] == tables[1] == tables[2] and runner.cache.allocator.references(tables[0][0]) == 4  # and the tree
    assert len(runner.last.tokens) == 18 + 2 + 2
    drain(runner)
    assert [request.tokens[18:] for request in requests] == [alone(prompt, request.params) for request in requests]


def test_what_is_called_off_in_flight_says_nothing_more_and_gives_its_row_away():
    runner = runner_of(n_rows=1, ahead=True, max_tokens=64)
    first, second = runner.add([1, 2, 3], GREEDY), runner.add([4, 5, 6], GREEDY)
    runner.step()
    runner.step()
    runner.abort(first)  # a token of it is being drawn, in the row that the next one gets
    assert drain(runner) == {second.index: alone([4, 5, 6], GREEDY)}
    assert first.finish_reason == "abort" and all_free(runner)


def test_an_end_that_is_seen_a_step_late_changes_nothing():
    text = alone([9, 8, 7], GREEDY)
    params = SamplingParams(12, 0.0, stop_ids=(text[4],))
    runner = runner_of(n_rows=1, ahead=True)
    first, second = runner.add([9, 8, 7], params), runner.add([1, 2], GREEDY)
    texts = drain(runner)
    assert texts[first.index] == text[: text.index(text[4])] and first.finish_reason == "stop"
    assert texts[second.index] == alone([1, 2], GREEDY) and all_free(runner)


@pytest.mark.parametrize("ahead", [False, True])
def test_candidates_that_are_not_enough_are_drawn_again(monkeypatch, ahead):
    params = [SamplingParams(14, 2.0, top_p=0.99, stop_ids=(), seed=i, logprobs=1) for i in range(4)]
    prompts = [[i, 2 * i] for i in range(4)]
    want = [generate(MODEL, TOKENIZER, *each) for each in zip(prompts, params)]
    monkeypatch.setattr(sampling, "CANDIDATES", 16)
    runner = runner_of(n_rows=2, ahead=ahead)
    found = runner.generate(prompts, params)
    assert [text.tokens for text in found] == [text.tokens for text in want]
    for ours, theirs in zip(found, want):
        assert [each.top[0][0] for each in ours.logprobs] == [each.top[0][0] for each in theirs.logprobs]
        assert [each.chosen for each in ours.logprobs] == pytest.approx([e.chosen for e in theirs.logprobs], abs=1e-4)
    assert all_free(runner)


@pytest.mark.parametrize("options", [{}, {"ahead": True}, {"speculation": True}])
def test_a_step_that_fails_leaves_an_empty_runner_that_can_be_used(monkeypatch, options):
    if "speculation" in options:
        options = {"speculation": Speculation(k=2, rule="coupled")}
    runner, prompt = runner_of(**options), list(range(20))
    request = runner.add(prompt, GREEDY)
    for _ in range(2):
        runner.step()
    broken = runner.decoder.model.forward
    monkeypatch.setattr(runner.decoder.model, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drain(runner)
    assert request.finish_reason == "abort" and not runner.busy
    assert runner.cache.allocator.n_free == runner.cache.allocator.n_blocks  # no beginning that was never written
    monkeypatch.setattr(runner.decoder.model, "forward", broken)
    assert drain_one(runner, prompt) == alone(prompt, GREEDY)


# -- the rest


def test_a_fork_goes_on_from_the_same_blocks():
    runner, prompt = runner_of(n_rows=3, max_tokens=64), list(range(21))
    request = runner.add(prompt, GREEDY)
    for _ in range(4):
        runner.step()
    said = list(request.tokens)
    params = SamplingParams(5, 0.9, stop_ids=(), seed=3)
    other = runner.fork(request, params)
    assert runner.cache.blocks(other.row) == runner.cache.blocks(request.row)
    texts = drain(runner)
    assert request.tokens[21:] == alone(prompt, GREEDY) and texts[other.index] == alone(said, params)
    assert all_free(runner)


def test_a_space_goes_with_requests_and_their_forks():
    runner, prompt = runner_of(n_rows=4, max_tokens=64), list(range(21))
    requests = [runner.add(prompt, GREEDY, space=space) for space in (1, 2, 1)]
    runner.step()
    assert [request.found for request in requests] == [0, 0, 20] and len(runner.last.tokens) == 21 + 21 + 1
    runner.step()
    forks = [runner.fork(request, GREEDY) for request in requests]  # one has a row, two are queued
    said = [list(fork.tokens) for fork in forks]
    texts = drain(runner)
    assert [fork.space for fork in forks] == [1, 2, 1]
    assert [texts[fork.index] for fork in forks] == [alone(each, GREEDY) for each in said]
    assert {key >> 32 for tokens, _ in runner.blocks.tree.spans() for key in tokens} == {1, 2}
    late = runner.add(prompt, GREEDY)
    drain(runner)
    assert late.found == 0 and late.tokens[21:] == alone(prompt, GREEDY) and all_free(runner)


def test_swapping_keeps_to_its_memory_and_gives_it_back():
    runner = runner_of(12, n_rows=2, swap_bytes=6 * BLOCK, share=False, max_tokens=64)
    victims = [runner.add(list(range(n, n + 18)), GREEDY) for n in (0, 20)]  # five blocks each
    runner.step()
    urgent = [runner.add([1, 2], GREEDY, priority=1) for _ in range(2)]
    runner.step()
    assert [victim.kept is not None for victim in victims].count(True) == 1  # there was room for one
    kept = next(victim for victim in victims if victim.kept is not None)
    assert kept.kept.nbytes <= 6 * BLOCK
    runner.abort(kept)
    assert kept.kept is None
    drain(runner)
    other = next(victim for victim in victims if victim is not kept)
    assert other.tokens[18:] == alone(other.tokens[:18], GREEDY)
    assert all(each.tokens[2:] == alone([1, 2], GREEDY) for each in urgent) and all_free(runner)


class _Stairs:
    """Up by one, two or three from the last token, modulo V; at most nine steps."""

    def __init__(self):
        self.last, self.n, self.finished = 0, 0, False

    def allowed(self):
        """The three next ones."""
        return bits_of([(self.last + i) % V for i in (1, 2, 3)], V)

    def accept(self, token):
        """One step."""
        assert (token - self.last) % V in (1, 2, 3)
        self.last, self.n = token, self.n + 1
        self.finished = self.n == 9


@pytest.mark.parametrize("options", [{"ahead": True}, {"ahead": False}, {"speculation": True}])
@pytest.mark.parametrize("blocks", [None, 9])
def test_constrained_texts_beside_free_ones(options, blocks):
    """What may come next depends on the newest token: who is bound waits for it; all texts are those of `generate`."""
    if "speculation" in options:
        options = {"speculation": Speculation(k=3, rule="coupled")}
    runner = runner_of(blocks, n_rows=4, **options)
    bound = {1: {"constraint": _Stairs}, 0: {}}
    params = [SamplingParams(14, top_k=(None, 20)[i % 3 > 1], seed=i, stop_ids=(), **bound[i % 2]) for i in range(10)]
    prompts = [[i, i + 1, i] * (1 + i % 4) for i in range(10)]
    requests = [runner.add(*each) for each in zip(prompts, params)]
    texts = drain(runner)
    for request, prompt, own in zip(requests, prompts, params):
        assert texts[request.index] == alone(prompt, own)
        assert len(texts[request.index]) == (9 if own.constraint else 14)
    assert blocks is None or runner.scheduler.n_preempted > 0
    assert all_free(runner)


def test_a_fork_of_a_constrained_text_goes_on_in_its_state():
    runner = runner_of(ahead=False)
    request = runner.add([1, 2, 3], SamplingParams(20, seed=1, stop_ids=(), constraint=_Stairs))
    for _ in range(5):
        runner.step()
    written = request.tokens[3:]
    assert 0 < len(written) < 9
    other = runner.fork(request, SamplingParams(20, seed=2, stop_ids=(), constraint=_Stairs))
    texts = drain(runner)
    assert len(written) + len(texts[other.index]) == 9  # it asserts its steps itself


def test_warming_up_leaves_nothing_behind():
    runner = runner_of(n_rows=3, graphs=True, max_tokens=64)
    runner.warm_up()
    assert runner.cache.allocator.n_free == runner.cache.allocator.n_blocks and runner.cache.lengths == [0, 0, 0]
    runner.add([1], GREEDY)
    with pytest.raises(ValueError, match="before the first"):
        runner.warm_up()
    assert drain(runner)[0] == alone([1], GREEDY)


def test_memory_below_a_block_is_refused():
    with pytest.raises(ValueError, match="at least one block"):
        Runner(MODEL, TOKENIZER, memory=BLOCK - 1, page=PAGE)


if __name__ == "__main__":
    test_equal_prompts_of_one_step_share_blocks_that_are_being_written()
    test_a_fork_goes_on_from_the_same_blocks()
    print("equal prompts of one step share blocks, a fork shares all of them until it writes")
    raise SystemExit(pytest.main([__file__]))
