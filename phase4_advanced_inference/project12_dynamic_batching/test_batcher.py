"""The batcher: a text is what it would be alone, whoever shares the batch, comes, leaves, pushes in or is sent away."""

import random

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer
from phase3_core_inference.project8_kv_cache.decoder import Decoder
from phase3_core_inference.project8_kv_cache.generation import Generation, SamplingParams, append, generate
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache
from phase3_core_inference.project8_kv_cache.sliding_cache import SlidingCache
from phase4_advanced_inference.project10_prompt_caching.prompt_cache import PromptCache
from phase4_advanced_inference.project12_dynamic_batching.batcher import Batcher
from phase4_advanced_inference.project12_dynamic_batching.capacity import GangSlots, Slots
from phase4_advanced_inference.project12_dynamic_batching.request import ABORTED
from phase4_advanced_inference.project12_dynamic_batching.selective import selective_step

TOKENIZER = byte_tokenizer()
SHAPE = {"vocab_size": 320, "block_size": 128, "n_layer": 2, "n_head": 4, "n_embd": 32}
SHAPES = {
    "gpt2": PRESETS["gpt2"](**SHAPE, tie_head=False),
    "llama": PRESETS["llama-7b"](**SHAPE, n_kv_head=2, n_ff=48),
    "windows": PRESETS["llama-7b"](**SHAPE, n_kv_head=2, n_ff=48, windows=(7, None)),
}
PROMPTS = [
    "Hello",
    "a",
    "The quick brown fox jumps over it and then sleeps for a very long while",
    "été",
    "x" * 40,
    "No",
]
PARAMS = [
    SamplingParams(24, temperature=0.0, stop_ids=()),
    SamplingParams(9, seed=1, frequency_penalty=0.8, logit_bias={70: 3.0}, stop_ids=()),
    SamplingParams(24, temperature=0.7, top_k=20, seed=2, repetition_penalty=1.4, stop_ids=()),
    SamplingParams(30, top_p=0.8, seed=3, logprobs=2, stop_ids=()),
    SamplingParams(24, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, stop_ids=()),
    SamplingParams(17, temperature=1.5, min_p=0.05, seed=4, logprobs=0, stop_ids=()),
]


class Shared(Slots):
    """Slots with room for so many tokens in all: texts that grow push others out."""

    n_tokens = 110

    def __init__(self, cache, prefixes):
        super().__init__(cache, prefixes)
        self.held = []

    def left(self):
        return self.n_tokens - sum(request.fed for request in self.held)  # with what this step has given out

    def check(self, request):
        if request.limit > self.n_tokens:
            raise ValueError(f"a text of {request.limit} tokens will never fit in {self.n_tokens}")

    def admit(self, request):
        if len(request.tokens) > self.left() or not super().admit(request):
            return False
        self.held.append(request)
        return True

    def grow(self, request, n):
        return n <= self.left()

    def release(self, request):
        super().release(request)
        self.held.remove(request)


def model_of(shape="llama"):
    torch.manual_seed(0)
    model = Transformer(SHAPES[shape]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.25)
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def alone(model):
    """What each request writes with nobody else there."""
    texts = [generate(model, TOKENIZER, prompt, params) for prompt, params in zip(PROMPTS, PARAMS)]
    assert len({text.text for text in texts}) == len(texts)
    return texts


def serve(batcher, requests, texts, n=10**4):
    """Take up to n steps and collect what they bring."""
    known = {request.index: text for request, text in zip(requests, texts)}
    for _ in range(n):
        if not batcher.busy:
            break
        for piece in batcher.step():
            append(known[piece.index], piece)


def same(got, expected):
    """Equal texts; log-probabilities as nearly as sums in another order can be."""
    assert (got.text, got.tokens, got.finish_reason) == (expected.text, expected.tokens, expected.finish_reason)
    chosen, top = ([[getattr(each, name) for each in text.logprobs] for text in (got, expected)]
                   for name in ("chosen", "top"))  # fmt: skip
    assert chosen[0] == pytest.approx(chosen[1], abs=1e-4)
    assert [[token for token, _ in each] for each in top[0]] == [[token for token, _ in each] for each in top[1]]


def is_empty(batcher):
    scheduler, capacity = batcher.scheduler, batcher.scheduler.capacity
    assert not batcher.busy and not list(scheduler.everyone())
    assert sorted(capacity._free) == list(range(batcher.n_rows)) and not any(batcher.cache.lengths)
    return True


# --- texts ---


