"""Grammars: what is written satisfies its schema, whoever tokenizes; what fails, fails alone."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens
from phase3_core_inference.project8_kv_cache.constraints import bits_of
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase4_advanced_inference.project13_paged_attention.runner import Runner

pytest.importorskip("llguidance")

from phase10_deployment.project28_serving import grammar as grammar_module
from phase10_deployment.project28_serving.conftest import sentencepiece_like
from phase10_deployment.project28_serving.grammar import (
    Grammars,
    GuardedConstraint,
    check_grammar,
    json_object_grammar,
    json_schema_grammar,
)

TOKENIZER = with_chat_tokens(byte_tokenizer())
ENDS = frozenset((TOKENIZER.eot_id, TOKENIZER.special_tokens["<|end|>"]))
GRAMMARS = Grammars(TOKENIZER, ENDS)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "boss": {"anyOf": [{"$ref": "#/$defs/boss"}, {"type": "null"}]},
    },
    "required": ["name", "age", "boss"],
    "additionalProperties": False,
    "$defs": {"boss": {"type": "object", "properties": {"id": {"type": "boolean"}}, "required": ["id"],
                       "additionalProperties": False}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "block_size": 256, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_ff": 48}
    model = Transformer(PRESETS["llama-7b"](**shape)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.25)
    return model


def params_of(grammar, n=200, seed=0, **options):
    options = {"stop_ids": ENDS, "constraint": lambda: GRAMMARS.constraint(grammar)} | options
    return SamplingParams(n, seed=seed, **options)


def tokens_in(mask) -> list[int]:
    return np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()


def walk(constraint, tokenizer, seed, n=400, hurry=0.3):
    """A text drawn evenly from what is allowed, with a taste for what closes brackets."""
    rng, ids = random.Random(seed), []
    closing = {i for char in '"]}' for i in tokenizer.encode(char)[-1:]}
    while not constraint.finished and len(ids) < n:
        allowed = tokens_in(constraint.allowed())
        assert not (set(allowed) & set(getattr(tokenizer, "special_tokens", {}).values())) - constraint.grammars.end_ids
        ends = [token for token in allowed if token in constraint.grammars.end_ids or token in closing]
        ids.append(rng.choice(ends if ends and rng.random() < hurry else allowed))
        constraint.accept(ids[-1])
    return tokenizer.decode([token for token in ids if token not in constraint.grammars.end_ids])


def follow(constraint, tokenizer, text) -> str | None:
    """What of a text could not be written, if anything."""
    for i, token in enumerate(ids := tokenizer.encode(text)):
        if constraint.finished or token not in tokens_in(constraint.allowed()):
            return tokenizer.decode(ids[i:])
        constraint.accept(token)
    return None


# -- what is written


def test_a_model_writes_what_the_schema_says(model):
    jsonschema = pytest.importorskip("jsonschema")
    grammar = json_schema_grammar(PERSON)
    texts = generate(model, TOKENIZER, ["x"] * 16, [params_of(grammar, seed=i) for i in range(16)])
    for text in texts:
        assert text.finish_reason == "stop"
        jsonschema.validate(json.loads(text.text), PERSON)
    assert len({text.text for text in texts}) == 16


def test_a_model_writes_objects(model):
    each = [params_of(json_object_grammar(), seed=i, logit_bias={ord("}"): 3.0, ord('"'): 3.0}) for i in range(24)]
    texts = generate(model, TOKENIZER, ["x"] * 24, each)
    ended = [text for text in texts if text.finish_reason == "stop"]
    assert len(ended) > 12 and all(isinstance(json.loads(text.text), dict) for text in ended)
    assert any(json.loads(text.text) for text in ended)


def scalars():
    numbers = st.integers(-9, 9)
    return st.one_of(
        st.just({"type": "boolean"}), st.just({"type": "null"}),
        st.builds(lambda low, more: {"type": "integer", "minimum": low, "maximum": low + abs(more)}, numbers, numbers),
        st.builds(lambda low, more: {"type": "number", "exclusiveMinimum": low, "maximum": low + 1 + abs(more)},
                  numbers, numbers),
        st.builds(lambda low, more: {"type": "string", "minLength": low, "maxLength": low + more},
                  st.integers(0, 3), st.integers(0, 4)),
        st.sampled_from([{"type": "string", "pattern": "^[a-c]{2}-[0-9]$"}, {"type": "string", "format": "date"},
                         {"const": {"a": [1, "é"]}}, {"enum": ["x", 1, None, "\"\\"]}]),
    )  # fmt: skip


def deeper(parts):
    names = st.lists(st.sampled_from(["a", "b", "a b", "é", '"', "\\"]), unique=True, max_size=3)
    objects = names.flatmap(
        lambda names: st.tuples(st.lists(parts, min_size=len(names), max_size=len(names)), st.sets(
            st.sampled_from(names)) if names else st.just(set())).map(lambda drawn: {
                "type": "object", "properties": dict(zip(names, drawn[0])), "required": sorted(drawn[1]),
                "additionalProperties": False}))  # fmt: skip
    arrays = st.builds(
        lambda items, low, more: {"type": "array", "items": items, "minItems": low, "maxItems": low + more},
        parts, st.integers(0, 2), st.integers(0, 2),
    )  # fmt: skip
    return st.one_of(objects, arrays, st.lists(parts, min_size=1, max_size=3).map(lambda some: {"anyOf": some}))


@settings(max_examples=60, deadline=None)
@given(schema=st.recursive(scalars(), deeper, max_leaves=6), seed=st.integers(0, 10**6))
def test_texts_satisfy_any_schema(schema, seed):
    jsonschema = pytest.importorskip("jsonschema")
    grammar = json_schema_grammar(schema)
    check_grammar(grammar)
    constraint = GRAMMARS.constraint(grammar)
    text = walk(constraint, TOKENIZER, seed)
    assert constraint.finished and constraint.failed is None, (schema, text)
    jsonschema.validate(json.loads(text), schema)


def test_blanks_are_bounded():
    for text, rest in (('{"a": 1}', None), ('{\n    "a": 1\n}', None), ('{"a":1}', None), ('{"a":  1}', " 1}"),
                       ("{\n\n", "\n"), ("{" + "\n" + " " * 17, " "), ('{"a":1} ', " "), (" {", " {")):  # fmt: skip
        assert follow(GRAMMARS.constraint(json_object_grammar()), TOKENIZER, text) == rest, text


def test_a_schema_cannot_change_the_style():
    schema = {"type": "object", "x-guidance": {"lenient": True, "item_separator": ";", "whitespace_pattern": "x+"}}
    assert follow(GRAMMARS.constraint(json_schema_grammar(schema)), TOKENIZER, '{"a": 1, "b": 2}') is None
    with pytest.raises(ValueError, match="Unimplemented keys"):
        check_grammar(json_schema_grammar(schema | {"not": {}}))


# -- how it ends


def test_a_text_ends_with_its_grammar_or_with_any_end_where_the_grammar_may_end():
    constraint = GRAMMARS.constraint(json_schema_grammar({"type": "integer"}))
    assert not ENDS & set(tokens_in(constraint.allowed()))
    constraint.accept(ord("1"))
    assert set(tokens_in(constraint.allowed())) == ENDS | set(b"0123456789") and not constraint.finished
    for end in ENDS:
        other = GRAMMARS.constraint(json_schema_grammar({"type": "integer"}))
        other.accept(ord("1"))
        other.accept(end)
        assert other.finished and other.failed is None
    constraint = GRAMMARS.constraint(json_schema_grammar({"type": "boolean"}))
    for char in b"true":
        assert not constraint.finished
        constraint.accept(char)
    assert constraint.finished and constraint.failed is None
    constraint.accept(ord("x"))  # nothing happens any more
    assert constraint.failed is None


def test_masks_fit_the_vocabulary():
    """As long as that of `bits_of`, without a bit behind the last token, whatever the number of tokens."""
    for size in (TOKENIZER.vocab_size, 256, 257, 200):
        grammars = Grammars(TOKENIZER, ENDS, vocab_size=size)
        constraint = grammars.constraint("start: /(?s:.*)/")
        mask = constraint.allowed()
        assert mask.dtype == np.int32 and len(mask) == len(bits_of([0], size))
        allowed = set(tokens_in(mask))
        assert max(allowed) < size and ENDS & allowed == {end for end in ENDS if end < size}
        assert allowed - ENDS == {i for i in range(min(size, 256)) if i < 0xF5 and i not in (0xC0, 0xC1)} - set(
            range(0x80, 0xC0)
        )  # what may begin a character of UTF-8


# -- what fails, fails alone


class Broken:
    """A matcher that goes wrong in one way."""

    def __init__(self, how):
        self.how = how

    def compute_bitmask(self):
        if self.how == "raises":
            raise RuntimeError("lightning")
        return bits_of([], TOKENIZER.vocab_size + 1).tobytes()

    def is_error(self):
        return self.how == "error"

    def get_error(self):
        return "too many states\n<backtrace>"

    def is_accepting(self):
        return False

    def is_stopped(self):
        return False

    def consume_token(self, token):
        if self.how == "token raises":
            raise OverflowError("too big")
        return self.how != "token"


@pytest.mark.parametrize(
    ("how", "reason"),
    [("raises", "lightning"), ("error", "too many states"), ("empty", "no token of this vocabulary leads on"),
     ("token", "too many states"), ("token raises", "too big")],
)  # fmt: skip
def test_a_failure_is_kept_and_everything_is_allowed(how, reason):
    constraint = GuardedConstraint(Broken(how), GRAMMARS)
    if how.startswith("token"):
        constraint.accept(5)
    else:
        assert tokens_in(constraint.allowed()) == list(range(TOKENIZER.vocab_size))
    assert constraint.finished and reason in constraint.failed and "\n" not in constraint.failed
    assert tokens_in(constraint.allowed()) == list(range(TOKENIZER.vocab_size))
    constraint.accept(10**9)
    constraint.allowed()


def test_an_end_before_its_time_and_a_wrong_token_are_failures():
    for token in (next(iter(ENDS)), ord("x"), -1, 10**12):
        constraint = GRAMMARS.constraint(json_object_grammar())
        constraint.accept(token)
        assert constraint.finished and "cannot follow its grammar" in constraint.failed


def test_a_grammar_is_compiled_once_and_its_texts_go_their_own_ways(monkeypatch):
    grammars, compiled = Grammars(TOKENIZER, ENDS), []
    inner = grammars._compile
    grammars._compiled = grammar_module.lru_cache(grammar_module.REMEMBERED)(lambda g: compiled.append(g) or inner(g))
    grammar = json_schema_grammar({"enum": ["ab", "cd"]})
    one, two, three = (grammars.constraint(grammar) for _ in range(3))
    for token in TOKENIZER.encode('"ab"'):
        one.accept(token)
    two.accept(TOKENIZER.encode("x")[0])
    assert len(compiled) == 1 and one.finished and one.failed is None and two.failed and not three.finished
    assert (three.allowed() == grammars.constraint(grammar).allowed()).all()
    assert grammars.constraint("start: nothing").allowed() is grammars.everything  # a bad one is as bad as a copy


def test_a_grammar_that_is_none_fails_without_an_exception():
    constraint = GRAMMARS.constraint("start: nothing")
    assert tokens_in(constraint.allowed()) == list(range(TOKENIZER.vocab_size))
    assert constraint.finished and constraint.failed


@pytest.mark.parametrize("ahead", [False, True])
def test_neighbours_do_not_notice(model, ahead):
    """One fails at once, one after a few tokens, one has a grammar, one is free: the last two as if alone."""
    late = "start: /[a-z]{5}/ <|user|>"  # leads to a token that never may come
    each = [params_of("start: nothing"), params_of(late, seed=1), params_of(json_schema_grammar(PERSON), seed=2),
            SamplingParams(60, seed=3, stop_ids=())]  # fmt: skip
    alone = [generate(model, TOKENIZER, "x", params) for params in each[2:]]
    runner = Runner(model, TOKENIZER, n_rows=4, capacity=256, ahead=ahead)
    requests = [runner.add("x", params) for params in each]
    texts = {request.index: "" for request in requests}
    while runner.busy:
        for piece in runner.step():
            texts[piece.index] += piece.text
    assert [texts[request.index] for request in requests[2:]] == [text.text for text in alone]
    assert [request.finish_reason for request in requests] == ["stop", "stop", "stop", "length"]
    failed = [request.constraint.failed for request in requests[:3]]
    assert "nothing" in failed[0] and "no token of this vocabulary leads on" in failed[1] and failed[2] is None
    assert [len(request.parts[1]) <= most for request, most in zip(requests, (1, 6))] == [True, True]
    assert texts[requests[1].index][:5].islower()


def test_a_fork_goes_on_where_its_text_is(model):
    jsonschema = pytest.importorskip("jsonschema")
    runner = Runner(model, TOKENIZER, n_rows=2, capacity=256, ahead=False)
    request = runner.add("x", params_of(json_schema_grammar(PERSON)))
    for _ in range(6):
        runner.step()
    other = runner.fork(request, params_of(json_schema_grammar(PERSON), seed=9))
    while runner.busy:
        runner.step()
    for each, n_prompt in ((request, 1), (other, 1)):
        jsonschema.validate(json.loads(TOKENIZER.decode(each.tokens[n_prompt:])), PERSON)


# -- vocabularies


def gpt2_like():
    return BPETokenizer.train(['{"name": "low", "lower": [1, 2]} low lower\n' * 3], 300)


def characters():
    return CharTokenizer.from_text("".join(map(chr, range(32, 127))) + "\né")


@pytest.mark.parametrize("make", [gpt2_like, sentencepiece_like, characters])
def test_all_kinds_of_tokenizers_write_json(make):
    jsonschema = pytest.importorskip("jsonschema")
    tokenizer = make()
    eot = getattr(tokenizer, "eot_id", None)
    grammars = Grammars(tokenizer, () if eot is None else (eot,))
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "a b": {"enum": ["é", "low", 3]}},
        "required": ["name", "a b"],
        "additionalProperties": False,
    }
    for seed in range(12):
        constraint = grammars.constraint(json_schema_grammar(schema))
        text = walk(constraint, tokenizer, seed)
        assert constraint.finished and constraint.failed is None
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("make", [gpt2_like, sentencepiece_like, characters])
def test_tokens_are_their_bytes(make):
    tokenizer = make()
    tokens, special = grammar_module.bytes_of_tokens(tokenizer)
    text = 'a {"name": [1, "é"]}\n low name'
    spelled = b"".join(tokens[i] for i in tokenizer.encode(text)).decode()
    assert spelled.removeprefix(" ") == text and len(tokens) == tokenizer.vocab_size
    assert special == set(getattr(tokenizer, "special_tokens", {}).values())


def test_what_is_forced_is_written_in_the_tokens_that_the_model_knows():
    vocab = {token: i for i, token in enumerate([*list(byte_tokenizer().vocab)[:256], "ab", "bc"])}
    tokenizer = BPETokenizer(vocab, [("b", "c"), ("a", "b")], rule="merges")  # not by the longest match, which is ab
    constraint = Grammars(tokenizer).constraint('start: "abc!"')
    assert tokenizer.encode("abc!") == [vocab["a"], vocab["bc"], vocab["!"]]
    for token in tokenizer.encode("abc!"):
        assert tokens_in(constraint.allowed()) == [token]
        constraint.accept(token)
    assert constraint.finished


def test_marks_that_may_stand_in_any_text_are_tokens_like_others():
    names = {"<|endoftext|>": 256, "<tool_call>": 257, "<|end|>": 258}
    vocab = {token: i for token, i in byte_tokenizer().vocab.items() if i < 256}
    tokenizer = BPETokenizer(vocab, [], names, rule="merges", always_matched=["<tool_call>"])
    constraint = Grammars(tokenizer, [256]).constraint('start: ("<tool_call>" | "<|end|>") "x"')
    assert set(tokens_in(constraint.allowed())) == {ord("<"), 257}
    constraint.accept(257)
    assert tokens_in(constraint.allowed()) == [ord("x")]


def test_vocabularies_that_cannot_spell_json_are_refused():
    with pytest.raises(ValueError, match=r"CharTokenizer\) has no token for .* use a model with a byte-level"):
        Grammars(CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyz ,.!"))
    with pytest.raises(ValueError, match="NumberTokenizer does not say which bytes"):
        Grammars(NumberTokenizer(61))
    with pytest.raises(ValueError, match="puts blanks between its tokens"):
        Grammars(sentencepiece_like(pytest.importorskip("tokenizers").decoders.WordPiece()))


@pytest.mark.parametrize("schema", [{"const": "a☃"}, {"enum": ["a☃", "ab☃"]}])
def test_what_a_vocabulary_cannot_spell_is_a_failure(schema):
    tokenizer = CharTokenizer.from_text("".join(map(chr, range(32, 127))))
    constraint = Grammars(tokenizer).constraint(json_schema_grammar(schema))
    for _ in range(4):  # a quote, a, perhaps b
        if not constraint.failed:
            constraint.accept(tokens_in(constraint.allowed())[-1])
    assert constraint.finished and "cannot follow its grammar" in constraint.failed


# -- what is refused beforehand


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, r'Unimplemented keys: \["uniqueItems"\]'),
        ({"type": "string", "pattern": "("}, "regular expression, unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/$defs/nothing"}, "'/\\$defs/nothing' does not exist"),
        ({"$ref": "https://example.com/a.json"}, "https://example.com/a.json"),
        ({"$ref": "#"}, "no token leads on"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "nsatisfiable|minimum"),
        ({"type": "word"}, "Invalid type: word"),
        ({"type": "string", "format": "colour"}, "Unknown format: colour"),
        ({"properties": []}, "properties must be an object"),
        ([], "a JSON schema is an object"),
        (True, "a JSON schema is an object"),
        ({"title": "x" * 40_000}, "at most 32,768 are read"),
        ({"title": "\ud800"}, "surrogates not allowed"),
        ({"minimum": float("nan")}, "no JSON"),
        ({"a": {1, 2}}, "no JSON"),
    ],
)
def test_schemas_that_cannot_be_honoured_are_refused_with_the_reason(schema, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        check_grammar(json_schema_grammar(schema))
    assert "\n" not in str(caught.value)


def test_deep_schemas_are_refused():
    schema: dict = {"type": "string"}
    for _ in range(400):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="recursion limit"):
        check_grammar(json_schema_grammar(schema))
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="no JSON"):
        json_schema_grammar(schema)


def test_grammars_that_are_none_are_refused():
    for grammar in ("start: nothing", "start", "", "{", '{"grammars": []}'):
        with pytest.raises(ValueError, match="cannot be followed"):
            check_grammar(grammar)
    check_grammar('start: "yes" | "no"')


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
