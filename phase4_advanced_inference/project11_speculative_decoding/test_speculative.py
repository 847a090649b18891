"""Speculation writes what plain decoding writes: for all caches, drafts, rules, settings and endings."""

import copy

import pytest
import torch

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, Writer, generate
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase3_core_inference.project8_kv_cache.sampling import Sampler
from phase3_core_inference.project8_kv_cache.sliding_cache import SlidingCache
from phase4_advanced_inference.project10_prompt_caching.prompt_cache import PromptCache
from phase4_advanced_inference.project11_speculative_decoding.drafts import ModelDraft, NGramDraft
from phase4_advanced_inference.project11_speculative_decoding.proposals import Proposal
from phase4_advanced_inference.project11_speculative_decoding.speculative import SpeculativeWriter, speculative_generate

TOKENIZER = byte_tokenizer()
PROMPTS = ["Hello", "a", "The quick brown fox jumps over it", "été"]
SHAPE = {"vocab_size": 320, "block_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32}
SHAPES = {
    "gpt2": PRESETS["gpt2"](**SHAPE, tie_head=False),
    "llama": PRESETS["llama-7b"](**SHAPE, n_kv_head=2, n_ff=48),
    "windows": PRESETS["llama-7b"](**SHAPE, n_kv_head=2, n_ff=48, windows=(7, None)),
}
GREEDY = SamplingParams(24, temperature=0.0, stop_ids=())
SETTINGS = {
    "greedy": GREEDY,
    "greedy, penalty": SamplingParams(24, temperature=0.0, repetition_penalty=1.4, stop_ids=()),
    "plain": SamplingParams(24, seed=1, stop_ids=()),
    "temperature, top-k": SamplingParams(24, temperature=0.7, top_k=20, seed=2, stop_ids=()),
    "top-p, penalty": SamplingParams(24, top_p=0.8, repetition_penalty=1.3, seed=3, stop_ids=()),
    "counts, bias": SamplingParams(
        24, presence_penalty=0.5, frequency_penalty=1.0, logit_bias={97: 2.0, 98: -100}, seed=5, stop_ids=()
    ),
    "min-p": SamplingParams(24, temperature=1.5, min_p=0.1, seed=4, stop_ids=()),
}


def model_of(shape):
    torch.manual_seed(0)
    model = Transformer(shape).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.25)
    return model


def nearly(model, scale=0.03):
    """A draft that often agrees: the same weights, shaken."""
    draft, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for parameter in draft.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return draft


@pytest.fixture(scope="module")
def model():
    return model_of(SHAPES["llama"])


def drafts_for(model):
    """One of each kind: nearly right, nearly always wrong, and the text itself."""
    return [ModelDraft(nearly(model)), ModelDraft(nearly(model, 1.0)), NGramDraft()]


def tokens_of(texts):
    return [text.tokens for text in texts]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_text_is_that_of_plain_decoding(shape):
    model = model_of(SHAPES[shape])
    expected = tokens_of(generate(model, TOKENIZER, PROMPTS, GREEDY))
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)  # they say something
    for cache in ("contiguous", "sliding"):
        for draft in drafts_for(model):
            for rule in ("rejection", "coupled"):
                options = {"draft": draft, "k": 5, "rule": rule, "cache": cache, "chunk": 8}
                assert tokens_of(speculative_generate(model, TOKENIZER, PROMPTS, GREEDY, **options)) == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_coupled_text_is_that_of_plain_decoding(model, name):
    params = SETTINGS[name]
    expected = tokens_of(generate(model, TOKENIZER, PROMPTS, params))
    for draft in drafts_for(model):
        texts = speculative_generate(model, TOKENIZER, PROMPTS, params, draft, rule="coupled")
        assert tokens_of(texts) == expected


