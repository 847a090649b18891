"""Generation: the text of transformers, the same alone and in any batch, in streams, with stops, within limits."""

import numpy as np
import pytest
import torch
import transformers

from phase1_foundation.project1_minimal_gpt import sampling as project1
from phase1_foundation.project3_pretrain.hub import from_huggingface
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.writing import KnownTokens
from phase2_finetuning.project4_sft.answering import answer as answer_uncached
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens
from phase3_core_inference.project8_kv_cache.answering import KeptWriter, answer
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, Writer, generate, stream

TOKENIZER = byte_tokenizer()
GREEDY = SamplingParams(20, temperature=0.0, stop_ids=())
PROMPTS = ["Hello", "a", "The quick brown fox jumps over it", "été"]
DRAWN = SamplingParams(24, temperature=1.0, top_k=40, seed=5, stop_ids=())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = PRESETS["llama-7b"](vocab_size=320, block_size=96, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ff=48)
    model = Transformer(shape).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model


THEIRS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=257, n_positions=96, n_layer=2, n_head=4, n_embd=32)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=257, max_position_embeddings=96, num_hidden_layers=2, hidden_size=32,
                                 num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(vocab_size=257, max_position_embeddings=96, num_hidden_layers=2, hidden_size=32,
                                   num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, sliding_window=7)
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", THEIRS)
def test_greedy_text_is_that_of_transformers(family, tmp_path):
    torch.manual_seed(1)
    theirs = THEIRS[family]().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    theirs.save_pretrained(tmp_path)
    ours, _ = from_huggingface(tmp_path)
    prompts = [TOKENIZER.encode(prompt) for prompt in PROMPTS]
    expected = []
    for prompt in prompts:
        out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                              max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)  # fmt: skip
        expected.append(out[0, len(prompt) :].tolist())
    assert len({tuple(tokens) for tokens in expected}) == len(expected)  # they say something
    for cache in ("contiguous", "sliding"):
        texts = generate(ours, TOKENIZER, prompts, GREEDY, cache=cache, chunk=8)
        assert [text.tokens for text in texts] == expected
        assert all(text.finish_reason == "length" for text in texts)


def test_greedy_text_is_that_without_a_cache(model):
    known = KnownTokens(model, TOKENIZER.vocab_size)
    for prompt in PROMPTS:
        expected = list(project1.stream(known, TOKENIZER.encode(prompt), 20, temperature=0.0))
        text = generate(model, TOKENIZER, prompt, GREEDY)
        assert text.tokens == expected and text.text == TOKENIZER.decode(expected)


def test_a_text_is_the_same_alone_in_a_batch_and_in_chunks(model):
    alone = [generate(model, TOKENIZER, prompt, DRAWN).tokens for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in alone}) == len(PROMPTS)
    for options in ({}, {"chunk": 3}, {"n_rows": 3}, {"cache": "sliding"}, {"graphs": True}):
        assert [t.tokens for t in generate(model, TOKENIZER, PROMPTS, DRAWN, **options)] == alone, options
    mixed = [DRAWN, GREEDY, SamplingParams(5, seed=9), DRAWN]
    texts = generate(model, TOKENIZER, PROMPTS, mixed)
    assert [texts[0].tokens, texts[3].tokens] == [alone[0], alone[3]] and len(texts[2].tokens) == 5
    assert texts[1].tokens == generate(model, TOKENIZER, PROMPTS[1], GREEDY).tokens


def test_seeds(model):
    other = SamplingParams(24, temperature=1.0, top_k=40, seed=6, stop_ids=())
    unseeded = SamplingParams(24, temperature=1.0, stop_ids=())
    first = generate(model, TOKENIZER, "Hello", DRAWN).tokens
    assert first == generate(model, TOKENIZER, "Hello", DRAWN).tokens
    assert first != generate(model, TOKENIZER, "Hello", other).tokens
    assert generate(model, TOKENIZER, "Hello", unseeded).tokens != generate(model, TOKENIZER, "Hello", unseeded).tokens


def test_a_stream_is_the_text_in_pieces(model):
    whole = generate(model, TOKENIZER, PROMPTS, DRAWN)
    texts, reasons = [""] * 4, [None] * 4
    for piece in stream(model, TOKENIZER, PROMPTS, DRAWN):
        assert reasons[piece.index] is None  # nothing comes after the last piece
        texts[piece.index] += piece.text
        reasons[piece.index] = piece.finish_reason
    assert texts == [text.text for text in whole] and reasons == ["length"] * 4


