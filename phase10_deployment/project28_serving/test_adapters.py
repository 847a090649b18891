"""Adapters of rows: in any mix, each text is what its adapter, merged into the model, writes alone; none is shared."""

import copy
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from common import kernels
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.plans import Packed
from phase2_finetuning.project5_lora.lora import add_lora, load_adapter, merge_lora, save_adapter
from phase3_core_inference.project8_kv_cache import decoder
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token
from phase4_advanced_inference.project10_prompt_caching.prompt_cache import PromptCache
from phase4_advanced_inference.project11_speculative_decoding.drafts import NGramDraft
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation
from phase4_advanced_inference.project12_dynamic_batching.batcher import Batcher
from phase4_advanced_inference.project12_dynamic_batching.request import Request
from phase4_advanced_inference.project13_paged_attention.paged_cache import PagedCache
from phase4_advanced_inference.project13_paged_attention.runner import Runner
from phase10_deployment.project28_serving.adapters import AdapterRows

V, LONG, PAGE = 61, 64, 4
TOKENIZER = NumberTokenizer(V)
GREEDY = SamplingParams(12, 0.0, stop_ids=())
# different ranks, layers and kinds; None is the base
ADAPTERS = {
    "a": {"rank": 4, "alpha": 8.0},
    "b": {"rank": 7, "alpha": 6.0, "rank_stabilized": True, "targets": ["q_proj", "down_proj"]},
    "c": {"rank": 3, "alpha": 6.0, "dora": True, "targets": ["attention"]},
}
NAMES = (None, *ADAPTERS)
STEM = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3]
PROMPTS = [STEM, STEM[:9], [7, 8, 7, 8, 7], [*STEM, 50, 51]]
CROWD = [(prompt, name) for prompt in PROMPTS for name in NAMES]  # same prompts, every adapter


