"""The paged cache: logits are those without a cache, whatever the steps; blocks are shared, copied and given back."""

import random

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.decoder import Decoder, FastDecoder
from phase4_advanced_inference.project13_paged_attention.block_allocator import OutOfBlocks
from phase4_advanced_inference.project13_paged_attention.paged_cache import PagedCache

V, LONG = 61, 48
SMALL = {"vocab_size": V, "block_size": LONG, "n_layer": 2, "n_head": 4, "n_embd": 32}
SHAPES = {
    "gpt2": PRESETS["gpt2"](**SMALL),
    "grouped": PRESETS["llama-7b"](**SMALL, n_ff=48, n_kv_head=2, qk_norm=True),
    "windows": PRESETS["llama-7b"](**{**SMALL, "n_layer": 3}, n_ff=48, n_kv_head=2, windows=(4, None, 9)),
}


def make(name):
    """A model whose attention matters: larger weights than at the beginning of training."""
    torch.manual_seed(0)
    model = Transformer(SHAPES[name]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


MODELS = {name: make(name) for name in SHAPES}


def sequences_of(n, seed=0):
    """So many texts of full length, and their logits without a cache by model."""
    return torch.randint(V, (n, LONG), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_cached_logits_are_those_without_a_cache(name, page, padded):
    """Random mixes of prompts, decodes and verification with rejection, in any rows."""
    model, texts, rng = MODELS[name], sequences_of(4), random.Random(page)
    cache, exact = PagedCache(model.specs, 4, LONG, page=page, padded=padded), model(texts)
    decoder = FastDecoder(model, cache) if padded else Decoder(model, cache)
    for _ in range(40):
        rows = [row for row in range(4) if cache.lengths[row] < LONG]
        if not rows:
            break
        work = []
        for row in rng.sample(rows, rng.randint(1, len(rows))):
            n = min(rng.choice([1, 1, 3, 11, 20]), LONG - cache.lengths[row])
            work.append((row, n, rng.choice([0, 1, n])))
        places = [(row, cache.lengths[row] + j) for row, n, _ in work for j in range(n)]
        wanted = [(row, cache.lengths[row] + j) for row, n, w in work for j in range(n - w, n)]
        logits = decoder.step(work, [int(texts[place]) for place in places])
        assert logits.shape == (len(wanted), V)
        for got, place in zip(logits, wanted):
            assert torch.allclose(got, exact[place], atol=1e-4), place
        for row, n, _ in work:
            if n == 3:  # two of three were rejected
                cache.truncate(row, cache.lengths[row] - 2)
    for row in range(4):
        cache.free(row)
    assert cache.allocator.n_free == cache.allocator.n_blocks


def logits_of(model, cache, row, tokens):
    """Logits behind each of these tokens, taken in one by one."""
    decoder = Decoder(model, cache)
    return torch.cat([decoder.step([(row, 1, 1)], [int(token)]) for token in tokens])


def test_a_fork_shares_all_blocks_until_it_writes_and_copies_one():
    model, (text, other) = MODELS["grouped"], sequences_of(2)
    cache = PagedCache(model.specs, 2, LONG, page=4)
    Decoder(model, cache).step([(0, 10, 0)], text[:10].tolist())
    cache.fork(0, 1)
    assert cache.blocks(0) == cache.blocks(1) and cache.allocator.n_free == cache.allocator.n_blocks - 3
    second = logits_of(model, cache, 1, other[10:20])
    assert cache.blocks(0)[:2] == cache.blocks(1)[:2] and cache.blocks(0)[2] != cache.blocks(1)[2]
    assert cache.allocator.references(cache.blocks(0)[2]) == 1  # who stayed has it alone again
    first = logits_of(model, cache, 0, text[10:20])
    branch = torch.cat((text[:10], other[10:20]))
    assert torch.allclose(first, model(text)[10:20], atol=1e-4)
    assert torch.allclose(second, model(branch)[10:20], atol=1e-4)


def test_full_blocks_are_adopted_and_swapped_and_copied():
    model, (text, _) = MODELS["gpt2"], sequences_of(2)
    exact, cache = model(text), PagedCache(MODELS["gpt2"].specs, 3, LONG, page=4)
    Decoder(model, cache).step([(0, 15, 0)], text[:15].tolist())
    cache.adopt(1, cache.blocks(0)[:3])
    assert torch.allclose(logits_of(model, cache, 1, text[12:20]), exact[12:20], atol=1e-4)
    swapped = cache.swap_out(0)
    assert cache.lengths[0] == 0 and swapped.length == 15 and swapped.nbytes == 4 * cache.block_bytes
    cache.swap_in(2, swapped)
    assert torch.allclose(logits_of(model, cache, 2, text[15:20]), exact[15:20], atol=1e-4)
    cache.append_tokens(0, cache.read_tokens(2, 0, 9))
    assert torch.allclose(logits_of(model, cache, 0, text[9:20]), exact[9:20], atol=1e-4)


def test_plans_of_one_shape_return_and_padding_goes_to_the_spare_block():
    cache = PagedCache(MODELS["gpt2"].specs, 5, LONG, page=4, padded=True)
    for row in range(5):
        cache.plan([(row, row + 1, 0)])
    plan = cache.plan([(row, 1, 1) for row in (4, 1, 2)], [7, 8, 9])
    assert plan.shape[:4] == (4, 4, 4, 1) and plan.short and plan.returns and cache.keeps(plan)
    assert plan.positions.tolist() == [5, 2, 3, 0] and plan.tokens.tolist() == [7, 8, 9, 0]
    assert plan.slots[3] == cache.allocator.n_blocks * 4 and plan.ends.tolist() == [6, 3, 4, 1]
    assert (plan.tables[3] == cache.allocator.n_blocks).all()
    assert cache.plan([(row, 1, 1) for row in (0, 1, 3)]) is plan
    mixed = cache.plan([(0, 20, 1), (1, 1, 1)])
    assert mixed.returns and not mixed.short and mixed.shape[:3] == (64, 5, 5)
    assert mixed.begins.tolist() == [0, 20, 21, 21, 21, 21]
    assert cache.plan([(2, 3, 0), (3, 2, 1)]) is mixed


def test_memory_that_ends_changes_nothing():
    cache = PagedCache(MODELS["gpt2"].specs, 3, LONG, page=4, n_blocks=5)
    cache.plan([(0, 9, 0), (1, 4, 0)])
    before = (cache.lengths[:], cache.tables.copy(), cache.allocator.counts.copy())
    for call in (
        lambda: cache.plan([(0, 1, 1), (1, 5, 1)]),  # the first has room, the second has not
        lambda: cache.reserve(2, 5),
        lambda: cache.append_tokens(2, [(torch.zeros(5, 4, 8), torch.zeros(5, 4, 8))] * 2),
    ):
        with pytest.raises(OutOfBlocks, match="free a row"):
            call()
        assert before[0] == cache.lengths and (before[1][:2] == cache.tables[:2]).all()
        assert (before[2] == cache.allocator.counts).all()
    assert cache.waste == pytest.approx(3 / 16)  # of four blocks' 16 places 13 are taken


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c: PagedCache(c.specs, 0, 8), "n_rows=0"),
        (lambda c: PagedCache(c.specs, 1, LONG + 1), "block_size=48"),
        (lambda c: PagedCache(c.specs, 1, 8, page=12), "power of two"),
        (lambda c: PagedCache(c.specs, 1, 8, n_blocks=0), "more memory"),
        (lambda c: c.plan([(0, 2, 1)], [1]), "1 tokens were given for work that has 2"),
        (lambda c: c.plan([(0, LONG + 1, 0)]), "exceed capacity=48"),
        (lambda c: c.truncate(0, 9), "holds 8"),
        (lambda c: c.truncate(7, 0), "rows go from 0 to 1"),
        (lambda c: c.read_tokens(0, 4, 9), "not in this cache"),
        (lambda c: c.append_tokens(1, []), "of 0 layers"),
        (lambda c: c.adopt(0, c.blocks(0)), "free it first"),
        (lambda c: c.fork(0, 0), "free it first"),
    ],
)
def test_what_cannot_be_is_refused(call, said):
    cache = PagedCache(MODELS["gpt2"].specs, 2, LONG, page=4)
    cache.plan([(0, 8, 0)])
    with pytest.raises(ValueError, match=said):
        call(cache)
    assert cache.lengths == [8, 0] and cache.allocator.n_free == cache.allocator.n_blocks - 2