@pytest.mark.parametrize("options", [
    {"n_rows": 6}, {"n_rows": 2}, {"n_rows": 1}, {"n_rows": 3, "max_tokens": 3}, {"n_rows": 4, "max_tokens": 10**6},
    {"n_rows": 3, "max_tokens": 16, "cache": "sliding"}, {"n_rows": 4, "max_tokens": 9, "graphs": True},
    {"n_rows": 3, "slots": GangSlots}, {"n_rows": 3, "prefixes": True}, {"n_rows": 4, "patience": None},
], ids=str)  # fmt: skip
def test_texts_are_what_they_would_be_alone(model, alone, options):
    options = {k: PromptCache() if k == "prefixes" else v for k, v in options.items()}
    batcher = Batcher(model, TOKENIZER, **options)
    for _ in range(2):
        for got, expected in zip(batcher.generate(PROMPTS, PARAMS), alone):
            same(got, expected)
        assert is_empty(batcher)


@pytest.mark.parametrize("shape", SHAPES)
def test_for_all_kinds_of_models(shape):
    model = model_of(shape)
    expected = [generate(model, TOKENIZER, prompt, params) for prompt, params in zip(PROMPTS, PARAMS)]
    for got, text in zip(Batcher(model, TOKENIZER, 3, max_tokens=11).generate(PROMPTS, PARAMS), expected):
        same(got, text)


@pytest.mark.parametrize("seed", range(4))
def test_whenever_they_come_and_whatever_priority_they_have(model, alone, seed):
    luck = random.Random(seed)
    n_rows = luck.randint(1, 5)
    batcher = Batcher(
        model, TOKENIZER, n_rows, max_tokens=luck.randint(n_rows, 40), patience=luck.choice([3, 30, None])
    )
    order = luck.sample(range(6), 6)
    requests, texts = [], [Generation(len(batcher.encode(PROMPTS[i]))) for i in order]
    for i in order:
        requests.append(batcher.add(PROMPTS[i], PARAMS[i], priority=luck.randint(0, 2), user=luck.choice("ab")))
        serve(batcher, requests, texts, n=luck.randint(0, 9))
    serve(batcher, requests, texts)
    for i, text in zip(order, texts):
        same(text, alone[i])
    assert is_empty(batcher)


@pytest.mark.parametrize("seed", range(4))
def test_preemption_and_neighbours_who_are_called_off_change_nothing(model, alone, seed):
    luck = random.Random(seed)
    prefixes = PromptCache() if seed % 2 else None
    batcher = Batcher(model, TOKENIZER, 4, max_tokens=luck.randint(4, 60), prefixes=prefixes, slots=Shared)
    order = luck.sample(range(6), 6)
    requests, texts = [], []
    for i in order:
        texts += [Generation(len(batcher.encode(PROMPTS[i]))), Generation(0)]
        requests.append(batcher.add(PROMPTS[i], PARAMS[i], priority=luck.randint(0, 1)))
        requests.append(batcher.add("nobody reads this", SamplingParams(60, seed=i), priority=luck.randint(0, 1)))
        serve(batcher, requests, texts, n=luck.randint(0, 6))
    while batcher.busy:
        if luck.random() < 0.2:
            batcher.abort(requests[1 + 2 * luck.randrange(6)])  # running, waiting or gone
        serve(batcher, requests, texts, n=1)
    for i, text in zip(order, texts[::2]):
        same(text, alone[i])
    assert batcher.scheduler.n_preempted > 0 and is_empty(batcher)


def test_texts_end_as_they_do_alone(model):
    free = generate(model, TOKENIZER, PROMPTS, SamplingParams(24, temperature=0.0, stop_ids=()))
    endings = [{"stop": (text.text[3:5],)} for text in free if len(text.text) > 5]
    endings += [{"stop_ids": {text.tokens[place]}} for text in free[:3] for place in (0, 5)] + [{"max_new_tokens": 1}]
    batcher = Batcher(model, TOKENIZER, 4, max_tokens=20)
    for ending in endings:
        params = SamplingParams(**{"max_new_tokens": 24, "temperature": 0.0, "stop_ids": ()} | ending)
        assert batcher.generate(PROMPTS, params) == generate(model, TOKENIZER, PROMPTS, params)


def test_the_context_is_filled_and_not_exceeded(model):
    params, prompts = SamplingParams(200, 0.0, stop_ids=()), [[65] * n for n in (127, 120, 3)]
    got = Batcher(model, TOKENIZER, 2, max_tokens=50).generate(prompts, params)
    assert [len(text.tokens) for text in got] == [1, 8, 125]
    assert got == generate(model, TOKENIZER, prompts, params)


def test_stream_numbers_prompts_by_their_places(model, alone):
    batcher = Batcher(model, TOKENIZER, 2)
    for _ in range(2):  # the second time requests have other indices
        texts = [Generation(0) for _ in PROMPTS]
        for piece in batcher.stream(PROMPTS, PARAMS):
            append(texts[piece.index], piece)
        assert [text.text for text in texts] == [text.text for text in alone]
    same(batcher.generate(PROMPTS[0], PARAMS[0]), alone[0])