def test_a_stop_text_ends_it_and_is_not_part_of_it(model):
    free = generate(model, TOKENIZER, "Hello", GREEDY)
    stop = free.text[6:9]
    cut = generate(model, TOKENIZER, "Hello", SamplingParams(20, 0.0, stop=("never said", stop), stop_ids=()))
    assert cut.finish_reason == "stop" and cut.text == free.text[: free.text.find(stop)]
    assert cut.tokens == free.tokens[: len(cut.tokens)] and len(cut.tokens) < 20


def test_tokens_that_end_a_text(model):
    free = generate(model, TOKENIZER, "Hello", GREEDY)
    token = free.tokens[7]
    first = free.tokens.index(token)
    cut = generate(model, TOKENIZER, "Hello", SamplingParams(20, 0.0, stop_ids={token}))
    assert cut.finish_reason == "stop" and cut.tokens == free.tokens[:first]
    assert cut.text == TOKENIZER.decode(cut.tokens)


class _Ends(torch.nn.Module):
    """Says one token again and again."""

    def __init__(self, model, token):
        super().__init__()
        self.model, self.token, self.config, self.specs = model, token, model.config, model.specs

    def forward(self, tokens, plan=None):
        logits = self.model(tokens, plan)
        return torch.nn.functional.one_hot(torch.full(logits.shape[:-1], self.token), logits.shape[-1]).float()


def test_the_end_of_text_ends_it_by_default(model):
    ends = _Ends(model, TOKENIZER.eot_id)
    text = generate(ends, TOKENIZER, "Hello", SamplingParams(9, temperature=0.0))
    assert (text.tokens, text.text, text.finish_reason) == ([], "", "stop")
    assert len(generate(ends, TOKENIZER, "Hello", SamplingParams(9, 0.0, stop_ids=())).tokens) == 9


def test_logprobs_are_those_of_the_parallel_forward(model):
    text = generate(model, TOKENIZER, "Hello", SamplingParams(10, seed=2, logprobs=3, stop_ids=()))
    tokens = TOKENIZER.encode("Hello") + text.tokens
    exact = model(torch.tensor([tokens]))[0, 4:-1, : TOKENIZER.vocab_size].log_softmax(-1)
    assert [own.chosen for own in text.logprobs] == pytest.approx(
        exact.gather(-1, torch.tensor(text.tokens).unsqueeze(-1)).flatten().tolist(), abs=1e-4
    )
    assert [[token for token, _ in own.top] for own in text.logprobs] == exact.topk(3).indices.tolist()


def test_biases_ban_and_force_tokens(model):
    params = SamplingParams(8, 0.0, logit_bias={97: 100.0}, stop_ids=())
    assert generate(model, TOKENIZER, "Hello", params).text == "a" * 8
    free = generate(model, TOKENIZER, "Hello", SamplingParams(8, 0.0, stop_ids=()))
    banned = dict.fromkeys(free.tokens, -100.0)
    assert not set(banned) & set(generate(model, TOKENIZER, "Hello", SamplingParams(8, 0.0, logit_bias=banned)).tokens)
    with pytest.raises(ValueError, match="logit_bias names token 257: ids go from 0 to 256"):
        generate(model, TOKENIZER, "a", SamplingParams(logit_bias={257: 1.0}))


def test_the_context_is_filled_and_not_exceeded(model):
    prompt = TOKENIZER.encode("x" * 90)
    text = generate(model, TOKENIZER, prompt, SamplingParams(50, 0.0, stop_ids=()))
    assert len(text.tokens) == 6 and text.finish_reason == "length" and text.prompt_tokens == 90
    with pytest.raises(ValueError, match="a prompt of 96 tokens leaves no room to go on: capacity=96"):
        generate(model, TOKENIZER, "x" * 96)
    with pytest.raises(ValueError, match="a prompt of 5 tokens leaves no room to go on: capacity=5"):
        stream(model, TOKENIZER, "Hello", GREEDY, capacity=5)  # at once, not at the first piece


def test_an_empty_prompt_begins_a_document(model):
    text = generate(model, TOKENIZER, "", GREEDY)
    assert text.tokens == generate(model, TOKENIZER, [TOKENIZER.eot_id], GREEDY).tokens


def test_what_cannot_be_generated_says_why(model):
    with pytest.raises(ValueError, match="0 prompts"):
        generate(model, TOKENIZER, [])
    with pytest.raises(ValueError, match="2 prompts and 1 sampling parameters"):
        generate(model, TOKENIZER, ["a", "b"], [GREEDY])
    with pytest.raises(ValueError, match="without a tokenizer"):
        generate(model, None, "a")
    with pytest.raises(ValueError, match="unknown name 'ghost' in the catalog group 'caches': known are contiguous"):
        generate(model, TOKENIZER, "a", cache="ghost")
    with pytest.raises(ValueError, match="chunk=0"):
        generate(model, TOKENIZER, "a", chunk=0)


