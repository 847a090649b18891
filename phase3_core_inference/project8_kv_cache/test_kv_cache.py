"""The caches: cached logits are those without a cache, whatever the steps; rows are independent; memory as computed."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1_foundation.project3_pretrain.layers import Attention
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.attention import KERNELS, by_length, by_sdpa
from phase3_core_inference.project8_kv_cache.cache_plan import AlignedPlan, CachePlan, PromptPlan, SpreadPlan
from phase3_core_inference.project8_kv_cache.decoder import Decoder, FastDecoder
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache, bytes_per_token
from phase3_core_inference.project8_kv_cache.reference import GrowingCache
from phase3_core_inference.project8_kv_cache.sliding_cache import SlidingCache

V, LONG = 61, 48
SMALL = {"vocab_size": V, "block_size": LONG, "n_layer": 2, "n_head": 4, "n_embd": 32}
SHAPES = {
    "gpt2": PRESETS["gpt2"](**SMALL),
    "grouped": PRESETS["llama-7b"](**SMALL, n_ff=48, n_kv_head=2, qk_norm=True),
    "one head": PRESETS["llama-7b"](**SMALL, n_ff=48, n_kv_head=1, tie_head=True, head_size=6),
    "windows": PRESETS["llama-7b"](**{**SMALL, "n_layer": 3}, n_ff=48, n_kv_head=2, windows=(4, None, 9)),
}
CACHES = {
    "contiguous": lambda specs, **o: ContiguousCache(specs, 4, LONG, round_keys=by_eight, **o),
    "sliding": lambda specs, **o: SlidingCache(specs, 4, LONG, round_keys=by_eight, chunk=5, **o),
}


def by_eight(n):
    """Rounds lengths so coarsely that short sequences see rounding, too."""
    return -(-n // 8) * 8


def make(name):
    """A model whose attention matters: larger weights than at the beginning of training."""
    torch.manual_seed(0)
    model = Transformer(SHAPES[name]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


MODELS = {name: make(name) for name in SHAPES}


def draw_work(rng, cache, sequences, longest):
    """Some rows in any order, each with a few new tokens, some of whose logits are wanted."""
    open_rows = [row for row, sequence in enumerate(sequences) if cache.lengths[row] < len(sequence)]
    work = []
    for row in rng.sample(open_rows, rng.randint(1, len(open_rows))):
        n = min(rng.choice([1, 1, 2, longest]), len(sequences[row]) - cache.lengths[row])
        work.append((row, n, rng.randint(0, n)))
    return work


def take(model, cache, sequences, work):
    """One step: (logits that were wanted, where each of them belongs: (row, position))."""
    before = list(cache.lengths)
    places = [(row, position) for row, n, _ in work for position in range(before[row], before[row] + n)]
    wanted = [(row, p) for row, n, w in work for p in range(before[row] + n - w, before[row] + n)]
    plan = cache.plan(work, [int(sequences[row][p]) for row, p in places])
    return model(plan.tokens, plan)[: plan.n_wanted], wanted


def draw_sequences(rng, n=4):
    """Random tokens of several lengths."""
    return [torch.tensor([rng.randrange(V) for _ in range(rng.randint(12, LONG))]) for _ in range(n)]


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("cache_name", CACHES)
@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_cached_logits_are_those_without_a_cache(name, cache_name, padded, seed):
    """Rows of several lengths, prompts in chunks, decodes between them, in any order."""
    rng, model = random.Random(seed), MODELS[name]
    sequences = draw_sequences(rng)
    exact = [model(sequence) for sequence in sequences]
    cache = CACHES[cache_name](model.specs, padded=padded)
    while any(length < len(sequence) for length, sequence in zip(cache.lengths, sequences)):
        logits, wanted = take(model, cache, sequences, draw_work(rng, cache, sequences, 5))
        if wanted:
            torch.testing.assert_close(logits, torch.stack([exact[row][p] for row, p in wanted]), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "work",
    [
        [(0, 4, 3)],
        [(0, 32, 20)],
        [(0, 1, 0), (1, 1, 1), (2, 1, 1), (3, 1, 1)],
        [(0, 2, 1), (1, 2, 2)],
        [(0, 5, 5), (2, 3, 3)],
    ],
)
@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
def test_wanted_logits_are_those_of_the_last_tokens(work, padded):
    """Also where their number, rounded up, is that of all tokens."""
    model, sequences = MODELS["grouped"], draw_sequences(random.Random(0))
    sequences[0] = torch.arange(LONG) % V
    logits, wanted = take(model, ContiguousCache(model.specs, 4, LONG, padded=padded), sequences, work)
    expected = torch.stack([model(sequences[row])[p] for row, p in wanted])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


def test_the_example_of_the_plan():
    cache = ContiguousCache(MODELS["gpt2"].specs, 8, LONG)
    cache.plan([(2, 4, 0), (5, 7, 0)])
    plan = cache.plan([(2, 3, 1), (5, 1, 1)])
    assert type(plan) is CachePlan
    for part, expected in (
        (plan.rows, [2, 2, 2, 5]), (plan.slots[0], [4, 5, 6, 7]), (plan.wanted, [2, 3]), (plan.cell, [0, 1, 2, 3]),
        (plan.source, [0, 1, 2, 3, 0, 0]), (plan._grid.flatten(), [4, 5, 6, 7, 0, 0]), (plan._ends, [7, 8]),
        (plan.picked, [2, 5]),
    ):  # fmt: skip
        assert part.tolist() == expected


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_is_right_and_the_fast_cache_equals_it(name):
    model, tokens = MODELS[name], torch.arange(40) % V
    reference, cache = GrowingCache(model.specs), ContiguousCache(model.specs, 1, LONG)
    for part in tokens.split([17, 1, 1, 20, 1]):
        slow = model(part, reference.advance(len(part)))
        fast = model(part, cache.plan([(0, len(part), len(part))]))
        torch.testing.assert_close(fast, slow, atol=2e-5, rtol=0)
        torch.testing.assert_close(
            slow, model(tokens)[cache.lengths[0] - len(part) : cache.lengths[0]], atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_with_the_formula(kernel):
    torch.manual_seed(1)
    for T, value_size in ((1, 8), (1, 5), (3, 8), (20, 5)):
        q, k, v = torch.randn(3, T, 6, 8), torch.randn(3, 2, 24, 8), torch.randn(3, 2, 24, value_size)
        seen = torch.rand(3, T, 24) < 0.5
        seen[..., 0] = True
        bias = torch.zeros(3, T, 24).masked_fill(~seen, -torch.inf)
        wide_k, wide_v = k.double().repeat_interleave(3, 1), v.double().repeat_interleave(3, 1)
        scores = torch.einsum("rthd,rhsd->rhts", q.double(), wide_k) * 0.3 + bias.unsqueeze(1)
        expected = torch.einsum("rhts,rhsd->rthd", scores.softmax(-1), wide_v).float()
        torch.testing.assert_close(KERNELS[kernel](q, k, v, bias, 0.3), expected, atol=1e-5, rtol=0)


def test_values_of_another_size_than_keys():
    class Narrow(Attention):
        def __init__(self, config, layer, rotation):
            super().__init__(config, layer, rotation)
            self.spec = type(self.spec)(**{**self.spec.__dict__, "value_size": 4})
            self.v_proj = torch.nn.Linear(config.n_embd, config.n_kv_head * 4, bias=False)
            self.o_proj = torch.nn.Linear(config.n_head * 4, config.n_embd, bias=False)

    model = Transformer(SHAPES["grouped"], attention=Narrow).eval().requires_grad_(False)
    cache, tokens = ContiguousCache(model.specs, 2, LONG), torch.arange(30)
    parts = [model(part, cache.plan([(1, len(part), len(part))])) for part in tokens.split([20, 1, 9])]
    torch.testing.assert_close(torch.cat(parts), model(tokens), atol=1e-5, rtol=0)
    assert cache.stores[0].v.shape[-1] == 4


@pytest.mark.parametrize("cache_name", CACHES)
@pytest.mark.parametrize("name", ["gpt2", "windows"])
def test_what_was_truncated_was_never_there(name, cache_name):
    model, rng = MODELS[name], random.Random(3)
    sequence, cache = torch.tensor([rng.randrange(V) for _ in range(LONG)]), CACHES[cache_name](MODELS[name].specs)
    exact = model(sequence)
    while cache.lengths[2] < LONG:
        n = min(rng.randint(1, 3), LONG - cache.lengths[2])
        wrong = min(rng.randint(0, 2), LONG - cache.lengths[2] - n)
        start = cache.lengths[2]
        tokens = torch.cat((sequence[start : start + n], torch.full((wrong,), 7)))
        logits = model(tokens, cache.plan([(2, n + wrong, n + wrong)]))
        torch.testing.assert_close(logits[:n], exact[start : start + n], atol=2e-5, rtol=0)
        cache.truncate(2, start + n)
        assert cache.lengths == [0, 0, start + n, 0]


@pytest.mark.parametrize("cache_name", CACHES)
def test_a_row_that_was_freed_leaks_nothing(cache_name):
    """Not even nan, which a mask alone would let through."""
    model = MODELS["windows"]
    cache, tokens = CACHES[cache_name](model.specs), torch.arange(30) % V
    for store in cache.stores:
        store.k[1], store.v[1] = torch.nan, torch.nan  # of a sequence that overflowed
    cache.lengths[1] = 30
    cache.free(1)
    assert cache.lengths == [0] * 4
    parts = [model(part, cache.plan([(1, len(part), len(part))])) for part in tokens.split(5)]
    torch.testing.assert_close(torch.cat(parts), model(tokens), atol=2e-5, rtol=0)


def test_plans_by_the_shape_of_the_work():
    cache = ContiguousCache(MODELS["gpt2"].specs, 4, LONG)
    for work, kind in (
        ([(0, 1, 1), (1, 1, 1), (2, 1, 1)], AlignedPlan),
        ([(0, 20, 1)], AlignedPlan),
        ([(1, 1, 1), (0, 1, 1)], SpreadPlan),  # not in order
        ([(0, 1, 1), (3, 1, 1)], SpreadPlan),  # half of the rows idle
        ([(0, 20, 1), (1, 3, 1)], SpreadPlan),  # ragged
        ([(3, 1, 1)], CachePlan),  # most rows idle: one is gathered
        ([(1, 20, 0)], CachePlan),
    ):
        assert type(cache.plan(work)) is kind, work


@pytest.mark.parametrize("name", ["gpt2", "grouped", "one head"])
def test_a_long_chunk_of_one_row_needs_no_mask(name):
    model, tokens = MODELS[name], torch.randint(V, (LONG,))
    cache = ContiguousCache(model.specs, 3, LONG)
    cache._unmasked = True  # as on a GPU
    exact, got = model(tokens), []
    for n in (20, 1, 27):  # the first one begins a row, the last one goes on behind 21 tokens; both exceed SHORT
        plan = cache.plan([(2, n, n)], tokens[cache.lengths[2] :][:n].tolist())
        assert (type(plan) is PromptPlan) == (n > 1)
        got.append(model(plan.tokens, plan))
    assert torch.allclose(torch.cat(got), exact, atol=1e-4)
    windows = ContiguousCache(MODELS["windows"].specs, 1, LONG, device="cpu")
    assert not windows._unmasked and type(windows.plan([(0, 20, 0)])) is not PromptPlan


def test_a_shape_that_returns_gets_the_same_plan():
    cache = ContiguousCache(MODELS["gpt2"].specs, 4, LONG, padded=True, round_keys=lambda n: 32)
    first = cache.plan([(0, 1, 1), (1, 1, 1), (2, 1, 1)])
    assert first.tokens.shape == (4,) and first.n_wanted == 3  # three rows are a batch of four
    assert cache.plan([(2, 1, 1), (0, 1, 1), (3, 1, 1)]) is first and cache.keeps(first)
    assert cache.plan([(0, 5, 0)]).tokens.shape == (5,) and cache.plan([(0, 17, 0)]).tokens.shape == (32,)


@pytest.mark.parametrize("padded", [False, True])
def test_tokens_may_come_from_the_device(padded):
    """What a step drew goes into the next one without the host: the same logits."""
    model = MODELS["grouped"]
    kind = FastDecoder if padded else Decoder
    decoders = [kind(model, CACHES["contiguous"](model.specs, padded=padded)) for _ in range(2)]
    work = [(0, 3, 1), (2, 3, 3)]
    for decoder in decoders:
        decoder.step([(0, 4, 1)], [5, 6, 7, 8])
    known = decoders[0].step(work, [1, 2, 3, 4, 5, 6])
    assert torch.equal(decoders[1].step(work, torch.tensor([1, 2, 3, 4, 5, 6])), known)
    with pytest.raises(ValueError, match=r"tokens of shape \(1,\) were given"):
        decoders[1].step([(0, 2, 1)], torch.tensor([1]))
    assert decoders[1].cache.lengths == decoders[0].cache.lengths


def test_prompts_push_out_no_plan_that_something_may_be_recorded_for():
    cache = ContiguousCache(MODELS["gpt2"].specs, 4, LONG, padded=True)
    cache._unmasked, first = True, cache.plan([(0, 1, 1), (1, 1, 1)])  # as on a GPU: each length is a shape
    for n in range(17, LONG):
        for _ in range(3):
            cache.truncate(2, 0)
            assert cache.plan([(2, n, 1)]).shape.n_each == n
    assert cache.keeps(first) and len(cache._passing) == 8


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ([], "nothing to do"),
        ([(4, 1, 1)], "row 4 is unknown: this cache has the rows 0 to 3"),
        ([(-1, 1, 1)], "row -1 is unknown"),
        ([(0, 1, 1), (1, 1, 1), (0, 1, 1)], "row 0 stands twice"),
        ([(0, 0, 0)], "n_new=0 must be at least 1"),
        ([(0, 2, 3)], "n_wanted=3 must lie between 0 and n_new=2"),
        ([(0, 1, -1)], "n_wanted=-1"),
        ([(1, 1, 1), (2, 39, 1)], "row 2 holds 10 tokens, and 39 more exceed capacity=48: end the sequence"),
    ],
)
def test_work_that_cannot_be_done_changes_nothing(work, said):
    cache = ContiguousCache(MODELS["gpt2"].specs, 4, LONG)
    cache.plan([(2, 10, 0)])
    with pytest.raises(ValueError, match=said):
        cache.plan(work)
    assert cache.lengths == [0, 0, 10, 0]


def test_sizes_that_cannot_be():
    specs = MODELS["windows"].specs
    for n_rows, capacity in ((0, 8), (1, 0), (1, LONG + 1)):
        with pytest.raises(ValueError, match=f"n_rows={n_rows} .* capacity={capacity} .* block_size=48"):
            ContiguousCache(specs, n_rows, capacity)
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        SlidingCache(specs, 1, 8, chunk=0)
    cache = ContiguousCache(specs, 2, 8)
    with pytest.raises(ValueError, match="3 tokens were given for work that has 2"):
        cache.plan([(0, 2, 1)], [1, 2, 3])
    for row, length in ((0, 1), (0, -1), (2, 0)):
        with pytest.raises(ValueError, match=f"row {row} cannot be truncated to {length} tokens"):
            cache.truncate(row, length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_what_the_formula_says(dtype):
    for model in MODELS.values():
        config, cache = model.config, ContiguousCache(model.specs, 3, LONG, dtype=dtype)
        a_token = 2 * config.n_layer * config.n_kv_head * config.head_size * dtype.itemsize
        assert bytes_per_token(model.specs, dtype) == a_token
        assert cache.nbytes == a_token * 3 * (LONG + 1)  # and one slot a row for what padding writes


def test_the_default_kernel_belongs_to_the_device():
    assert ContiguousCache(MODELS["gpt2"].specs, 1, 8).kernel is by_sdpa
    assert ContiguousCache(MODELS["gpt2"].specs, 1, 8, kernel=by_length).kernel is by_length


@pytest.mark.parametrize(
    ("rows", "queries", "heads", "kv_heads", "keys", "chosen"),
    [
        (1, 1, 8, 2, 2048, "products"), (1, 1, 8, 2, 1024, "sdpa"), (1, 1, 8, 8, 2048, "sdpa"),
        (5, 1, 8, 2, 2048, "sdpa"), (1, 4, 8, 8, 64, "products"), (1, 17, 8, 2, 2048, "sdpa"),
    ],
)  # fmt: skip
def test_by_length_chooses_by_shape_and_all_kernels_agree(rows, queries, heads, kv_heads, keys, chosen):
    q = torch.randn(rows, queries, heads, 16)
    k, v = torch.randn(2, rows, kv_heads, keys, 16)
    bias = torch.zeros(rows, queries, keys).masked_fill(torch.rand(rows, queries, keys) < 0.3, -torch.inf)
    results = {name: kernel(q, k, v, bias, 0.25) for name, kernel in KERNELS.items()}
    assert torch.equal(results["length"], results[chosen])
    torch.testing.assert_close(results["sdpa"], results["products"])


def test_gradients_do_not_pass_into_the_cache():
    model = Transformer(SHAPES["gpt2"])
    cache = ContiguousCache(model.specs, 1, LONG)
    model(torch.arange(8), cache.plan([(0, 8, 8)])).sum().backward()
    assert not cache.stores[0].k.requires_grad


if __name__ == "__main__":
    for name, model in MODELS.items():
        full, sliding = (CACHES[kind](model.specs).nbytes for kind in CACHES)
        print(f"{name}: {bytes_per_token(model.specs, torch.float32)} bytes a token; 4 rows of {LONG}: {full} bytes, "
              f"with rings {sliding}")  # fmt: skip
    raise SystemExit(pytest.main([__file__]))
