"""Clients that leave, whenever they do, and streams that begin: nothing stays behind, nobody else notices."""

import asyncio
import json
import threading
import time

import httpx
import pytest

from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase10_deployment.project28_serving.conftest import SlowEngine
from phase10_deployment.project28_serving.engine import Engine
from phase10_deployment.project28_serving.streaming import EventStream

TEXT = "/v1/completions"
LONG_TEXT = {"prompt": "x", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
EMPTY = (0, 0, 0.0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_within_a_step(serve, eventually, stream):
    with serve(kind=SlowEngine) as server:

        async def leave():
            async with httpx.AsyncClient() as http:
                asked = asyncio.ensure_future(http.post(server.url + TEXT, json=LONG_TEXT | {"stream": stream}))
                while not server.client.gauges.running:
                    await asyncio.sleep(0.002)
                asked.cancel()

        asyncio.run(leave())
        eventually(lambda: not server.client.n_open)  # the server has noticed
        before = SlowEngine.n_steps
        eventually(lambda: server.client.gauges[:3] == EMPTY)
        assert SlowEngine.n_steps - before <= 2  # the one that ran, and at most one that had been planned
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 1.0' in metrics
        assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in metrics
        assert 'vllm:kv_cache_usage_perc{model_name="tiny"} 0.0' in metrics


def test_one_who_leaves_the_queue_takes_nobody_along(serve, eventually, model, tokenizer):
    with serve(kind=SlowEngine, n_rows=1) as server:
        body = {"prompt": "Once", "max_tokens": 30, "ignore_eos": True, "temperature": 0}
        found = []
        first = threading.Thread(target=lambda: found.append(httpx.post(server.url + TEXT, json=body, timeout=60)))
        first.start()
        eventually(lambda: server.client.gauges.running == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + TEXT, json=body, timeout=0.1)
        first.join()
        expected = generate(model, tokenizer, "Once", SamplingParams(30, 0.0, stop_ids=())).text
        assert found[0].json()["choices"][0]["text"] == expected
        eventually(lambda: server.client.gauges[:3] == EMPTY)


def test_sixty_four_streams_at_once(serve, eventually):
    with serve(n_rows=16, max_tokens=64) as server:

        async def ask(http, i):
            body = {"prompt": f"Text {i}", "max_tokens": 12, "ignore_eos": True, "stream": True,
                    "stream_options": {"include_usage": True}}  # fmt: skip
            async with http.stream("POST", server.url + TEXT, json=body) as response:
                lines = [line async for line in response.aiter_lines() if line]
            return response.status_code, json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"]

        async def ask_all():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits, timeout=60) as http:
                return await asyncio.gather(*(ask(http, i) for i in range(64)))

        assert asyncio.run(ask_all()) == [(200, 12)] * 64
        eventually(lambda: server.client.gauges[:3] == EMPTY)
        metrics = httpx.get(f"{server.url}/metrics").text
        counts = {"time_to_first_token_seconds": 64, "e2e_request_latency_seconds": 64,
                  "request_queue_time_seconds": 64, "inter_token_latency_seconds": 64 * 11}  # fmt: skip
        for name, count in counts.items():
            assert f'vllm:{name}_count{{model_name="tiny"}} {count}.0' in metrics
        assert f'vllm:generation_tokens_total{{model_name="tiny"}} {64 * 12}.0' in metrics
        assert 'vllm:prompt_tokens_total{model_name="tiny"}' in metrics
        assert 'http_requests_total{method="POST",path="/v1/completions",status="200"} 64.0' in metrics


class HeavyEngine(Engine):
    """An engine whose steps take half a second."""

    def advance(self):
        time.sleep(0.5)
        return super().advance()


def test_a_stream_begins_while_the_first_step_is_under_way(serve):
    with serve(kind=HeavyEngine) as server, httpx.Client(timeout=60) as http:
        began = time.monotonic()
        body = {"prompt": "x", "max_tokens": 1, "stream": True, "ignore_eos": True}
        with http.stream("POST", server.url + TEXT, json=body) as response:
            headers = time.monotonic() - began
            text = "".join(response.iter_text())
        assert response.status_code == 200 and text.endswith("data: [DONE]\n\n")
        assert headers < 0.4 < 0.5 <= time.monotonic() - began


def test_who_leaves_before_a_stream_begins_leaves_nothing_behind():
    ended = []

    async def never():
        ended.append("begun")
        yield b""

    async def leave():
        async def send(message):
            await asyncio.sleep(60)  # the connection takes nothing

        async def receive():
            return {"type": "http.disconnect"}

        await EventStream(never(), lambda: ended.append("ended"))({}, receive, send)

    asyncio.run(leave())
    assert ended == ["ended"]


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