def make(device="cpu"):
    """A model whose attention matters: larger weights than at the beginning of training."""
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "block_size": LONG, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_kv_head": 2}
    model = Transformer(PRESETS["llama-7b"](**sizes, n_ff=48)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model.to(device)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of trained adapters."""
    folders = {}
    for name, options in ADAPTERS.items():
        model = add_lora(make(), **options)
        torch.manual_seed(ord(name))
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.add_(0.3 * torch.randn_like(parameter))
        folders[name] = save_adapter(model, tmp_path_factory.mktemp(name))
    return folders


@pytest.fixture(scope="module")
def merged(made):
    """Plain models with one adapter merged into each, by name."""
    return {name: merge_lora(load_adapter(make(), made[name])) if name else make() for name in NAMES}


@pytest.fixture(scope="module")
def alone(merged):
    """What project 8 writes for a prompt over the merged model: alone(prompt, name, params) -> tokens."""

    @functools.cache
    def write(prompt, name, params):
        return generate(merged[name], TOKENIZER, list(prompt), params).tokens

    return lambda prompt, name, params=GREEDY: write(tuple(prompt), name, params)


class Served(Runner):
    """A runner whose requests have adapters: space 1 + its index for each."""

    def __init__(self, folders, blocks=None, n_rows=3, device="cpu", **options):
        model = make(device)
        self.adapters = AdapterRows(model, folders, n_rows)
        memory = blocks and blocks * bytes_per_token(model.specs, torch.float32) * PAGE
        super().__init__(model, TOKENIZER, n_rows, LONG, memory, **{"page": PAGE, "max_tokens": 7} | options)

    def seat_one(self, request):
        super().seat_one(request)
        self.adapters.put(request.row, (None, *self.adapters.names)[request.space])

    def ask(self, prompt, name, params=GREEDY):
        return self.add(prompt, params, space=1 + self.adapters.index(name))

    def drain(self):
        while self.busy:
            self.step()

    def write(self, crowd):
        """The tokens that each of these pairs of prompt and adapter gets, all at once."""
        requests = [self.ask(*each) for each in crowd]
        self.drain()
        return [request.tokens[request.n_prompt :] for request in requests]


MODES = {
    "chunks": {},
    "whole prompts": {"max_tokens": 512, "n_rows": 16},
    "one step ahead": {"ahead": True},
    "preempted": {"blocks": 14, "n_rows": 4},
    "preempted and swapped": {"blocks": 14, "n_rows": 4, "swap_bytes": 2**20, "ahead": True},
    "alone": {"n_rows": 1},
    "no sharing": {"share": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_every_text_is_that_of_its_adapter_merged_into_the_model(made, alone, mode):
    runner, expected = Served(made, **MODES[mode]), [alone(*each) for each in CROWD]
    assert len({tuple(text) for text in expected}) > 3 * len(PROMPTS)  # adapters differ in what they write
    for crowd, texts in ((CROWD, expected), (CROWD[::-1], expected[::-1])):  # then beginnings are known, rows others'
        assert runner.write(crowd) == texts
    assert (runner.scheduler.n_preempted > 0) == ("preempted" in mode)
    assert (runner.blocks.n_swapped > 0) == ("swapped" in mode)


@pytest.mark.parametrize("blocks", [None, 14])
def test_drafts_are_judged_by_the_adapter_of_their_row(made, alone, blocks):
    crowd = [(2 * prompt[-12:], name) for prompt, name in CROWD]  # so that something repeats
    speculation = Speculation(NGramDraft(), k=3, rule="coupled")
    runner = Served(made, blocks, n_rows=4, speculation=speculation)
    assert runner.write(crowd) == [alone(*each) for each in crowd]
    assert speculation.tally.kept > 0 and bool(blocks) == bool(runner.scheduler.n_preempted)


def test_sampled_texts_are_those_of_the_merged_models_too(made, alone):
    runner, params = Served(made), [SamplingParams(10, 0.8, stop_ids=(), seed=i) for i in range(len(CROWD))]
    requests = [runner.ask(*each, own) for each, own in zip(CROWD, params)]
    runner.drain()
    for request, each, own in zip(requests, CROWD, params):
        assert request.tokens[request.n_prompt :] == alone(*each, own)


# --- sharing ---


def test_a_prompt_shares_blocks_with_texts_of_its_own_adapter_alone(made, alone):
    runner = Served(made, n_rows=8, max_tokens=512)
    crowd = [(STEM, name) for name in NAMES for _ in range(2)]
    requests = [runner.ask(*each) for each in crowd]
    runner.step()
    full = len(STEM) // PAGE
    tables = [runner.cache.blocks(request.row)[:full] for request in requests]
    assert all(first == second for first, second in zip(tables[::2], tables[1::2]))
    assert len({block for table in tables for block in table}) == len(NAMES) * full
    assert [request.found for request in requests] == [0, full * PAGE] * len(NAMES)
    counts = runner.blocks.tree.statistics
    assert (counts.found, counts.inserted) == (len(NAMES) * full * PAGE,) * 2
    runner.drain()
    assert [request.tokens[len(STEM) :] for request in requests] == [alone(*each) for each in crowd]


def test_without_spaces_a_text_would_go_on_from_another_adapters_keys(made, alone, monkeypatch):
    """What the tests above are worth: they fail where spaces are ignored."""
    monkeypatch.setattr(Request, "keys", lambda self, stop=None: self.tokens[:stop])
    texts = Served(made).write(CROWD)
    assert texts[0] == alone(*CROWD[0]) and texts != [alone(*each) for each in CROWD]


@pytest.mark.parametrize("ahead", [False, True])
def test_a_fork_keeps_the_adapter(made, alone, ahead):
    runner = Served(made, ahead=ahead)
    request, _ = runner.ask(STEM, "c"), runner.ask(STEM, "a")
    forks = []
    for _ in range(10):  # waiting, read in part, at rest: over shared blocks, or queued
        forks.append((list(request.tokens), runner.fork(request)))
        runner.step()
    runner.drain()
    for said, fork in forks:
        assert fork.space == request.space == 3 and fork.tokens[len(said) :] == alone(said, "c")
    assert ahead or any(fork.found == len(said) - 1 for said, fork in forks)


@pytest.mark.parametrize("options", [{}, {"graphs": True}, {"cache": "sliding"}], ids=str)
def test_slots_and_selective_steps(made, alone, options):
    """Project 12's loop, whose mixed steps are several plans, and whose tree holds copies."""
    model, prefixes = make(), None if "cache" in options else PromptCache()
    adapters = AdapterRows(model, made, 3)

    class Slotted(Batcher):
        def seat_one(self, request):
            super().seat_one(request)
            adapters.put(request.row, NAMES[request.space])

    batcher = Slotted(model, TOKENIZER, 3, max_tokens=7, prefixes=prefixes, **options)
    requests = [batcher.add(prompt, GREEDY, space=NAMES.index(name)) for prompt, name in CROWD]
    while batcher.busy:
        batcher.step()
    assert [request.tokens[request.n_prompt :] for request in requests] == [alone(*each) for each in CROWD]
    found = sum(request.found for request in requests)
    assert found == (prefixes.statistics.found if prefixes else 0) and (found > 0) == bool(prefixes)


# --- one forward ---


def steps(rows, cache, model, run):
    """Forwards of changing shapes while rows change their adapters: (logits of each step)."""
    for i, names in enumerate((("a", None, "c"), (None, "c", "c"), ("b", "a", None))):
        for row, name in enumerate(names):
            rows.put(row, name)
        for work in ([(0, 1, 1), (1, 1, 1), (2, 1, 1)], [(0, 1, 1), (2, 1, 1)], [(0, 3, 3), (1, 3, 3)]):
            plan = cache.plan(work, [(7 * i + place) % V for place in range(sum(n for _, n, _ in work))])
            yield run(plan)[: plan.n_wanted]


def test_what_is_compiled_once_follows_the_table(made):
    torch._dynamo.reset()
    model, reference, counter = make(), make(), CompileCounterWithBackend("eager")
    rows, others = AdapterRows(model, made, 3), AdapterRows(reference, made, 3)
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=counter)
    where, cache = rows.of_row.data_ptr(), PagedCache(model.specs, 3, LONG, page=PAGE, padded=True)
    ours = steps(rows, cache, model, lambda plan: compiled(plan.tokens, plan))
    plain = PagedCache(model.specs, 3, LONG, page=PAGE)
    theirs = steps(others, plain, reference, lambda plan: reference(plan.tokens, plan))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert counter.frame_count == 3 and rows.of_row.data_ptr() == where  # as many as shapes


