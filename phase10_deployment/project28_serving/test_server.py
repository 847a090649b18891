"""The API at a real socket, asked by the client that everybody uses: answers, streams, forms, tools, adapters."""

import asyncio
import base64
import json
import struct

import httpx
import pytest
import torch
from openai import AsyncOpenAI
from pydantic import BaseModel

from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project5_lora.lora import add_lora, save_adapter
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase10_deployment.project28_serving.server import ServerOptions

HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 24}
STRANGE = [
    {"temperature": 0}, {"seed": 3}, {"seed": 4, "top_p": 0.5, "n": 3}, {"seed": 5, "stop": ["e", "\n"]},
    {"seed": 6, "frequency_penalty": 1.5, "presence_penalty": -1.0}, {"seed": 7, "logit_bias": {"101": 5, "32": -100}},
    {"seed": 8, "logprobs": True, "top_logprobs": 3}, {"seed": 9, "extra_body": {"top_k": 5, "min_p": 0.1}},
]  # fmt: skip


def alone(model, tokenizer, prompt, n=24, **params):
    """What project 8 writes."""
    return generate(model, tokenizer, prompt, SamplingParams(n, 0.0, **params))


def joined(chunks):
    """A stream put together: (texts, reasons, roles, usages)."""
    texts, reasons, roles, usages = {}, {}, {}, []
    for chunk in chunks:
        usages += [chunk.usage] if chunk.usage else []
        for choice in chunk.choices:
            delta = choice.delta
            texts[choice.index] = texts.get(choice.index, "") + (delta.content or "")
            roles.setdefault(choice.index, []).extend([delta.role] if delta.role else [])
            reasons.setdefault(choice.index, []).extend([choice.finish_reason] if choice.finish_reason else [])
    return texts, reasons, roles, usages


def spelled(token):
    """The bytes of a token of a completion's log-probabilities."""
    return bytes.fromhex(token[6:].replace("\\x", "")) if token.startswith("bytes:") else token.encode()


# -- whole answers


def test_a_chat_is_what_the_model_writes_after_its_template(tiny, model, tokenizer):
    template = ChatTemplate(tokenizer)
    answer = tiny.openai.chat.completions.create(messages=HELLO, **GREEDY)
    expected = alone(model, tokenizer, template.prompt(HELLO), stop_ids=template.stop_ids)
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(template.prompt(HELLO))
    assert answer.usage.completion_tokens >= len(expected.tokens)
    assert answer.object == "chat.completion" and answer.choices[0].message.role == "assistant"


@pytest.mark.parametrize("prompt", ["The king", [84, 104, 101], ["a", "bc"], [[1, 2], [3]]])
def test_completions_of_texts_and_of_tokens(tiny, model, tokenizer, prompt):
    answer = tiny.openai.completions.create(prompt=prompt, **GREEDY)
    many = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    assert [choice.text for choice in answer.choices] == [alone(model, tokenizer, each).text for each in many]
    assert [choice.index for choice in answer.choices] == list(range(len(many)))
    assert answer.usage.prompt_tokens == sum(map(len, many))


