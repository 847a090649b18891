"""What is refused, and how: every mistake gets OpenAI's error object with the field that is to blame."""

import json
import logging
import threading

import httpx
import openai
import pytest

from phase10_deployment.project28_serving.asking import Limits
from phase10_deployment.project28_serving.gate import GateOptions, known
from phase10_deployment.project28_serving.server import ServerOptions

HELLO = [{"role": "user", "content": "Hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

WRONG = [
    # route, body, field
    (CHAT, {}, "messages"), (CHAT, {"messages": []}, "messages"), (CHAT, {"messages": "Hello"}, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
    (CHAT, {"messages": HELLO, "temperature": -1}, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": "0.5"}, "temperature"),
    (CHAT, {"messages": HELLO, "temperature": True}, "temperature"),
    (CHAT, {"messages": HELLO, "top_p": 1.5}, "top_p"), (CHAT, {"messages": HELLO, "top_k": -2}, "top_k"),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": HELLO, "max_tokens": 1.5}, "max_tokens"),
    (CHAT, {"messages": HELLO, "n": 0}, "n"), (CHAT, {"messages": HELLO, "n": 1000}, "n"),
    (CHAT, {"messages": HELLO, "stop": [""]}, "stop"), (CHAT, {"messages": HELLO, "stop": ["x"] * 100}, "stop"),
    (CHAT, {"messages": HELLO, "stop": "x" * 1000}, "stop"), (CHAT, {"messages": HELLO, "seed": 2**70}, "seed"),
    (CHAT, {"messages": HELLO, "logit_bias": {"a": 1}}, "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"99999": 1}}, "logit_bias"),
    (CHAT, {"messages": HELLO, "logit_bias": {"1": 101}}, "logit_bias.1"),
    (CHAT, {"messages": HELLO, "frequency_penalty": 3}, "frequency_penalty"),
    (CHAT, {"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
    (CHAT, {"messages": HELLO, "stream": "yes"}, "stream"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}, "response_format.type"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "schema": {"type": "nonsense"}}}}, "response_format"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools.0.function"),
    (CHAT, {"messages": HELLO, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
     "tools"),
    (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": [*HELLO, {"role": "tool", "content": "x", "tool_call_id": "y"}]}, "messages"),
    (TEXT, {}, "prompt"), (TEXT, {"prompt": None}, "prompt"), (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": [1, "a"]}, "prompt"), (TEXT, {"prompt": [-1]}, "prompt"), (TEXT, {"prompt": [99999]}, "prompt"),
    (TEXT, {"prompt": "x" * 1024}, "prompt"), (TEXT, {"prompt": ["x"] * 17}, "prompt"),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"), (TEXT, {"prompt": "x", "best_of": 3}, "best_of"),
    (TEXT, {"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
    ("/v1/embeddings", {"input": []}, "input"), ("/v1/embeddings", {"input": "x", "dimensions": 3}, "dimensions"),
    ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, "encoding_format"),
    ("/tokenize", {}, "prompt"), ("/detokenize", {"tokens": [99999]}, "tokens"),
    ("/detokenize", {"tokens": "1"}, "tokens"),
]  # fmt: skip


def post(url, body, **options):
    """POST some JSON, lone surrogates and all."""
    headers = {"content-type": "application/json", **options.pop("headers", {})}
    return httpx.post(url, content=json.dumps(body).encode(), headers=headers, timeout=30, **options)


@pytest.mark.parametrize(("route", "body", "field"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_value_is_refused_with_its_field(tiny, route, body, field):
    response = post(tiny.url + route, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and (error["param"] or "").startswith(field.split(".")[0]), error
    assert error["param"] == field or field in ("prompt", "tokens"), error
    assert len(error["message"]) > 10


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '"x"', "3", '{"prompt": NaN}', "[" * 100_000, "\x00", "{}{}"])
@pytest.mark.parametrize("route", [CHAT, TEXT, "/tokenize"])
def test_what_is_no_json_object_is_refused(tiny, route, body):
    response = httpx.post(tiny.url + route, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_bytes_that_are_no_text_are_refused(tiny):
    for headers in ({"content-type": "application/json"}, {"content-type": "text/plain"}, {}):
        response = httpx.post(tiny.url + TEXT, content=b'{"prompt": "\xff\xfe"}', headers=headers)
        assert response.status_code == 400 and response.json()["error"]["message"]


def test_many_wrong_values_are_one_error(tiny):
    for wrong in ([-1] * 100_000, ["x", *[3] * 100_000], [[1]] * 50_000 + [[-1]]):
        response = post(tiny.url + TEXT, {"prompt": wrong})
        assert response.status_code == 400 and len(response.json()["error"]["message"]) < 500


def test_what_a_vocabulary_cannot_spell_is_refused(serve, monkeypatch):
    with serve() as server:
        assert server.server.asking.template is not None  # made before anything is broken
        monkeypatch.setattr(type(server.client.card.tokenizer), "encode", _no_such_letter)
        for route, body in (
            (TEXT, {"prompt": "é"}),
            ("/tokenize", {"prompt": "é"}),
            ("/v1/embeddings", {"input": "é"}),
        ):
            response = post(server.url + route, body)
            assert response.status_code == 400 and "no such letter" in response.json()["error"]["message"]


def _no_such_letter(*args, **options):
    raise ValueError("there is no such letter")


def test_mistakes_of_ours_are_told_as_such(serve, monkeypatch):
    with serve() as server:
        monkeypatch.setattr(server.server.asking, "completion", None)
        response = post(server.url + TEXT, {"prompt": "x"})
        assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
        assert 'path="/v1/completions",status="500"' in httpx.get(f"{server.url}/metrics").text


def test_unknown_fields_are_let_pass(tiny):
    body = {"messages": HELLO, "max_tokens": 2, "store": True, "metadata": {"a": 1}, "x": [None]}
    assert post(tiny.url + CHAT, body).status_code == 200
    nothing = {"stop": None, "seed": None, "tools": None, "tool_choice": None, "logit_bias": None, "user": None}
    assert post(tiny.url + CHAT, {"messages": HELLO, "max_tokens": 2} | nothing).status_code == 200


def test_the_client_raises_what_it_knows(tiny):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        tiny.openai.chat.completions.create(model="gpt-9", messages=HELLO)
    with pytest.raises(openai.NotFoundError):
        tiny.openai.models.retrieve("gpt-9")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        tiny.openai.completions.create(model="tiny", prompt="x" * 2000)
    for path in ("/v1/nothing", "/"):
        assert httpx.get(tiny.url + path).json()["error"]["code"] == "unknown_url"
    assert httpx.get(tiny.url + CHAT).status_code == 405


# -- who may ask, and how much


def test_keys_are_asked_for_where_it_matters(serve):
    with serve(ServerOptions("tiny", gate=GateOptions(("right", "also")))) as server:
        assert [model.id for model in server.openai.models.list()] == ["tiny"]
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
            for route in ("/v1/models", "/tokenize", "/v1/nothing"):
                response = httpx.get(server.url + route, headers=headers)
                assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "bearer also"}).status_code == 200
        for open_to_all in ("/health", "/health/live", "/metrics"):
            assert httpx.get(server.url + open_to_all).status_code == 200


def test_a_key_is_known_as_a_whole():
    assert known("right", ["left", "right"]) and not known("righ", ["right"]) and not known("", ["right"])
    assert not known("ünïcödé", ["right"])


def test_bodies_that_are_too_large_are_refused(serve):
    with serve(ServerOptions("tiny", gate=GateOptions(max_body=1000))) as server:
        assert post(server.url + TEXT, {"prompt": "x", "max_tokens": 1}).status_code == 200
        large = json.dumps({"prompt": "x" * 2000}).encode()
        pieces = (large[i : i + 100] for i in range(0, len(large), 100))  # of no length that was told before
        for content in (large, pieces):
            response = httpx.post(server.url + TEXT, content=content, headers={"content-type": "application/json"})
            assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"


def test_a_full_queue_is_told_with_the_time_to_wait(serve, eventually):
    with serve(ServerOptions("tiny", max_waiting=1, limits=Limits(choices=4)), n_rows=1) as server:
        body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", server.url + TEXT, json=body) as first:
            lines = first.iter_lines()
            next(lines)
            with httpx.Client() as http:
                second = threading.Thread(target=lambda: http.post(server.url + TEXT, json=body | {"max_tokens": 2}))
                second.start()
                eventually(lambda: server.client.n_open == 2)
                third = post(server.url + TEXT, body)
                assert third.status_code == 429 and int(third.headers["retry-after"]) >= 1
                assert third.json()["error"]["code"] == "queue_full"
                first.close()
                second.join(30)
        eventually(lambda: server.client.gauges[:3] == (0, 0, 0.0))


def test_one_key_can_have_so_many_requests_at_a_time(serve, eventually):
    options = ServerOptions("tiny", gate=GateOptions(("a", "b"), max_per_key=1))
    with serve(options) as server:
        body = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "stream": True}
        headers = {"Authorization": "Bearer a"}
        with httpx.stream("POST", server.url + TEXT, json=body, headers=headers) as first:
            lines = first.iter_lines()
            next(lines)
            refused = post(server.url + TEXT, {"prompt": "x"}, headers=headers)
            assert refused.status_code == 429 and refused.json()["error"]["code"] == "concurrent_requests"
            other = post(server.url + TEXT, {"prompt": "x", "max_tokens": 1}, headers={"Authorization": "Bearer b"})
            assert other.status_code == 200
        eventually(lambda: not server.server.guests.inside)
        assert post(server.url + TEXT, {"prompt": "x", "max_tokens": 1}, headers=headers).status_code == 200


def test_nothing_of_a_prompt_is_logged(serve, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    secret = "the-secret-of-the-prompt"
    with serve() as server:
        post(server.url + TEXT, {"prompt": secret, "max_tokens": 2})
        post(server.url + CHAT, {"messages": [{"role": "user", "content": secret}], "max_tokens": 2, "stop": secret})
        post(server.url + TEXT, {"prompt": secret * 100})
        post(server.url + TEXT, {"prompt": secret, "temperature": "hot"})
    out, err = capfd.readouterr()
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert secret not in out + err + "".join(ours)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
