"""Constraints: every text belongs to its language, whoever writes it; masks are those of the tokens."""

import re

import numpy as np
import pytest
import torch

from common import catalog
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer
from phase3_core_inference.project8_kv_cache.constraints import bits_of, mask_logits
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, Writer, generate
from phase3_core_inference.project8_kv_cache.sampling import Sampler

TOKENIZER = byte_tokenizer()
V = TOKENIZER.vocab_size


class Dates:
    """dddd-dd-dd, digit by digit; then nothing."""

    def __init__(self):
        self.text, self.finished = "", False

    def allowed(self):
        """A digit, or a hyphen where one stands."""
        return bits_of(b"-" if len(self.text) in (4, 7) else b"0123456789", V)

    def accept(self, token):
        """One character more."""
        assert not self.finished
        self.text += chr(token)
        self.finished = len(self.text) == 10


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "block_size": 96, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_ff": 48}
    model = Transformer(PRESETS["llama-7b"](**shape)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.25)
    return model


def test_masks_are_those_of_the_tokens():
    tokens = [[0, 31, 32, 69], [5], list(range(70))]
    logits = torch.randn(4, 70)

    class Fixed:
        finished = False

        def __init__(self, some):
            self.allowed = lambda: bits_of(some, 70)

    masked = mask_logits(logits, [3, 0, 1], [Fixed(some) for some in tokens])
    for place, some in zip((3, 0, 1), tokens):
        assert masked[place].isfinite().nonzero().flatten().tolist() == some
        assert torch.equal(masked[place, some], logits[place, some])
    assert torch.equal(masked[2], logits[2])
    with pytest.raises(ValueError, match="allows no token and has not finished"):
        mask_logits(logits, [0, 1], [Fixed([1]), Fixed([])])


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"temperature": 1.5, "top_p": 0.5}])
def test_texts_belong_to_the_language(model, options):
    params = [SamplingParams(40, seed=i, constraint=Dates, **options) for i in range(6)]
    free = SamplingParams(12, seed=9, stop_ids=())
    texts = generate(model, TOKENIZER, ["Born "] * 6 + ["x"], [*params, free])
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", text.text) and text.finish_reason == "stop" for text in texts[:6])
    assert texts[6] == generate(model, TOKENIZER, "x", free)  # a neighbour is not bound
    assert len({text.text for text in texts[:6]}) > 1 or options == {"temperature": 0.0}
    short = generate(model, TOKENIZER, "Born ", SamplingParams(4, seed=0, constraint=Dates))
    assert re.fullmatch(r"\d{4}", short.text) and short.finish_reason == "length"


def test_whoever_writes_writes_the_same(model):
    """Drafts, and blocks with fewer rows than texts: the texts of `generate` (project 13 tests its Runner)."""
    speculative = catalog.resolve("generators", "speculative")
    params = [SamplingParams(20, seed=i, constraint=Dates if i % 3 else None, stop_ids=()) for i in range(8)]
    prompts = ["Born ", "a", "The date: ", "x", "1984-", "", "été", "Hello there"]
    expected = [text.text for text in generate(model, TOKENIZER, prompts, params)]
    assert [text.text for text in speculative(model, TOKENIZER, prompts, params, rule="coupled")] == expected
    writer = Writer(model, TOKENIZER, n_rows=3, cache="paged")
    pieces = [[] for _ in prompts]
    for piece in writer.stream(prompts, params):
        pieces[piece.index].append(piece.text)
    assert ["".join(each) for each in pieces] == expected


@pytest.mark.parametrize("options", [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 2000, "top_p": 0.999}, {}])
def test_few_tokens_among_many_with_cut_tails(options):
    """What is masked is never drawn, also where candidates are looked at first; the odds are the model's."""
    size, some = 4096, [7, 1000, 4000]

    class Fixed:
        finished = False

        def allowed(self):
            return bits_of(some, size)

    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(0))
    logits[0, some] = torch.tensor([1.0, 1.5, 0.5])
    sampler, counts = Sampler(1, size, "cpu"), np.zeros(size)
    sampler.put(0, SamplingParams(seed=1, **options), 1, [1], [], Fixed())
    for position in range(3000):
        counts[sampler.draw(logits, [0], [position]).tokens[0]] += 1
    odds = logits[0, some].softmax(-1).numpy()
    if options == {"top_p": 0.9}:
        assert counts[some].sum() == 3000
    else:
        assert np.abs(counts[some] / 3000 - odds).max() < 0.03 and counts[some].sum() == 3000


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