def test_selective_steps_give_the_logits_of_one_grid(model):
    works = [
        [(0, 1, 1), (2, 1, 1), (3, 40, 1)], [(1, 20, 0), (3, 1, 1), (0, 5, 2), (2, 33, 1)], [(2, 3, 3), (0, 17, 17)],
        [(0, 1, 1), (1, 1, 1)], [(0, 40, 1), (1, 40, 0), (2, 1, 0)],
    ]  # fmt: skip
    for build in (ContiguousCache, lambda *a, **k: SlidingCache(*a, chunk=64, **k)):
        for padded in (False, True):
            for work in works:
                logits = []
                for step in (Decoder.step, selective_step):
                    decoder = Decoder(model, build(model.specs, 4, 128, padded=padded))
                    decoder.step([(row, 7 + row, 0) for row in range(4)], list(range(34)))
                    logits.append(step(decoder, work, [i % 320 for i in range(7, 7 + sum(n for _, n, _ in work))]))
                assert len(logits[0]) == sum(n for *_, n in work)
                torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_the_lowest_free_row_is_given_out(model):
    batcher = Batcher(model, TOKENIZER, 4)
    requests = [batcher.add("a", SamplingParams(9, 0.0, stop_ids=())) for _ in range(4)]
    batcher.step()
    for place in (1, 3, 0):
        batcher.abort(requests[place])
    late = [batcher.add("a", SamplingParams(9, 0.0, stop_ids=())) for _ in range(3)]
    batcher.step()
    assert [request.row for request in late] == [0, 1, 3]  # rows side by side are read without a copy


# --- static batching, shared beginnings ---


def test_gangs_leave_together(model):
    batcher = Batcher(model, TOKENIZER, 2, max_tokens=10**6, slots=GangSlots)
    requests = [batcher.add("Hello", SamplingParams(n, 0.0, stop_ids=())) for n in (2, 6, 3, 3, 4)]
    seen = []
    while batcher.busy:
        batcher.step()
        seen.append([request.index for request in batcher.last.requests])
    assert seen == [[0, 1], [0, 1], *[[1]] * 4, [2, 3], [2, 3], [2, 3], [4], [4], [4], [4]]
    late = Batcher(model, TOKENIZER, 2, max_tokens=10**6, slots=GangSlots)
    late.add("Hello", SamplingParams(4, 0.0, stop_ids=()))
    late.step()
    late.add("Hello", SamplingParams(4, 0.0, stop_ids=()))  # the doors are open until the first decode
    late.step()
    assert len(late.last.work) == 1
    assert all(request.finish_reason for request in requests) and is_empty(batcher)


def test_gangs_also_open_their_doors_after_an_abort(model):
    batcher = Batcher(model, TOKENIZER, 2, slots=GangSlots)
    first, second = batcher.add("Hello"), batcher.add("a", SamplingParams(3, 0.0, stop_ids=()))
    batcher.step()
    third = batcher.add("b", SamplingParams(3, 0.0, stop_ids=()))
    batcher.step()
    batcher.abort(first)
    while not second.finish_reason:
        batcher.step()
        assert third.row is None
    batcher.step()
    assert third.row is not None


def test_shared_beginnings_are_restored(model):
    prefixes = PromptCache()
    batcher = Batcher(model, TOKENIZER, 2, prefixes=prefixes)
    start, params = "Once upon a time there was a ", SamplingParams(8, 0.0, stop_ids=())
    for number, word in enumerate(("cat", "dog", "cat")):
        read = batcher.scheduler.served[""]
        text = batcher.generate(start + word, params)
        assert text == generate(model, TOKENIZER, start + word, params)
        known = (0, len(start), len(start) + 2)[number]
        assert batcher.scheduler.served[""] - read == len(start) + 3 - known + 7
    assert prefixes.statistics.found == 2 * len(start) + 2


def test_beginnings_are_restored_within_their_space_alone(model):
    prefixes, params = PromptCache(), SamplingParams(8, 0.0, stop_ids=())
    batcher = Batcher(model, TOKENIZER, 1, prefixes=prefixes)
    requests = [batcher.add("Once upon a time", params, space=space) for space in (0, 3, 3, 4, 0)]
    while batcher.busy:
        batcher.step()
    assert [request.found for request in requests] == [0, 0, 15, 0, 15]
    assert prefixes.statistics.found == 30 and prefixes.tree.n_tokens == 3 * (16 + 7)
    expected = generate(model, TOKENIZER, "Once upon a time", params).tokens
    assert all(request.tokens[16:] == expected for request in requests)
    with pytest.raises(ValueError, match="space=-1 must be from 0 to"):
        batcher.add("a", space=-1)
    assert is_empty(batcher)