def test_a_draft_whose_candidates_are_not_enough_leaves_the_text_as_it_is(monkeypatch):
    """The target is sure of itself, the draft's odds are flat: a cut keeps more of them than are looked at first."""
    shape = PRESETS["llama-7b"](**SHAPE | {"vocab_size": 4096}, n_kv_head=2, n_ff=48)
    target, flat = model_of(shape), Transformer(shape).eval()
    for parameter in target.parameters():
        parameter.mul_(4)
    params = SamplingParams(24, temperature=1.0, top_p=0.9, seed=3, stop_ids=())
    prompts, tokenizer, launched = [[1, 2, 3], [7]], NumberTokenizer(4096), []
    launch = Sampler.launch
    expected = tokens_of(generate(target, tokenizer, prompts, params))

    def watched(*arguments):
        launched.append(launch(*arguments))
        return launched[-1]

    monkeypatch.setattr(Sampler, "launch", watched)
    texts = speculative_generate(target, tokenizer, prompts, params, ModelDraft(flat), rule="coupled")
    assert tokens_of(texts) == expected
    assert sum(int((tokens < 0).sum()) for tokens in launched) > 20


def test_a_batch_in_which_each_wants_something_else(model):
    params = [SETTINGS["greedy"], SETTINGS["top-p, penalty"], SETTINGS["plain"], SETTINGS["greedy, penalty"]]
    expected = tokens_of(generate(model, TOKENIZER, PROMPTS, params))
    draft = ModelDraft(nearly(model))
    texts = speculative_generate(model, TOKENIZER, PROMPTS, params, draft, rule="coupled")
    assert tokens_of(texts) == expected
    texts = tokens_of(speculative_generate(model, TOKENIZER, PROMPTS, params, draft, rule="rejection"))
    assert [texts[0], texts[3]] == [expected[0], expected[3]]  # the greedy ones, among others that are not


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
def test_a_text_does_not_depend_on_its_neighbours(model, rule):
    draft, params = ModelDraft(nearly(model)), SETTINGS["temperature, top-k"]
    alone = [speculative_generate(model, TOKENIZER, p, params, draft, rule=rule).tokens for p in PROMPTS]
    for options in ({}, {"n_rows": 2}, {"n_rows": 3, "chunk": 3}, {"graphs": True, "n_rows": 3}):
        texts = speculative_generate(model, TOKENIZER, PROMPTS, params, draft, rule=rule, **options)
        assert tokens_of(texts) == alone
    mixed = [params, GREEDY, SamplingParams(3, seed=9), params]
    texts = tokens_of(speculative_generate(model, TOKENIZER, PROMPTS, mixed, draft, rule=rule))
    assert [texts[0], texts[3]] == [alone[0], alone[3]]


def test_the_same_text_by_rejection_for_the_same_seed_alone(model):
    draft = ModelDraft(nearly(model))
    texts = [speculative_generate(model, TOKENIZER, "Hello", SamplingParams(24, seed=seed, stop_ids=()), draft).tokens
             for seed in (1, 1, 2)]  # fmt: skip
    assert texts[0] == texts[1] != texts[2]
    # The words are others than those of plain decoding: only their odds are the same.
    assert texts[0] != generate(model, TOKENIZER, "Hello", SamplingParams(24, seed=1, stop_ids=())).tokens


@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_perfect_draft_is_kept_whole(model, k):
    for rule in ("rejection", "coupled"):
        for params in (GREEDY, SETTINGS["top-p, penalty"]):
            writer = SpeculativeWriter(model, TOKENIZER, ModelDraft(copy.deepcopy(model)), k, rule, n_rows=4)
            for _ in writer.stream(PROMPTS, [params] * 4):
                pass
            assert writer.tally.kept >= writer.tally.drafted - 2  # the last bit of a logit may differ
            assert writer.tally.tokens_per_step > 0.7 * (k + 1)


def test_endings_are_those_of_plain_decoding(model):
    free = generate(model, TOKENIZER, PROMPTS, GREEDY)
    draft = ModelDraft(copy.deepcopy(model))  # long bursts: ends fall into their middle
    endings = [{"stop": (text.text[7:9],)} for text in free if len(text.text) > 9]
    endings += [{"stop_ids": {text.tokens[place]}} for text in free for place in (1, 6, 11)]
    endings += [{"max_new_tokens": n} for n in (1, 2, 3, 5, 6)]
    for ending in endings:
        params = SamplingParams(**{"max_new_tokens": 24, "temperature": 0.0, "stop_ids": ()} | ending)
        expected = generate(model, TOKENIZER, PROMPTS, params)
        assert speculative_generate(model, TOKENIZER, PROMPTS, params, draft, k=6) == expected