class Recorder(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: remembers operations with their tensors, and repeats them in place."""

    def __init__(self):
        super().__init__()
        self.launches = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.launches.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.launches:
            again = function(*args, **kwargs)
            for old, new in zip(*((x if isinstance(x, tuple | list) else [x]) for x in (out, again))):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)  # of a view, or in place, onto itself


def recording(function, *example):
    """`common.graphs.capture`, with a `Recorder` for the graph."""
    buffers, recorder = [tensor.clone() for tensor in example], Recorder()
    with recorder:
        result = function(*buffers)

    def replay(*arguments):
        for buffer, argument in zip(buffers, arguments, strict=True):
            buffer.copy_(argument)
        recorder.replay()
        return result

    return replay


def test_what_is_recorded_once_follows_the_table(made, alone, monkeypatch):
    monkeypatch.setattr(decoder, "capture", recording)
    monkeypatch.setattr(kernels, "plain", lambda x: False)  # operators are what can be recorded
    runner = Served(made, n_rows=4, max_tokens=9, graphs=True, ahead=True)
    runner.warm_up()  # everything is recorded while all rows have the base
    assert runner.decoder._steps
    monkeypatch.setattr(runner.decoder, "_first", lambda *_: 1 / 0)  # from here on all is replayed
    assert runner.write(CROWD) == [alone(*each) for each in CROWD]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"graphs": True}, {"graphs": True, "compiled": True}], ids=str)
def test_recorded_steps_on_a_gpu(made, options):
    texts = []
    for own in ({}, options):
        runner = Served(made, n_rows=4, max_tokens=9, device="cuda", **own)
        runner.warm_up()
        texts.append(runner.write(CROWD))
    assert texts[0] == texts[1]


def test_a_forward_over_no_cache_takes_what_was_chosen(made, merged):
    model, tokens = make(), torch.arange(9)
    rows = AdapterRows(model, made, 2)
    rows.put(0, "b")
    cache = PagedCache(model.specs, 2, LONG, page=PAGE)
    for name in (None, "a", "c", None):
        rows.choose(name)
        plan = cache.plan([(0, 9, 9)], tokens.tolist())  # a step between them changes nothing
        torch.testing.assert_close(model(tokens, plan), merged["b"](tokens), rtol=1e-4, atol=1e-4)
        cache.free(0)
        torch.testing.assert_close(model(tokens), merged[name](tokens), rtol=1e-4, atol=1e-4)
        packed = Packed([4, 5], model.specs, model.kernel)
        torch.testing.assert_close(model(tokens, packed)[:4], merged[name](tokens[:4]), rtol=1e-4, atol=1e-4)
    rows.choose(["a", None])
    both = model(tokens.expand(2, -1))
    torch.testing.assert_close(both[0], merged["a"](tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1], merged[None](tokens), rtol=1e-4, atol=1e-4)


def test_a_block_that_stands_in_several_places(made):
    def twice():
        model = make()
        model.blocks.append(model.blocks[1])
        return model

    model, tokens = twice(), torch.arange(9)
    rows, cache = AdapterRows(model, made, 2), PagedCache(model.specs, 2, LONG, page=PAGE)
    rows.put(1, "a")
    out = model(tokens, cache.plan([(1, 9, 9)]))
    torch.testing.assert_close(out, load_adapter(twice(), made["a"])(tokens), rtol=1e-4, atol=1e-4)


# --- the table ---


def test_the_table_says_what_was_put(made):
    rows = AdapterRows(make(), made, 3)
    assert rows.names == ["a", "b", "c"] and [rows.index(name) for name in NAMES] == [-1, 0, 1, 2]
    rows.put(2, "c")
    rows.put(0, "b")
    rows.put(0, None)
    rows.put(1, "a")
    assert rows.of_row.tolist() == [-1, 0, 2]


def test_a_copied_model_has_a_table_of_its_own(made):
    model, tokens = make(), torch.arange(5)
    rows = AdapterRows(model, made, 1)
    other = copy.deepcopy(model)
    before = model(tokens)
    rows.choose("a")
    assert not torch.allclose(model(tokens), before) and torch.equal(other(tokens), before)


def test_what_a_user_can_get_wrong(made):
    model = make()
    rows = AdapterRows(model, {"a": made["a"]}, 2)
    for call, said in (
        (lambda: rows.put(0, "z"), "there is no adapter 'z' here: there are a, or None"),
        (lambda: rows.index("z"), "there is no adapter 'z' here"),
        (lambda: rows.choose("z"), "there is no adapter 'z' here"),
        (lambda: AdapterRows(model, {"b": made["b"]}, 2), "has a stack of adapters: give all of them at once"),
        (lambda: AdapterRows(make(), {}, 2), "adapters={} names none"),
        (lambda: AdapterRows(add_lora(make()), {"a": made["a"]}, 2), "an adapter that can be trained"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert rows.of_row.tolist() == [-1, -1]


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