class Shelves(RuleBasedStateMachine):
    """Rows of one small layer, in which numbers are written that can be told apart, and what they should hold."""

    def __init__(self):
        super().__init__()
        self.specs = MODELS["gpt2"].specs[:1]
        self.cache, self.held, self.boxes = (
            PagedCache(self.specs, 4, LONG, page=4, n_blocks=14),
            [[] for _ in "1234"],
            [],
        )
        self.next = 1.0

    def write(self, work):
        plan = self.cache.plan(work)
        spec, n = self.specs[0], plan.n_tokens
        numbers = torch.arange(self.next, self.next + n)
        shape = (n, spec.n_kv_head, spec.head_size)
        self.cache.stores[0].write(
            plan.slots[:n], numbers.view(-1, 1, 1).expand(shape), numbers.view(-1, 1, 1).expand(shape)
        )
        at = 0
        for row, m, _ in work:
            self.held[row] += numbers[at : at + m].tolist()
            at += m
        self.next += n

    @rule(news=st.lists(st.integers(0, 6), min_size=4, max_size=4))
    def grow(self, news):
        work = [(row, n, 0) for row, n in enumerate(news) if n and len(self.held[row]) + n <= LONG]
        before = self.cache.allocator.counts.copy()
        try:
            if work:
                self.write(work)
        except OutOfBlocks:
            assert (before == self.cache.allocator.counts).all()

    @rule(row=st.integers(0, 3), part=st.floats(0, 1))
    def truncate(self, row, part):
        length = int(part * len(self.held[row]))
        self.cache.truncate(row, length)
        del self.held[row][length:]

    @rule(row=st.integers(0, 3), other=st.integers(0, 3))
    def fork(self, row, other):
        if not self.held[other] and row != other:
            self.cache.fork(row, other)
            self.held[other] = list(self.held[row])

    @rule(row=st.integers(0, 3), other=st.integers(0, 3), n=st.integers(1, 4))
    def adopt(self, row, other, n):
        n = min(n, len(self.held[row]) // 4)
        if not self.held[other] and row != other:
            self.cache.adopt(other, self.cache.blocks(row)[:n])
            self.held[other] = self.held[row][: 4 * n]

    @rule(row=st.integers(0, 3))
    def pack(self, row):
        self.boxes.append((self.cache.swap_out(row), self.held[row]))
        self.held[row] = []

    @rule(row=st.integers(0, 3))
    def unpack(self, row):
        if self.boxes and not self.held[row]:
            box, numbers = self.boxes[-1]
            try:
                self.cache.swap_in(row, box)
                self.held[row] = list(numbers)
                self.boxes.pop()
            except OutOfBlocks:
                pass

    @invariant()
    def everything_is_where_it_should_be(self):
        owners = [0] * 14
        for row, numbers in enumerate(self.held):
            assert self.cache.lengths[row] == len(numbers) and self.cache.n_held[row] >= -(-len(numbers) // 4)
            for block in self.cache.blocks(row):
                owners[block] += 1
            if numbers:
                ((k, v),) = self.cache.read_tokens(row, 0, len(numbers))
                assert k[:, 0, 0].tolist() == numbers == v[:, -1, -1].tolist()
        assert owners == self.cache.allocator.counts.tolist() and owners.count(0) == self.cache.allocator.n_free


TestShelves = Shelves.TestCase
TestShelves.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


if __name__ == "__main__":
    test_a_fork_shares_all_blocks_until_it_writes_and_copies_one()
    print("a fork shares all blocks, and copies the one that it writes into")
    raise SystemExit(pytest.main([__file__]))
