"""A Runner over a model that sees all it reads: anything in any order, and books that must be right after each step."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from phase1_foundation.project3_pretrain.plans import LayerSpec
from phase3_core_inference.project8_kv_cache import sampling
from phase3_core_inference.project8_kv_cache.generation import SamplingParams
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase3_core_inference.project8_kv_cache.sampling import Sampler
from phase4_advanced_inference.project11_speculative_decoding.proposals import Proposal
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation
from phase4_advanced_inference.project13_paged_attention.runner import Runner

V, LONG = 40, 48
TOKENIZER = NumberTokenizer(V)
SPEC = LayerSpec(n_head=1, n_kv_head=1, head_size=2, value_size=1, window=None, scale=1.0, block_size=LONG)
LOGITS = 2 * torch.randn(997, V, generator=torch.Generator().manual_seed(0))


# -- a model whose keys are tokens and places, and whose logits depend on all of them


def codes(tokens):
    """A number for each beginning of a text."""
    code, found = 1, []
    for token in tokens:
        code = (code * 31 + int(token) + 7) % 997
        found.append(code)
    return found


class Broken(RuntimeError):
    """What a step that fails raises here."""


class Reader(torch.nn.Module):
    """Writes what it is given into the cache, reads each row back from its first token on, and checks the places."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config, self.specs = SimpleNamespace(vocab_size=V, block_size=LONG), [SPEC]
        self.broken = False

    def forward(self, tokens, plan):
        if self.broken:
            raise Broken
        store, begins = plan.stores[0], plan.begins.tolist()
        keys = torch.stack((tokens, plan.positions), -1).float()
        store.write(plan.slots, keys.unsqueeze(1), keys[:, None, :1])
        logits = torch.zeros(len(tokens), V)
        for row, (begin, end) in enumerate(itertools.pairwise(begins)):
            if end > begin:
                places = torch.arange(int(plan.ends[row]))
                read = store.keys[plan.tables[row][places // store.page] * store.page + places % store.page, 0]
                assert read[:, 1].tolist() == places.tolist()
                logits[begin:end] = LOGITS[codes(read[:, 0].tolist())[begin - end :]]
        return plan.select(logits)


@functools.cache
def alone(prompt, params, room):
    """The text of one request, without any cache: (tokens, why it ended)."""
    tokens, sampler = list(prompt), Sampler.of([params], [params.seed], [prompt], V, "cpu")
    while len(tokens) < min(len(prompt) + params.max_new_tokens, room):
        token = sampler.draw(LOGITS[codes(tokens)[-1:]], [0], [len(tokens)]).tokens[0]
        if token in params.stop_ids:
            return tokens[len(prompt) :], "stop"
        tokens.append(token)
    return tokens[len(prompt) :], "length"


class Guess:
    """A draft that knows the model, drafts as much as it likes, and errs now and then."""

    def prepare(self, n_rows, capacity, vocab_size):
        """Nothing."""

    def free(self, row):
        """Nothing."""

    def propose(self, asks, draw):
        """What would come next, greedily; every fifth beginning gets a wrong token."""
        return Proposal.of([self.guess(list(ask.tokens), ask.most) for ask in asks])

    def guess(self, text, most):
        """Up to so many tokens."""
        n = len(text)
        for _ in range(most - codes(text)[-1] % 2):
            code = codes(text)[-1]
            text.append((int(LOGITS[code].argmax()) + (code % 5 == 0)) % V)
        return text[n:]


# -- books


def check_books(runner):
    """Every block has as many references as owners, and holds what its owners read in it."""
    cache, blocks, scheduler = runner.cache, runner.blocks, runner.scheduler
    page, owners, in_rows = cache.page, [0] * cache.allocator.n_blocks, set()
    for request in scheduler.running:
        assert request.row is not None and not request.finish_reason and request.fed == cache.lengths[request.row]
        known = request.tokens[: request.fed]
        if known:
            ((k, _),) = cache.read_tokens(request.row, 0, len(known))
            assert k[:, 0, 0].tolist() == known and k[:, 0, 1].tolist() == list(range(len(known)))
    for row in range(len(cache.lengths)):
        in_rows.update(cache.blocks(row))
        for block in cache.blocks(row):
            owners[block] += 1
    for text, span in blocks.tree.spans() if blocks.tree else ():
        held = cache.stores[0].k[torch.tensor(span.blocks)].reshape(-1, 2)
        assert held[:, 0].tolist() == list(text[-len(span) :]), "the tree has a block that was written anew"
        assert held[:, 1].tolist() == list(range(len(text)))[-len(span) :]
        assert span.nbytes == len(span.blocks) * cache.block_bytes and len(span) == len(span.blocks) * page
        for block in span.blocks:
            owners[block] += 1
            assert blocks.in_tree[block]
    in_tree = sum(len(span.blocks) for _, span in blocks.tree.spans()) if blocks.tree else 0
    assert owners == cache.allocator.counts.tolist() and owners.count(0) == cache.allocator.n_free
    assert blocks.in_tree.sum() == in_tree and blocks.available == len(owners) - len(in_rows)
    rows = [request.row for request in scheduler.running]
    assert sorted(rows + blocks._rows) == list(range(len(cache.lengths)))
    assert not any(cache.n_held[row] for row in blocks._rows)
    check_queue(runner)


def check_queue(runner):
    """Who waits has no row; what the host keeps for them is what it may keep, and no more."""
    waiting = runner.scheduler.waiting
    assert all(request.row is None and not request.finish_reason for request in waiting)
    kept = [request.kept for request in waiting if request.kept is not None]
    assert not any(request.kept for request in runner.scheduler.running)
    assert set(map(id, kept)) == set(map(id, runner.blocks._swapped))
    assert sum(each.nbytes for each in kept) <= runner.blocks.swap_bytes


# -- anything, in any order

KINDS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "penalty": {"temperature": 0.0, "repetition_penalty": 1.7, "frequency_penalty": 1.0},
    "moved": {"presence_penalty": 1.0, "logit_bias": {5: 2.0, 6: -100}},
    "cut": {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.5, "logprobs": 2},
}
MODES = ("plain", "ahead", "coupled", "rejection", "padded", "padded, ahead")
some_request = st.tuples(st.integers(0, 2), st.sampled_from((1, 3, 6, 9, 16, 21)), st.integers(1, 24),
                         st.sampled_from((0, 0, 1)), st.sampled_from(list(KINDS)), st.integers(0, 5))  # fmt: skip


class Days(RuleBasedStateMachine):
    """Requests of three families over too little memory; steps that fail, forks, people who leave."""

    @initialize(tokens=st.integers(20, 60), page=st.sampled_from((1, 2, 4, 8)), rows=st.integers(1, 4),
                share=st.booleans(), swap=st.sampled_from((0, 0.3, 9)), mode=st.sampled_from(MODES),
                budget=st.integers(4, 30), patience=st.sampled_from((None, 3)))  # fmt: skip
    def begin(self, tokens, page, rows, share, swap, mode, budget, patience):
        self.asked, self.texts, self.gone = {}, {}, set()
        self.mode, self.candidates, sampling.CANDIDATES = mode, sampling.CANDIDATES, 12
        speculation = Speculation(Guess(), k=3, rule=mode) if mode in ("coupled", "rejection") else None
        memory = max(2, tokens // page) * page * 12  # bytes of a token
        self.runner = Runner(Reader(), TOKENIZER, rows, LONG, memory=memory, page=page, share=share,
                             swap_bytes=int(swap * memory), speculation=speculation, ahead="ahead" in mode,
                             graphs="padded" in mode, max_tokens=budget, patience=patience)  # fmt: skip

    @rule(crowd=st.lists(some_request, min_size=1, max_size=4))
    def add(self, crowd):
        for each in crowd:
            self.add_one(*each)

    def add_one(self, family, n, new, priority, kind, seed):
        prompt = [(family * 11 + i * i) % V for i in range(n)]
        params = SamplingParams(new, stop_ids=(3, 17), seed=seed, **KINDS[self.allowed(kind)])
        if len(prompt) >= self.runner.room:
            with pytest.raises(ValueError, match="leaves no room to go on"):
                self.runner.add(prompt, params)
        else:
            self.note(self.runner.add(prompt, params, priority, user=f"user {seed % 2}"))

    def allowed(self, kind):
        """Rejection draws other texts with the same odds, so there requests are greedy."""
        return "penalty" if self.mode == "rejection" and KINDS[kind].get("temperature") != 0.0 else kind

    def note(self, request):
        self.asked[request.index] = (request, tuple(request.tokens), request.params)

    @rule(times=st.integers(1, 9))
    def step(self, times):
        for _ in range(times):
            self.take(self.runner.step())

    def take(self, pieces):
        for piece in pieces:
            assert piece.index not in self.gone
            if piece.token is not None:
                self.texts.setdefault(piece.index, []).append(piece.token)
                wanted = self.asked[piece.index][2].logprobs
                assert (piece.logprobs is None) == (wanted is None)
            assert piece.finish_reason == self.asked[piece.index][0].finish_reason or self.runner.speculation

    @precondition(lambda self: self.asked and len(self.gone) * 4 < len(self.asked))
    @rule(which=st.integers(0, 99))
    def abort(self, which):
        request = self.asked[sorted(self.asked)[which % len(self.asked)]][0]
        if not request.finish_reason:
            self.gone.add(request.index)
        self.runner.abort(request)
        assert request.kept is None and request.row is None

    @precondition(lambda self: self.asked)
    @rule(which=st.integers(0, 99), kind=st.sampled_from(list(KINDS)), new=st.integers(1, 9))
    def fork(self, which, kind, new):
        request = self.asked[sorted(self.asked)[which % len(self.asked)]][0]
        params = SamplingParams(new, stop_ids=(3, 17), seed=which, **KINDS[self.allowed(kind)])
        if len(request.tokens) >= self.runner.room:
            with pytest.raises(ValueError, match="leaves no room to go on"):
                self.runner.fork(request, params)
        else:
            self.note(self.runner.fork(request, params))

    @rule()
    def clear(self):
        self.runner.blocks.clear()

    @precondition(lambda self: self.asked and len(self.gone) * 4 < len(self.asked))
    @rule(what=st.sampled_from(("forward", "swap_out", "swap_in")))
    def fail(self, what):
        """A step without memory for its copies, or in which the model fails: everybody is called off."""

        def broken(*_):
            raise Broken

        cache, model = self.runner.cache, self.runner.model
        model.broken, cache.swap_out, cache.swap_in = what == "forward", cache.swap_out, cache.swap_in
        if what != "forward":
            setattr(cache, what, broken)
        try:
            self.take(self.runner.step())
        except Broken:
            self.gone.update(index for index, (request, *_) in self.asked.items() if request.finish_reason == "abort")
            assert not self.runner.busy and self.runner.cache.allocator.n_free == cache.allocator.n_blocks
        model.broken = False
        del cache.swap_out, cache.swap_in

    @invariant()
    def books_are_right(self):
        check_books(self.runner)

    def teardown(self):
        if not hasattr(self, "runner"):
            return
        try:
            for _ in range(3000):
                if self.runner.busy:
                    self.take(self.runner.step())
        finally:
            sampling.CANDIDATES = self.candidates
        assert not self.runner.busy, "it does not come to an end"
        for index, (request, prompt, params) in self.asked.items():
            text, (whole, reason) = self.texts.get(index, []), alone(prompt, params, self.runner.room)
            assert text == (whole[: len(text)] if index in self.gone else whole)
            assert request.finish_reason == ("abort" if index in self.gone else reason)
        self.runner.blocks.clear()
        assert self.runner.cache.allocator.n_free == self.runner.cache.allocator.n_blocks


TestDays = Days.TestCase
TestDays.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


if __name__ == "__main__":
    for each in (SamplingParams(9, stop_ids=(), seed=0, **KINDS[kind]) for kind in KINDS):
        print(alone((1, 2, 3), each, LONG))
    raise SystemExit(pytest.main([__file__]))