def test_the_context_is_filled_and_not_exceeded(model):
    params = SamplingParams(50, 0.0, stop_ids=())
    prompts = [TOKENIZER.encode("x" * n) for n in (90, 94, 95, 60)]
    expected = generate(model, TOKENIZER, prompts, params)
    assert [len(text.tokens) for text in expected] == [6, 2, 1, 36]
    for draft in drafts_for(model):
        assert speculative_generate(model, TOKENIZER, prompts, params, draft, k=7) == expected


def test_a_draft_that_reads_less_than_its_target(model):
    short = Transformer(PRESETS["llama-7b"](**SHAPE | {"block_size": 20}, n_kv_head=2, n_ff=48))
    expected = tokens_of(generate(model, TOKENIZER, PROMPTS, GREEDY))
    assert tokens_of(speculative_generate(model, TOKENIZER, PROMPTS, GREEDY, ModelDraft(short))) == expected


def test_pieces_come_one_a_token_with_their_logprobs(model):
    params = SamplingParams(12, temperature=0.0, logprobs=2, repetition_penalty=1.2, stop_ids=())
    expected = generate(model, TOKENIZER, PROMPTS, params)
    texts = speculative_generate(model, TOKENIZER, PROMPTS, params, ModelDraft(nearly(model)))
    for text, other in zip(texts, expected):
        assert text.tokens == other.tokens and len(text.logprobs) == 12
        assert [x.chosen for x in text.logprobs] == pytest.approx([x.chosen for x in other.logprobs], abs=1e-4)
        assert [[t for t, _ in x.top] for x in text.logprobs] == [[t for t, _ in x.top] for x in other.logprobs]


def test_a_writer_serves_again_and_forgets_what_was_broken_off(model):
    writer = SpeculativeWriter(model.train(), TOKENIZER, ModelDraft(nearly(model)), n_rows=2)
    pieces = writer.stream(["Hello", "a"], [GREEDY, GREEDY])
    for _ in range(9):
        next(pieces)
    with pytest.raises(ValueError, match="another stream of this Writer is not finished"):
        next(writer.stream(["a"], [GREEDY]))
    pieces.close()
    assert writer.cache.lengths == writer.speculation.draft.cache.lengths == [0, 0] and model.training
    model.eval()
    tokens = [piece.token for piece in writer.stream(PROMPTS[2:], [GREEDY] * 2) if piece.index == 1]
    assert tokens == generate(model, TOKENIZER, PROMPTS[3], GREEDY).tokens


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("chunk", [3, 64])
def test_beside_remembered_beginnings(model, rule, chunk):
    """What was verified, rejected or ended in the middle of a burst is remembered right: all later texts are, too."""
    prompts = [*PROMPTS, "The quick brown fox sleeps", "Hello", "Hello there"]
    settings = [GREEDY] if rule == "rejection" else [GREEDY, SETTINGS["temperature, top-k"]]
    for params in settings:
        expected = tokens_of(generate(model, TOKENIZER, prompts, [params] * len(prompts)))
        for draft in drafts_for(model):
            prefixes, texts = PromptCache(), []
            writer = SpeculativeWriter(model, TOKENIZER, draft, 4, rule, chunk=chunk, prefixes=prefixes)
            for prompt in prompts * 2:
                texts.append([p.token for p in writer.stream([prompt], [params])])
            assert texts == expected * 2
            assert prefixes.statistics.found > sum(len(TOKENIZER.encode(prompt)) - 1 for prompt in prompts)


def test_fewer_steps_of_the_target(model):
    """What it is for: the target is called once for several tokens."""
    calls = []
    writer = SpeculativeWriter(model, TOKENIZER, ModelDraft(copy.deepcopy(model)), k=4)
    step = writer.decoder.step
    writer.decoder.step = lambda work, tokens: calls.append(work) or step(work, tokens)
    plain = [piece.token for piece in Writer(model, TOKENIZER).stream(["Hello"], [GREEDY])]
    assert [piece.token for piece in writer.stream(["Hello"], [GREEDY])] == plain
    assert calls == [[(0, 5, 1)], *[[(0, 5, 5)]] * 4, [(0, 3, 3)]]  # 1 token, 4 times 5, the last 3


