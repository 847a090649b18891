"""The paged cache: logits are those without a cache, whatever the steps; blocks are shared, copied and given back."""

import random

import pytest
import torch

from phase1_foundation.project3_pretrain.layers import Attention
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.decoder import Decoder, FastDecoder
from phase3_core_inference.project8_kv_cache.work import octaves, quarter_octaves
from phase4_advanced_inference.project13_paged_attention.block_allocator import OutOfBlocks
from phase4_advanced_inference.project13_paged_attention.paged_cache import PagedCache, Swapped

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


@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("name", ["gpt2", "windows"])
def test_branches_go_on_as_if_alone_and_outlive_their_root(name, page):
    """Three endings of a text, which end in a full block or not, in one step together; one is cut back first."""
    model, texts = MODELS[name], sequences_of(4, seed=3)
    for length in (16, 18):
        cache = PagedCache(model.specs, 4, LONG, page=page)
        decoder, whole = Decoder(model, cache), -(-length // page)
        decoder.step([(3, length, 0)], texts[3, :length].tolist())
        for row in (0, 1, 2):
            cache.fork(3, row)
        assert cache.allocator.n_free == cache.allocator.n_blocks - whole
        cache.truncate(2, 5)  # into what all share
        kept = {0: length, 1: length, 2: 5}
        branches = {row: torch.cat((texts[3, : kept[row]], texts[row, kept[row] :])) for row in kept}
        exact, free = {row: model(branches[row]) for row in kept}, cache.allocator.n_free
        for step in range(20):
            work = [(row, 1, 1) for row in (2, 0, 1)]
            logits = decoder.step(work, [int(branches[row][kept[row] + step]) for row, _, _ in work])
            for got, (row, _, _) in zip(logits, work):
                assert torch.allclose(got, exact[row][kept[row] + step], atol=1e-4), (row, step)
            if step == 0:  # a copy, or where the last block is full a new one, each
                assert cache.allocator.n_free == free - 3
            if step == 9:
                assert cache.blocks(3)[: length // page] == cache.blocks(0)[: length // page]
                cache.free(3)
        for row in kept:
            cache.free(row)
        assert cache.allocator.n_free == cache.allocator.n_blocks


def test_what_is_only_reserved_is_not_shared_by_a_fork():
    """Else both would write there: only the block in which a row ends is asked for owners."""
    cache = PagedCache(MODELS["gpt2"].specs, 2, LONG, page=4)
    cache.plan([(0, 2, 0)])
    cache.reserve(0, 10)
    cache.fork(0, 1)
    cache.plan([(0, 10, 0), (1, 10, 0)])
    assert not set(cache.blocks(0)) & set(cache.blocks(1)) and cache.allocator.counts.max() == 1


def test_the_last_owner_of_a_block_needs_no_copy():
    cache = PagedCache(MODELS["gpt2"].specs, 3, LONG, page=4, n_blocks=3)
    cache.plan([(0, 2, 0)])
    cache.fork(0, 1)
    cache.fork(0, 2)
    cache.plan([(0, 1, 1), (1, 1, 1), (2, 1, 1)])  # two copies, and two blocks are free
    assert sorted(cache.blocks(0) + cache.blocks(1) + cache.blocks(2)) == [0, 1, 2]


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
    assert plan.shape[:4] == (4, 4, 4, 1) and plan.compiles and plan.returns and cache.keeps(plan)
    assert plan.positions.tolist() == [5, 2, 3, 0] and plan.tokens.tolist() == [7, 8, 9, 0]
    assert plan.slots[3] == cache.allocator.n_blocks * 4 and plan.ends.tolist() == [6, 3, 4, 1]
    assert (plan.tables[3] == cache.allocator.n_blocks).all()
    assert cache.plan([(row, 1, 1) for row in (0, 1, 3)]) is plan
    mixed = cache.plan([(0, 20, 1), (1, 1, 1)])
    assert mixed.returns and not mixed.compiles and mixed.shape[:3] == (64, 5, 5)
    assert mixed.begins.tolist() == [0, 20, 21, 21, 21, 21]
    assert cache.plan([(2, 3, 0), (3, 2, 1)]) is mixed


@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_padding_changes_no_block_but_the_spare_one(name, page):
    """Recorded over padded plans, or step by step over exact ones: the same logits, and few shapes."""
    model, texts, rng = MODELS[name], sequences_of(6, seed=5), random.Random(page)
    padded = PagedCache(model.specs, 6, LONG, page=page, padded=True)
    plain, fast = Decoder(model, PagedCache(model.specs, 6, LONG, page=page)), FastDecoder(model, padded, graphs=True)
    shapes = set()
    while min(padded.lengths) < LONG:
        rows = [row for row in range(6) if padded.lengths[row] < LONG]
        work, longest = [], rng.choice([1, 1, 2, 17])
        for row in rng.sample(rows, rng.randint(1, len(rows))):
            n = min(longest if rng.random() < 0.8 else 4, LONG - padded.lengths[row])
            work.append((row, n, rng.choice([1, n])))
        tokens = [int(texts[row, padded.lengths[row] + j]) for row, n, _ in work for j in range(n)]
        plan, before = padded.plan(work, tokens), [store.keys.clone() for store in padded.stores]
        logits = fast.run(plan, plan.tokens)
        assert logits.shape == (plan.shape.n_wanted, V)
        assert torch.allclose(logits[: plan.n_wanted], plain.step(work, tokens), atol=1e-4)
        written = {*plan.slots[: plan.n_tokens].tolist(), padded.allocator.n_blocks * page}
        for store, keys in zip(padded.stores, before):
            assert set((store.keys != keys).flatten(1).any(1).nonzero().flatten().tolist()) <= written
        shapes |= {plan.shape} if plan.returns else set()
    assert padded.lengths == plain.cache.lengths and len(shapes) == len(fast._steps) <= 24


def test_what_others_left_is_not_read():
    """Not even nan, in blocks that were freed or in the one for padding, which a mask alone would let through."""
    for padded, (name, model) in ((padded, item) for padded in (False, True) for item in MODELS.items()):
        text, cache = sequences_of(1)[0], PagedCache(model.specs, 5, LONG, page=4, padded=padded)
        for store in cache.stores:
            store.keys.fill_(torch.nan)
            store.values.fill_(torch.nan)
        decoder = FastDecoder(model, cache)
        for n in (7, 1, 1, 2, 20, 1):
            at = cache.lengths[1]
            work = [(row, n, n) for row in (1, 4, 2)]  # three rows: a fourth is padding
            logits = decoder.step(work, 3 * text[at : at + n].tolist()).unflatten(0, (3, n))
            assert torch.allclose(logits, model(text)[at : at + n].expand_as(logits), atol=1e-4), (name, padded, n)


def test_values_of_another_size_than_keys():
    class Narrow(Attention):
        def __init__(self, config, layer, rotation):
            super().__init__(config, layer, rotation)
            self.spec = type(self.spec)(**{**self.spec.__dict__, "value_size": 4})
            self.v_proj = torch.nn.Linear(config.n_embd, config.n_kv_head * 4, bias=False)
            self.o_proj = torch.nn.Linear(config.n_head * 4, config.n_embd, bias=False)

    model = Transformer(SHAPES["grouped"], attention=Narrow).eval().requires_grad_(False)
    cache, text = PagedCache(model.specs, 3, LONG, page=4), sequences_of(1)[0]
    Decoder(model, cache).step([(0, 18, 0)], text[:18].tolist())
    cache.fork(0, 1)
    cache.swap_in(2, cache.swap_out(0))
    cache.append_tokens(0, cache.read_tokens(2, 0, 18))
    assert cache.nbytes == cache.allocator.n_blocks * cache.block_bytes
    for row in range(3):
        assert torch.allclose(logits_of(model, cache, row, text[18:30]), model(text)[18:30], atol=1e-4)


@pytest.mark.parametrize("round_keys", [lambda n: -(-n // 48) * 48, quarter_octaves, octaves])
def test_rows_are_filled_up_to_few_numbers(round_keys):
    """By any rounding that is made for keys: it takes one number."""
    cache = PagedCache(MODELS["gpt2"].specs, 100, LONG, n_blocks=100, padded=True, round_keys=round_keys)
    sizes = [cache.rows_of(n) for n in range(1, 101)]
    assert all(n <= size <= min(max(8, 2 * n), 100) for n, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert len(set(sizes)) < 25 and cache.plan([(row, 1, 1) for row in range(9)]).shape.n_rows == sizes[8]


def test_plans_that_were_not_needed_for_long_are_forgotten():
    cache = PagedCache(MODELS["gpt2"].specs, 1, LONG, page=4)
    first = cache.plan([(0, 1, 1)])
    for n in range(2, 11):
        assert cache.keeps(first) == (n < 10)
        cache.free(0)
        cache.plan([(0, n, 1)])
    cache.free(0)
    assert cache.plan([(0, 1, 1)]) is not first and not cache.keeps(first)


def test_waste_counts_a_shared_block_once():
    cache = PagedCache(MODELS["gpt2"].specs, 3, LONG, page=4)
    assert cache.waste == 0
    cache.plan([(0, 5, 0)])
    assert cache.waste == pytest.approx(3 / 8)
    cache.fork(0, 1)
    assert cache.waste == pytest.approx(3 / 8)
    cache.truncate(1, 3)  # the other still fills the block
    assert cache.waste == pytest.approx(3 / 8)
    cache.reserve(2, 4)
    assert cache.waste == pytest.approx(7 / 12)
    cache.free(0)
    assert cache.waste == pytest.approx(5 / 8)


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
        (lambda c: c.fork(0, 2), "row 2 is unknown: this cache has the rows 0 to 1"),
        (lambda c: c.fork(-2, 1), "row -2 is unknown"),
        (lambda c: c.adopt(-1, c.blocks(0)), "row -1 is unknown"),
        (lambda c: c.adopt(1, [0] * 13), "13 blocks of 4 tokens exceed capacity=48: give at most 12"),
        (lambda c: c.adopt(1, [*c.blocks(0), 20]), "block 20 is free"),
        (lambda c: c.adopt(1, [24]), "block 24 is free, or none of the 24"),
        (lambda c: c.reserve(1, LONG + 1), "49 more exceed capacity=48"),
        (lambda c: c.reserve(-1, 1), "row -1 is unknown"),
        (lambda c: c.append_tokens(2, c.read_tokens(0, 0, 8)), "row 2 is unknown"),
        (lambda c: c.append_tokens(0, c.read_tokens(0, 3, 3)), "n_new=0 must be at least 1"),
        (lambda c: c.read_tokens(-1, 0, 0), "not in this cache"),
        (lambda c: c.swap_out(2), "row 2 is unknown"),
        (lambda c: c.swap_out(-1), "row -1 is unknown"),
        (lambda c: c.swap_in(0, Swapped(4, c.stores)), "row 0 holds 2 blocks: free it first"),
        (lambda c: c.free(2), "rows go from 0 to 1"),
        (lambda c: c.plan([(0, 1, 1), (2, 1, 1)]), "row 2 is unknown"),
        (lambda c: c.plan([(1, 1, 1), (0, 41, 0)]), "row 0 holds 8 tokens, and 41 more exceed capacity=48"),
        (lambda c: PagedCache(c.specs, 1, 8, page=0), "page=0 must be a power of two"),
    ],
)
def test_what_cannot_be_is_refused(call, said):
    cache = PagedCache(MODELS["gpt2"].specs, 2, LONG, page=4)
    cache.plan([(0, 8, 0)])
    with pytest.raises(ValueError, match=said):
        call(cache)
    assert cache.lengths == [8, 0] and cache.allocator.n_free == cache.allocator.n_blocks - 2


if __name__ == "__main__":
    test_a_fork_shares_all_blocks_until_it_writes_and_copies_one()
    print("a fork shares all blocks, and copies the one that it writes into")
    raise SystemExit(pytest.main([__file__]))