def test_what_was_found_is_what_lay_there_at_first(model):
    batcher = Batcher(model, TOKENIZER, 1, prefixes=PromptCache())
    batcher.generate("Once upon a time", SamplingParams(1, 0.0, stop_ids=()))
    request = batcher.add("Once upon a dream", SamplingParams(9, 0.0, stop_ids=()))
    for _ in range(3):
        batcher.step()
    batcher.add("No", SamplingParams(2, 0.0, stop_ids=()), priority=1)
    while batcher.busy:
        batcher.step()
    assert batcher.scheduler.n_preempted == 1 and request.found == len("Once upon a ")


# --- calling off, failing ---


def test_abort_at_any_moment(model, alone):
    batcher = Batcher(model, TOKENIZER, 2, max_tokens=8)
    decoding, reading, waiting = (batcher.add(PROMPTS[i], PARAMS[i]) for i in (1, 2, 3))
    batcher.step()
    assert decoding.tokens[1:] and reading.reading and waiting.row is None
    rows = (decoding.row, reading.row)
    for request in (reading, waiting, decoding, waiting, decoding):
        batcher.abort(request)
        assert request.finish_reason == ABORTED and request.row is None
    assert is_empty(batcher) and not any(batcher.cache.lengths[row] for row in rows) and batcher.step() == []
    ended = batcher.add("a", SamplingParams(1, 0.0, stop_ids=()))
    batcher.step()
    batcher.abort(ended)
    assert ended.finish_reason == "length"
    same(batcher.generate(PROMPTS[0], PARAMS[0]), alone[0])


def test_a_step_that_fails_leaves_an_empty_usable_batcher(model, alone, monkeypatch):
    prefixes = PromptCache()
    batcher = Batcher(model, TOKENIZER, 2, max_tokens=30, prefixes=prefixes)
    requests = [batcher.add(prompt, params) for prompt, params in zip(PROMPTS, PARAMS)]
    batcher.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
        with pytest.raises(RuntimeError, match="out of luck"):
            batcher.step()
    assert is_empty(batcher) and all(request.finish_reason for request in requests)
    assert prefixes.tree.n_tokens == 0  # keys that were never written are not remembered
    for got, expected in zip(batcher.generate(PROMPTS, PARAMS), alone):
        same(got, expected)


def test_a_stream_that_is_closed_leaves_nothing(model):
    batcher = Batcher(model, TOKENIZER, 2)
    stream = batcher.stream(PROMPTS, PARAMS)
    next(stream)
    assert batcher.busy
    with pytest.raises(ValueError, match="requests are being served"):
        next(batcher.stream(PROMPTS, PARAMS))
    stream.close()
    assert is_empty(batcher)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [([320], "token id 320 is none of this vocabulary"), ([-1], "token id -1"), ("x" * 128, "leaves no room to go on")],
)
def test_prompts_that_cannot_be_served(model, prompt, said):
    batcher = Batcher(model, TOKENIZER, 2)
    with pytest.raises(ValueError, match=said):
        batcher.add(prompt)
    with pytest.raises(ValueError, match=said):
        batcher.generate(["fine", prompt])
    assert is_empty(batcher)


def test_what_will_never_fit_leaves_nobody_behind(model):
    batcher = Batcher(model, TOKENIZER, 2, slots=Shared)
    with pytest.raises(ValueError, match="a text of 125 tokens will never fit in 110"):
        batcher.generate(["fine", "Hello"], [SamplingParams(4), SamplingParams(120)])
    assert is_empty(batcher)


def test_batchers_that_cannot_be(model):
    with pytest.raises(ValueError, match="max_tokens=3 must be at least n_rows=4"):
        Batcher(model, TOKENIZER, 4, max_tokens=3)
    with pytest.raises(ValueError, match="without a tokenizer"):
        Batcher(model, None)
    with pytest.raises(ValueError, match="logit_bias names token 257: ids go from 0 to 256"):
        Batcher(model, TOKENIZER).add("a", SamplingParams(logit_bias={257: 1.0}))
    with pytest.raises(ValueError, match="2 prompts and 1 sampling parameters"):
        Batcher(model, TOKENIZER).generate(["a", "b"], [SamplingParams()])


def test_the_model_is_put_into_eval_mode():
    model = model_of().train()
    Batcher(model, TOKENIZER)
    assert not model.training


if __name__ == "__main__":
    print("\n".join(f"{text.text!r} ({text.finish_reason})" for text in Batcher(model_of(), TOKENIZER, 3).generate(
        PROMPTS, PARAMS)))  # fmt: skip
    raise SystemExit(pytest.main([__file__]))