def test_a_writer_forgets_a_text_that_was_not_finished(model):
    writer = Writer(model.train(), TOKENIZER, n_rows=2)
    pieces = writer.stream(["Hello", "a"], [GREEDY, GREEDY])
    next(pieces)
    pieces.close()
    assert writer.cache.lengths == [0, 0] and model.training  # the mode is given back
    model.eval()
    tokens = [piece.token for piece in writer.stream(["Hello"], [GREEDY])]
    assert tokens == generate(model, TOKENIZER, "Hello", GREEDY).tokens


def test_two_streams_of_one_writer_do_not_mix(model):
    writer, whole = Writer(model, TOKENIZER, n_rows=2, chunk=1), generate(model, TOKENIZER, PROMPTS, GREEDY)
    once = SamplingParams(1, 0.0, stop_ids=())
    first = writer.stream(["a", PROMPTS[2]], [once, GREEDY])
    assert next(first).finish_reason == "length" and writer.cache.lengths == [0, 0]  # the second is not yet read
    with pytest.raises(ValueError, match="another stream of this Writer is not finished: close it, or use a second"):
        next(writer.stream(["Hello"], [GREEDY]))
    assert [piece.token for piece in first] == whole[2].tokens
    last = writer.stream(["a"], [once])
    assert next(last).finish_reason == "length"  # finished, though nobody asked for what comes after
    second = writer.stream(["Hello"], [GREEDY])
    tokens = [next(second).token]
    assert list(last) == [] and tokens + [piece.token for piece in second] == whole[0].tokens
    assert writer.cache.lengths == [0, 0]


def test_tokens_of_any_kind_and_only_those_of_the_vocabulary(model):
    tokens = TOKENIZER.encode("Hello")
    expected = generate(model, TOKENIZER, tokens, GREEDY).tokens
    for prompt in (torch.tensor(tokens), np.array(tokens, dtype=np.int32), list(np.array(tokens)), tuple(tokens)):
        assert generate(model, TOKENIZER, prompt, GREEDY).tokens == expected
        assert generate(model, TOKENIZER, [prompt, "a"], GREEDY)[0].tokens == expected
    assert [text.tokens for text in generate(model, TOKENIZER, torch.tensor([tokens] * 2), GREEDY)] == [expected] * 2
    last = TOKENIZER.vocab_size - 1
    for wrong in (-1, last + 1, 10**6, 2**70, -(2**70)):
        with pytest.raises(ValueError, match=f"token id {wrong} is none of this vocabulary, .* from 0 to {last}"):
            generate(model, TOKENIZER, [5, wrong, 7], GREEDY)
    with pytest.raises(TypeError):
        generate(model, TOKENIZER, [5, 1.5], GREEDY)


def test_compiled_decoding_knows_few_lengths(model):
    writer = Writer(model, TOKENIZER, compiled=True)
    assert {writer.cache.round_keys(n) for n in range(1, 97)} == {64, 128}


def test_a_kept_writer_grows_and_answers_the_same():
    template = ChatTemplate(with_chat_tokens(TOKENIZER))
    torch.manual_seed(0)
    config = PRESETS["cpu-tiny"](vocab_size=template.tokenizer.vocab_size, block_size=256)
    model = Transformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    kept, writers = KeptWriter(model, template.tokenizer), []
    for question in ("Hi", "So?", "What is it? " * 9, "Hi"):
        messages = [{"role": "user", "content": question}]
        own = "".join(answer(model, template, messages, 20, seed=3))
        assert "".join(answer(model, template, messages, 20, seed=3, writer=kept)) == own
        writers.append(kept.with_room(1))
    assert writers[0] is writers[1] and writers[0].room == 64
    assert writers[2] is writers[3] and writers[2].room == 256


def test_an_answer_is_that_without_a_cache():
    tokenizer = with_chat_tokens(TOKENIZER)
    template = ChatTemplate(tokenizer)
    torch.manual_seed(0)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=tokenizer.vocab_size)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for question in ("Hi", "What is it? " * 9):
        texts, ends = [], []
        for way in (answer, answer_uncached):
            words, pieces = way(model, template, [{"role": "user", "content": question}], 30, 0.0, None, None), []
            while True:
                try:
                    pieces.append(next(words))
                except StopIteration as end:
                    ends.append(end.value)
                    break
            texts.append("".join(pieces))
        assert texts[0] == texts[1] and ends[0] == ends[1] and len(texts[0]) > 5


if __name__ == "__main__":
    small = Transformer(PRESETS["cpu-tiny"](vocab_size=320)).eval()
    for piece in stream(small, TOKENIZER, ["Hello", "a"], SamplingParams(4, seed=1)):
        print(piece)
    raise SystemExit(pytest.main([__file__]))
