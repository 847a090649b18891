"""Reuse of keys and values: the same logits and texts, exact hits, files, other models, and what must be refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.answering import KeptWriter
from phase3_core_inference.project8_kv_cache.decoder import Decoder
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, Writer
from phase3_core_inference.project8_kv_cache.kv_cache import ContiguousCache
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase3_core_inference.project8_kv_cache.sliding_cache import SlidingCache
from phase3_core_inference.project9_flash_attention.cached_attention import flash_cache
from phase4_advanced_inference.project10_prompt_caching.prompt_cache import PromptCache
from phase4_advanced_inference.project10_prompt_caching.segments import Segment, fingerprint

SIZES = {"vocab_size": 97, "block_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32}
CONFIGS = {
    "gpt2": PRESETS["gpt2"](**SIZES),
    "llama": PRESETS["llama-7b"](**SIZES, n_kv_head=2),
    "windows": PRESETS["llama-7b"](**SIZES, n_kv_head=2, windows=(8, None)),
}


TOKENIZER = NumberTokenizer(97)


def model_of(name="llama", seed=0):
    torch.manual_seed(seed)
    model = Transformer(CONFIGS[name]).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def text_of(n, seed=0):
    return torch.randint(0, 97, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def write(writer, prompts, n=12, **options):
    params = SamplingParams(n, stop_ids=(), **({"temperature": 0.0} | options))
    texts = {}
    for piece in writer.stream(prompts, [params] * len(prompts)):
        texts.setdefault(piece.index, []).append(piece.token)
    return [texts[i] for i in range(len(prompts))]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("n_known", [1, 17, 59])
def test_logits_behind_a_known_beginning_are_those_without(name, n_known):
    model, text, prefixes = model_of(name), text_of(60), PromptCache()
    first = ContiguousCache(model.specs, 1, 96)
    Decoder(model, first).step([(0, n_known, 0)], text[:n_known])
    prefixes.keep(first, 0, text[:n_known])
    cache = ContiguousCache(model.specs, 3, 96)
    assert prefixes.restore(cache, 2, text) == n_known and cache.lengths == [0, 0, n_known]
    got = Decoder(model, cache).step([(2, 60 - n_known, 60 - n_known)], text[n_known:])
    with torch.no_grad():
        torch.testing.assert_close(got, model(torch.tensor(text))[n_known:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["contiguous", flash_cache])
@pytest.mark.parametrize("name", CONFIGS)
def test_texts_are_those_without_reuse_whatever_is_shared(name, cache):
    """Prompts that share nothing, something, everything; several in a batch; greedy and drawn."""
    model, text = model_of(name), text_of(60)
    prompts = [text[:40], text[:40], text[:20] + text_of(15, 1), text[:41], text_of(9, 2), text[:1]]
    for options in ({}, {"temperature": 1.0, "top_k": 20, "seed": 3}):
        plain = write(Writer(model, TOKENIZER, 2, cache=cache), prompts, **options)
        prefixes = PromptCache()
        writer = Writer(model, TOKENIZER, 2, cache=cache, prefixes=prefixes)
        assert [write(writer, [p], **options)[0] for p in prompts] == plain
        assert write(writer, prompts, **options) == plain  # now everything is known, and two share a batch
        assert prefixes.statistics.found > 0


def test_hits_are_counted_exactly_and_the_last_token_is_never_taken():
    model, prefixes, text = model_of(), PromptCache(), text_of(40)
    writer = Writer(model, TOKENIZER, prefixes=prefixes)
    ((*written,),) = write(writer, [text], 5)
    s = prefixes.statistics
    assert (s.asked, s.found, s.inserted) == (39, 0, 44)  # the last token that was drawn has no keys yet
    write(writer, [text], 1)
    assert (s.asked, s.found, s.inserted) == (78, 39, 44)
    assert prefixes.tree.known(text + written) == 44
    size = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head size, bytes
    assert prefixes.tree.nbytes == 44 * size


def test_the_next_turn_reads_only_what_is_new_also_in_a_bigger_writer():
    model, prefixes, text = model_of(), PromptCache(), text_of(80)
    kept = KeptWriter(model, TOKENIZER, prefixes)
    small = kept.with_room(40)
    write(small, [text[:30]], 1)
    big = kept.with_room(96)
    assert big is not small
    write(big, [text], 1)
    assert prefixes.statistics.found == 30


def test_an_interrupted_stream_remembers_nothing_and_frees_its_row():
    model, prefixes = model_of(), PromptCache()
    writer = Writer(model, TOKENIZER, prefixes=prefixes)
    stream = writer.stream([text_of(20)], [SamplingParams(8, 0.0, stop_ids=())])
    next(stream)
    stream.close()
    assert prefixes.tree.n_tokens == 0 and writer.cache.lengths == [0]


def test_a_budget_is_kept_and_texts_stay_right():
    model, size = model_of(), 256
    prefixes = PromptCache(30 * size)
    writer, plain = Writer(model, TOKENIZER, prefixes=prefixes), Writer(model, TOKENIZER)
    for seed in (0, 1, 0, 2, 1):
        prompt = text_of(25, seed)
        assert write(writer, [prompt]) == write(plain, [prompt])
        assert prefixes.tree.nbytes <= 30 * size
    assert prefixes.statistics.evicted > 0


def test_segments_split_into_copies():
    layers = [(torch.arange(12.0).view(6, 1, 2), torch.ones(6, 1, 2)) for _ in range(2)]
    head, tail = Segment(layers).split(2)
    assert (len(head), len(tail), head.nbytes, tail.nbytes) == (2, 4, 2 * 2 * 2 * 2 * 4, 4 * 2 * 2 * 2 * 4)
    assert head.layers[0][0].untyped_storage().nbytes() == 16  # not the memory of the whole
    assert torch.equal(torch.cat([head.layers[1][0], tail.layers[1][0]]), layers[1][0])


def test_what_was_written_to_disk_is_known_again(tmp_path):
    model, text, prefixes = model_of(), text_of(40), PromptCache()
    writer = Writer(model, TOKENIZER, prefixes=prefixes)
    prompts = [text, text[:20] + text_of(10, 1), text[:20] + text_of(10, 2)]
    texts = [write(writer, [p])[0] for p in prompts]
    n = prefixes.save(tmp_path, model)
    assert prefixes.save(tmp_path, model) == n == len(list(tmp_path.glob("*.safetensors")))
    again = PromptCache()
    assert again.load(tmp_path, model) == prefixes.tree.n_tokens == again.tree.n_tokens
    assert again.load(tmp_path, model) == 0
    assert [write(Writer(model, TOKENIZER, prefixes=again), [p])[0] for p in prompts] == texts
    assert again.statistics.found == sum(len(p) - 1 for p in prompts)
    tight = PromptCache(25 * 256)
    tight.load(tmp_path, model)
    assert 0 < tight.tree.nbytes <= 25 * 256
    assert [write(Writer(model, TOKENIZER, prefixes=tight), [p])[0] for p in prompts] == texts


def test_files_of_another_model_and_damaged_ones_are_refused(tmp_path):
    model, prefixes = model_of(), PromptCache()
    write(Writer(model, TOKENIZER, prefixes=prefixes), [text_of(20)])
    prefixes.save(tmp_path, model)
    (path,) = tmp_path.glob("*.safetensors")
    changed = model_of()
    with torch.no_grad():
        changed.blocks[1].norm_1.weight[3] += 1e-6
    for other in (model_of(seed=1), model_of("gpt2"), changed, model_of().bfloat16()):
        with pytest.raises(ValueError, match=r"another model .*delete it"):
            PromptCache().load(tmp_path, other)
    whole = path.read_bytes()
    for damage in (b"", whole[: len(whole) // 2], b"not a file of tensors", whole[:8] + b"x" + whole[9:]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=f"{path.name} .*delete it"):
            PromptCache().load(tmp_path, model)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        about, tensors = file.metadata(), load(whole)
    for text in ([-1] * 20, [0.5] * 20, [2**70] * 20, ["1"] * 20, [1], {}, None):
        path.write_bytes(save(tensors, metadata=about | {"text": json.dumps(text)}))
        with pytest.raises(ValueError, match=f"{path.name} does not say for which text"):
            PromptCache().load(tmp_path, model)
    assert PromptCache().load(tmp_path / "nowhere", model) == 0


def test_the_fingerprint_knows_every_weight():
    model = model_of()
    names, before = [], fingerprint(model)
    assert before == fingerprint(model_of())
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            value = parameter.view(-1)[-1].item()
            parameter.view(-1)[-1] = -value
            names += [name] if fingerprint(model) == before else []
            parameter.view(-1)[-1] = value
    assert not names and fingerprint(model) == before


def test_a_cache_refuses_what_it_does_not_hold():
    model = model_of("windows")
    cache = ContiguousCache(model.specs, 2, 20)
    Decoder(model, cache).step([(1, 10, 0)], text_of(10))
    layers = cache.read_tokens(1, 2, 10)
    assert [tuple(x.shape) for x in layers[0]] == [(8, 2, 8), (8, 2, 8)]
    for row, start, stop in ((1, 0, 11), (0, 0, 1), (2, 0, 0), (1, 5, 4), (-1, 0, 0)):
        with pytest.raises(ValueError, match="are not in this cache"):
            cache.read_tokens(row, start, stop)
    with pytest.raises(ValueError, match="exceed capacity=20"):
        cache.append_tokens(1, [(torch.zeros(11, 2, 8),) * 2] * 2)
    with pytest.raises(ValueError, match="1 layers for a cache of 2"):
        cache.append_tokens(0, layers[:1])
    assert cache.lengths == [0, 10]
    sliding = SlidingCache(model.specs, 1, 20)
    with pytest.raises(ValueError, match="use a ContiguousCache"):
        sliding.read_tokens(0, 0, 0)
    with pytest.raises(ValueError, match="use a ContiguousCache"):
        sliding.append_tokens(0, layers)


if __name__ == "__main__":
    example = PromptCache()
    for prompt in (text_of(30), text_of(30), text_of(20) + text_of(5, 1)):
        write(Writer(model_of(), TOKENIZER, prefixes=example), [prompt])
        print(example.statistics)
    raise SystemExit(pytest.main([__file__]))