def test_a_prompt_can_be_repeated(tiny, model, tokenizer):
    plain = tiny.openai.completions.create(prompt="The king", **GREEDY).choices[0].text
    assert tiny.openai.completions.create(prompt="The king", echo=True, **GREEDY).choices[0].text == "The king" + plain
    chunks = list(tiny.openai.completions.create(prompt="The king", echo=True, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The king" + plain


def test_what_lay_in_the_cache_is_told(tiny):
    messages = [{"role": "user", "content": "A long question, which is asked twice: " + "why? " * 20}]
    first, second = (tiny.openai.chat.completions.create(messages=messages, **GREEDY) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 100
    assert second.choices[0].message.content == first.choices[0].message.content


# -- streams


@pytest.mark.parametrize("options", STRANGE, ids=str)
def test_a_stream_put_together_is_the_whole_answer(tiny, options):
    options = {"model": "tiny", "max_tokens": 40, "messages": HELLO} | options
    whole = tiny.openai.chat.completions.create(**options)
    chunks = list(tiny.openai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    texts, reasons, roles, usages = joined(chunks)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert reasons == {choice.index: [choice.finish_reason] for choice in whole.choices}  # told once
    assert roles == {choice.index: ["assistant"] for choice in whole.choices}
    assert len(usages) == 1 and not chunks[-1].choices
    assert usages[0].completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    if options.get("logprobs"):
        told = [token for chunk in chunks for choice in chunk.choices if choice.logprobs
                for token in choice.logprobs.content]  # fmt: skip
        assert told == whole.choices[0].logprobs.content


def test_a_stream_as_it_comes_over_the_wire(tiny):
    body = {"messages": HELLO, "max_tokens": 5, "stream": True, "temperature": 0}
    with httpx.stream("POST", f"{tiny.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert all("usage" not in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["delta"] == {} and chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_many_clients_at_once_get_what_each_would_get_alone(tiny, model, tokenizer):
    template = ChatTemplate(tokenizer)
    talks = [[{"role": "user", "content": f"Question {i}" * (1 + i % 3)}] for i in range(24)]

    async def ask(client, messages):
        stream = await client.chat.completions.create(messages=messages, stream=True, **GREEDY)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all():
        async with AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, messages) for messages in talks))

    expected = [alone(model, tokenizer, template.prompt(t), stop_ids=template.stop_ids).text for t in talks]
    assert asyncio.run(ask_all()) == expected


# -- ends


def test_stop_texts_never_leak_though_they_lie_over_several_tokens(tiny):
    plain = tiny.openai.completions.create(prompt="Once", **(GREEDY | {"max_tokens": 60})).choices[0].text
    for begin in (2, 7, 12):
        stop = plain[begin : begin + 3]
        options = GREEDY | {"max_tokens": 60, "prompt": "Once", "stop": [stop, "never"]}
        expected = plain[: plain.index(stop)]
        whole = tiny.openai.completions.create(**options, logprobs=2).choices[0]
        assert (whole.text, whole.finish_reason) == (expected, "stop")
        chunks = list(tiny.openai.completions.create(**options, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        shown = b"".join(spelled(token) for token in whole.logprobs.tokens)
        assert shown.decode("utf-8", "replace") == expected  # and what tells of tokens betrays nothing, either


def test_texts_end_where_the_context_does(tiny):
    answer = tiny.openai.completions.create(model="tiny", prompt="x" * 1018, max_tokens=100, temperature=0)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens <= 6


def test_the_end_of_text_can_be_ignored(tiny, tokenizer):
    end = {str(tokenizer.eot_id): 100}
    stopped = tiny.openai.completions.create(prompt="x", logit_bias=end, **GREEDY)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    on = tiny.openai.completions.create(prompt="x", logit_bias=end, extra_body={"ignore_eos": True}, **GREEDY)
    assert on.choices[0].finish_reason == "length" and on.usage.completion_tokens == 24


# -- log-probabilities and penalties


def test_log_probabilities_are_the_models(tiny, model, tokenizer):
    prompt = tokenizer.encode("The king")
    told = tiny.openai.completions.create(prompt="The king", logprobs=4, **GREEDY).choices[0].logprobs
    tokens = alone(model, tokenizer, prompt).tokens
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    expected = logits[:, : tokenizer.vocab_size].log_softmax(-1)
    n = len(told.tokens)
    assert n and [spelled(token) for token in told.tokens] == [tokenizer.decode_bytes([t]) for t in tokens[:n]]
    assert told.token_logprobs == pytest.approx([expected[i, t].item() for i, t in enumerate(tokens[:n])], abs=1e-4)
    assert sorted(told.top_logprobs[0].values())[::-1] == pytest.approx(expected[0].topk(4).values.tolist(), abs=1e-4)
    assert told.text_offset[0] == 0


def test_a_bias_forces_and_bans(tiny):
    forced = tiny.openai.completions.create(prompt="x", logit_bias={"65": 100}, **GREEDY).choices[0].text
    assert forced == "A" * 24
    plain = tiny.openai.completions.create(prompt="x", logprobs=0, **GREEDY).choices[0]
    first = plain.logprobs.tokens[0].encode()[0] if plain.logprobs.tokens[0].isascii() else None
    if first is not None:
        banned = tiny.openai.completions.create(prompt="x", logit_bias={str(first): -100}, **GREEDY).choices[0].text
        assert not banned.startswith(chr(first))


def test_seeds_repeat_and_choices_differ(tiny):
    options = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "n": 3}
    texts = [[c.text for c in tiny.openai.completions.create(**options, seed=seed).choices] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) == 3
    free = [[c.text for c in tiny.openai.completions.create(**options).choices] for _ in range(2)]
    assert free[0] != free[1]


# -- forms


class Person(BaseModel):
    """What an answer is to be."""

    name: str
    age: int
    tall: bool


def test_answers_in_a_form(tiny):
    schema = {"name": "person", "schema": Person.model_json_schema()}
    for seed in range(3):
        options = {"model": "tiny", "messages": HELLO, "max_tokens": 200, "seed": seed, "temperature": 0.8}
        form = {"type": "json_schema", "json_schema": schema}
        # A bias towards the quotation mark ends texts that a model of random weights would go on with for ever.
        answer = tiny.openai.chat.completions.create(response_format=form, logit_bias={"34": 8}, **options)
        choice = answer.choices[0]
        if choice.finish_reason == "stop":
            Person.model_validate_json(choice.message.content)
    parsed = tiny.openai.beta.chat.completions.parse(response_format=Person, logit_bias={"34": 8}, **options)
    assert isinstance(parsed.choices[0].message.parsed, Person)
    anything = tiny.openai.chat.completions.create(
        response_format={"type": "json_object"}, logit_bias={"34": 8, "125": 9}, **options
    )
    assert isinstance(json.loads(anything.choices[0].message.content), dict)


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
    "additionalProperties": False}}}  # fmt: skip


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_that_must_be_called_is_called(tiny, choice):
    options = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "tool_choice": choice, "seed": 1,
               "parallel_tool_calls": False}  # fmt: skip
    answer = tiny.openai.chat.completions.create(**options).choices[0]
    assert answer.finish_reason == "tool_calls" and not answer.message.content
    (call,) = answer.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    chunks = list(tiny.openai.chat.completions.create(**options, stream=True))
    calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
    assert json.loads("".join(c.function.arguments for c in calls)) == json.loads(call.function.arguments)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]
    # And the conversation goes on with what the call returned.
    told = [*HELLO, {"role": "assistant", "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]  # fmt: skip
    after = tiny.openai.chat.completions.create(messages=told, tools=[WEATHER], **GREEDY)
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


# -- other routes


def test_embeddings_are_the_mean_of_the_last_layer(tiny, model, tokenizer):
    texts = ["The king", "a much longer text, of which the mean is taken"]
    found = tiny.openai.embeddings.create(model="tiny", input=texts, encoding_format="float")
    seen = []
    hook = model.norm.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        for text in texts:
            model(torch.tensor([tokenizer.encode(text)]))
    finally:
        hook.remove()
    for embedding, hidden in zip(found.data, seen):
        mean = hidden[0].mean(0)
        assert embedding.embedding == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    raw = httpx.post(f"{tiny.url}/v1/embeddings", json={"input": texts[0], "encoding_format": "base64"}).json()
    packed = base64.b64decode(raw["data"][0]["embedding"])
    assert struct.unpack(f"<{len(packed) // 4}f", packed) == pytest.approx(found.data[0].embedding, abs=1e-6)


def test_tokens_of_a_text_and_of_a_conversation_and_back(tiny, tokenizer):
    text = "Grüße, 世界"
    found = httpx.post(f"{tiny.url}/tokenize", json={"prompt": text}).json()
    assert found["tokens"] == tokenizer.encode(text) and found["count"] == len(found["tokens"])
    assert httpx.post(f"{tiny.url}/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    found = httpx.post(f"{tiny.url}/tokenize", json={"messages": HELLO}).json()
    assert found["tokens"] == ChatTemplate(tokenizer).prompt(HELLO)


def test_halves_of_surrogate_pairs_can_be_sent(tiny):
    half = {str(byte): 100 - i for i, byte in enumerate((0xED, 0xA6, 0xA6))}  # a model may spell it, UTF-8 cannot
    for tokens in ([0xED, 0xA6, 0xA6], [65, 0xED, 0xA6, 0xA6, 66]):
        assert "\ufffd" in httpx.post(f"{tiny.url}/detokenize", json={"tokens": tokens}).json()["prompt"]
        assert "\ufffd" in tiny.openai.completions.create(prompt=tokens, echo=True, **GREEDY).choices[0].text
        body = {"prompt": tokens, "echo": True, "max_tokens": 1, "stream": True, "logit_bias": half}
        assert httpx.post(f"{tiny.url}/v1/completions", json=body).text.endswith("data: [DONE]\n\n")


def test_models_are_listed(tiny):
    assert [model.id for model in tiny.openai.models.list()] == ["tiny"]
    assert tiny.openai.models.retrieve("tiny").id == "tiny"


def test_adapters_are_models_in_one_batch(serve, build, tokenizer, tmp_path):
    templates, texts = ChatTemplate(tokenizer), {}
    for seed, name in enumerate(("polite", "rude")):
        torch.manual_seed(seed)
        adapted = add_lora(build().model, rank=2 + seed)
        for parameter in (p for p in adapted.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.3)
        save_adapter(adapted, tmp_path / name)
        texts[name] = alone(adapted, tokenizer, templates.prompt(HELLO), stop_ids=templates.stop_ids).text
    texts["tiny"] = alone(build().model, tokenizer, templates.prompt(HELLO), stop_ids=templates.stop_ids).text
    assert len(set(texts.values())) == 3

    async def ask(url, name):
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.create(messages=HELLO, **(GREEDY | {"model": name}))
            return name, answer.choices[0].message.content, answer.model

    async def ask_all(url):
        return await asyncio.gather(*(ask(url, name) for name in [*texts] * 4))

    with serve(adapters={name: str(tmp_path / name) for name in ("polite", "rude")}) as server:
        assert [model.id for model in server.openai.models.list()] == ["tiny", "polite", "rude"]
        assert asyncio.run(ask_all(server.url)) == [(name, texts[name], name) for name in [*texts] * 4]


def test_every_route_is_described(tiny):
    described = httpx.get(f"{tiny.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/embeddings", "/tokenize", "/detokenize",
            "/health", "/metrics"} <= set(described["paths"])  # fmt: skip
    assert "422" not in json.dumps(described)


def test_requests_are_spans_without_their_texts(serve):
    trace = pytest.importorskip("opentelemetry.trace")
    pytest.importorskip("opentelemetry.instrumentation.fastapi")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    trace.set_tracer_provider(provider)
    with serve(ServerOptions("tiny", traces=True)) as server:
        for stream in (False, True):
            answer = server.openai.completions.create(prompt="a secret", stream=stream, **GREEDY)
            list(answer if stream else ())
        httpx.get(f"{server.url}/health")
    spans = [span for span in kept.get_finished_spans() if span.kind == trace.SpanKind.SERVER]
    assert len(spans) == 2 and "secret" not in "".join(span.to_json() for span in spans)
    assert all(span.attributes["gen_ai.usage.input_tokens"] == 8 for span in spans)
    assert all(span.attributes["gen_ai.usage.output_tokens"] == 24 for span in spans)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