class _Liar:
    """A draft that proposes what it was told to."""

    def __init__(self, answer):
        self.answer = answer

    def prepare(self, n_rows, capacity, vocab_size):
        """Nothing."""

    def propose(self, asks, draw):
        """The same, always."""
        return Proposal.of([self.answer] * len(asks))

    def free(self, row):
        """Nothing."""


@pytest.mark.parametrize(
    ("shape", "odds", "message"),
    [((2, 1), None, r"\(2, 1\): give \(2, 2 or more\)"), ((1, 3), None, r"\(1, 3\): give"), ((3, 3), None, r"\(3, 3\)"),
     ((2, 3), (2, 2, 9), r"odds of shape \(2, 2, 9\)")],
)  # fmt: skip
def test_a_draft_whose_tensors_are_not_what_it_says_is_refused(model, shape, odds, message):
    """Too narrow a tensor would be judged a place off: another text, and no error."""
    draft = _Liar([])
    draft.propose = lambda asks, draw: Proposal(
        torch.ones(shape, dtype=torch.long), [min(2, ask.most) for ask in asks], odds and torch.ones(odds)
    )
    with pytest.raises(ValueError, match=message):
        speculative_generate(model, TOKENIZER, ["ab", "cd"], GREEDY, draft, k=3, rule="coupled")


def test_what_cannot_be_done_says_why(model):
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        speculative_generate(model, TOKENIZER, "a", k=0)
    with pytest.raises(ValueError, match="rule='luck' is unknown: use one of rejection, coupled"):
        speculative_generate(model, TOKENIZER, "a", rule="luck")
    small = Transformer(PRESETS["cpu-tiny"](vocab_size=64))
    with pytest.raises(ValueError, match="the draft knows 64 tokens, the text has 257"):
        speculative_generate(model, TOKENIZER, "a", draft=ModelDraft(small))
    with pytest.raises(ValueError, match="proposed 9 tokens for row 0: at most 4 fit"):
        speculative_generate(model, TOKENIZER, "a", GREEDY, _Liar([1] * 9))
    with pytest.raises(ValueError, match="some are no tokens: ids go from 0 to 256"):
        speculative_generate(model, TOKENIZER, "a", GREEDY, _Liar([1, 257]))

    def ring(*arguments, **options):
        return SlidingCache(*arguments, chunk=4, **options)

    with pytest.raises(ValueError, match=r"k=4 must be .* what the cache takes in one step \(4\)"):
        speculative_generate(model, TOKENIZER, "a", k=4, cache=ring)
    with pytest.raises(ValueError, match="without a tokenizer"):
        speculative_generate(model, None, "a")
    with pytest.raises(ValueError, match="2 prompts and 1 sampling parameters"):
        speculative_generate(model, TOKENIZER, ["a", "b"], [GREEDY])


def test_any_guess_leaves_the_text_as_it_is(model):
    expected = generate(model, TOKENIZER, "Hello", GREEDY)
    for answer in ([], [7], [7, 7]):
        params = SamplingParams(24, temperature=0.0, stop_ids=())
        writer = SpeculativeWriter(model, TOKENIZER, _Limited(answer), n_rows=1)
        assert [p.token for p in writer.stream(["Hello"], [params])] == expected.tokens
        assert writer.tally.steps == 23 - writer.tally.kept


class _Limited(_Liar):
    """One that knows how much fits."""

    def propose(self, asks, draw):
        """As much as fits."""
        return Proposal.of([self.answer[: ask.most] for ask in asks])


if __name__ == "__main__":
    target = model_of(SHAPES["llama"])
    for text in speculative_generate(target, TOKENIZER, PROMPTS, GREEDY, ModelDraft(nearly(target))):
        print(text)
    raise SystemExit(pytest.main([__file__]))
