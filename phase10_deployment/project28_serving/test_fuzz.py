"""Whatever is sent, whoever tokenizes: an answer or a refusal with its reason, never a 500; the engine goes on."""

import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import status_code_conformance

from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase2_finetuning.project4_sft.other_templates import template_for
from phase10_deployment.project28_serving.client import EngineClient
from phase10_deployment.project28_serving.conftest import make_model, running, sentencepiece_like
from phase10_deployment.project28_serving.engine import Engine
from phase10_deployment.project28_serving.server import ServerOptions

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
FAST = settings(deadline=None, suppress_health_check=list(HealthCheck))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
# Values that are nearly right: small texts, so that what is accepted ends soon.
numbers = st.none() | st.integers(-2, 3) | st.floats(-3, 3) | st.sampled_from([1e308, -1e308, 2**63, -(2**64)])
texts = st.text(max_size=12) | st.sampled_from(["", "\x00", "\ud800", "<|end|>", "<tool_call>", "</tool_call>", "{}"])
roles = st.sampled_from(["system", "user", "assistant", "tool", "developer"])
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": texts}), max_size=4)
known = [{}, {"type": "object"}, {"type": "integer"}, {"enum": ["a"]}, {"$ref": "#/nowhere"}]
schemas = st.sampled_from(known) | json_values
fields = {
    "temperature": numbers, "top_p": numbers, "top_k": numbers, "min_p": numbers, "n": st.none() | st.integers(-1, 3),
    "seed": numbers, "presence_penalty": numbers, "frequency_penalty": numbers, "repetition_penalty": numbers,
    "logit_bias": st.none() | st.dictionaries(st.sampled_from(["1", "-1", "261", "x", "9" * 30]), numbers, max_size=2),
    "stop": st.none() | texts | st.lists(texts, max_size=3), "stream": st.none() | st.booleans(),
    "logprobs": json_values,
    "response_format": st.none() | st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object"])})
    | schemas.map(lambda schema: {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}),
    "tools": st.none() | st.lists(st.builds(lambda name, schema: {"type": "function", "function": {
        "name": name, "parameters": schema}}, texts, schemas), max_size=2),
    "tool_choice": st.sampled_from([None, "auto", "required", "none"]), "echo": st.none() | st.booleans(),
    "stream_options": json_values, "user": st.none() | texts, "model": st.sampled_from([None, "tiny", "other"]),
}  # fmt: skip
requests = st.fixed_dictionaries({"max_tokens": st.integers(0, 3)}, optional=fields)


@pytest.fixture(scope="module")
def http(tiny):
    """A connection that is kept."""
    with httpx.Client(base_url=tiny.url, timeout=60) as client:
        yield client


def check(http, tiny, route, body):
    """Send it, and look at what comes: a text, or a reason."""
    response = http.post(route, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    if response.headers["content-type"].startswith("text/event-stream"):
        last = [line for line in response.text.splitlines() if line][-1]
        assert response.status_code == 200 and (last == "data: [DONE]" or '"error"' in last)
    elif response.status_code != 200:
        error = response.json()["error"]
        assert response.status_code in (400, 404) and error["message"] and error["type"], response.text
    assert tiny.client.state == "ready" and tiny.client.n_restarts == 0


@FAST
@given(body=requests, messages=messages)
def test_chats_that_are_nearly_right(http, tiny, body, messages):
    check(http, tiny, CHAT, body | {"messages": messages})


@FAST
@given(body=requests, prompt=texts | st.lists(st.integers(-1, 300), max_size=4) | st.lists(texts, max_size=2))
def test_completions_that_are_nearly_right(http, tiny, body, prompt):
    check(http, tiny, TEXT, body | {"prompt": prompt})


@FAST
@given(body=json_values, route=st.sampled_from([CHAT, TEXT, "/v1/embeddings", "/tokenize", "/detokenize"]))
def test_any_json(http, tiny, body, route):
    check(http, tiny, route, body)


@FAST
@given(body=st.binary(max_size=40), route=st.sampled_from([CHAT, TEXT, "/tokenize"]))
def test_any_bytes(http, tiny, body, route):
    response = http.post(route, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_what_the_description_allows_and_what_it_does_not(tiny, eventually):
    described = schemathesis.openapi.from_url(f"{tiny.url}/openapi.json")
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
    for operation in (found.ok() for found in described.get_all_operations()):
        for mode in modes if operation.method == "post" else modes[:1]:

            @settings(FAST, max_examples=10)
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case):
                if isinstance(case.body, dict) and case.path.startswith("/v1/c"):
                    case.body |= {"max_tokens": 2, "max_completion_tokens": 2}
                case.call_and_validate(checks=[not_a_server_error, status_code_conformance], timeout=60)
                assert tiny.client.state == "ready" and tiny.client.n_restarts == 0

            ask()
    eventually(lambda: tiny.client.gauges[:3] == (0, 0, 0.0))


# -- other tokenizers


def letters_alone():
    """Nothing that JSON needs, and no special tokens."""
    return CharTokenizer.from_text("abc User: Assistant\n")


@pytest.fixture(scope="module", params=[letters_alone, sentencepiece_like], ids=lambda make: make.__name__)
def other(request):
    """A server whose model has another tokenizer, and a connection to it."""
    tokenizer = request.param()

    def build():
        engine = Engine(make_model(tokenizer.vocab_size), tokenizer, template_for(tokenizer, "tiny.pt"), n_rows=8,
                        max_tokens=64)  # fmt: skip
        engine.source = "tiny.pt"
        return engine

    client = EngineClient(build, process=False)
    with running(client, ServerOptions("tiny")) as server, httpx.Client(base_url=server.url, timeout=60) as connection:
        yield server, connection


letters = st.text("abcUser: ", max_size=12) | texts


@FAST
@given(body=requests, messages=messages, prompt=letters | st.lists(st.integers(-1, 300), max_size=4))
def test_requests_that_are_nearly_right_for_other_tokenizers(other, body, messages, prompt):
    server, client = other
    check(client, server, CHAT, body | {"messages": messages})
    check(client, server, TEXT, body | {"prompt": prompt})


def test_other_tokenizers_answer(other, eventually):
    server, client = other
    body = {"prompt": "abc", "max_tokens": 4, "logprobs": 2, "temperature": 0}
    answer = client.post(TEXT, json=body).json()["choices"][0]
    assert len(answer["logprobs"]["tokens"]) <= 4 and "".join(answer["logprobs"]["tokens"])
    stream = client.post(TEXT, json=body | {"stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in stream if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == answer["text"]
    eventually(lambda: server.client.gauges[:3] == (0, 0, 0.0))


def test_the_engine_is_empty_afterwards(tiny, eventually):
    eventually(lambda: tiny.client.gauges[:3] == (0, 0, 0.0))


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
