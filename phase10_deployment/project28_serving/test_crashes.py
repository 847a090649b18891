"""Engines that break, hang or cannot be built, texts that fail: everybody is told, and what can goes on."""

import asyncio
import contextlib
import re
import threading
import time

import httpx
import openai
import pytest

from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase10_deployment.project28_serving import client as client_module
from phase10_deployment.project28_serving.answers import UnavailableError
from phase10_deployment.project28_serving.client import EngineClient
from phase10_deployment.project28_serving.conftest import SlowEngine, make_model
from phase10_deployment.project28_serving.engine import Engine
from phase10_deployment.project28_serving.worker import Ask

TEXT = "/v1/completions"


def break_next_step(engine):
    """As if a step had met an error of its device."""

    def fail():
        raise RuntimeError("the device is lost")

    engine.advance = fail


def test_a_broken_engine_answers_everybody_and_comes_back(serve, eventually, monkeypatch, model, tokenizer):
    monkeypatch.setattr(client_module, "PAUSE", 0.3)
    with serve(kind=SlowEngine) as server:
        found = {}

        def ask(name, **more):
            try:
                answer = server.openai.completions.create(model="tiny", prompt="Once", max_tokens=500, **more)
                found[name] = "".join(chunk.choices[0].text for chunk in answer) if more else answer
            except openai.APIError as error:
                found[name] = error

        threads = [threading.Thread(target=ask, args=("whole",)),
                   threading.Thread(target=ask, args=("stream",), kwargs={"stream": True})]  # fmt: skip
        for thread in threads:
            thread.start()
        eventually(lambda: server.client.gauges.running == 2)
        asyncio.run_coroutine_threadsafe(server.client.call(break_next_step), server.client._loop)
        for thread in threads:
            thread.join(20)
        assert isinstance(found["whole"], openai.InternalServerError) and found["whole"].status_code == 503
        assert isinstance(found["stream"], openai.APIError)
        assert all("the engine broke" in str(error) for error in found.values())
        assert "the device is lost" in server.client.reason  # which is for the log
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "restarting")
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        assert httpx.post(server.url + TEXT, json={"prompt": "x"}).status_code == 503
        eventually(lambda: httpx.get(f"{server.url}/health").status_code == 200)
        answer = server.openai.completions.create(model="tiny", prompt="Once", max_tokens=9, temperature=0)
        assert answer.choices[0].text == generate(model, tokenizer, "Once", SamplingParams(9, 0.0)).text
        assert httpx.get(f"{server.url}/health").json()["restarts"] == 1


def test_an_engine_that_breaks_again_and_again_is_given_up(build, eventually, monkeypatch):
    monkeypatch.setattr(client_module, "PAUSE", 0.001)
    built = []

    def fragile():
        built.append(build())
        if len(built) > 1:
            break_next_step(built[-1])
        return built[-1]

    async def wear_out():
        client = EngineClient(fragile, process=False)
        await client.start()
        await client.ready()
        await client.call(break_next_step)
        for _ in range(20):
            try:
                await client.ready()
            except UnavailableError:
                break
            async with asyncio.timeout(20):
                with pytest.raises(UnavailableError, match="the engine broke"):
                    async for _ in client.open([Ask([1, 2], SamplingParams(4))]):
                        pass
        assert client.state == client_module.BROKEN and len(built) == 1 + client_module.RESTARTS
        await client.stop()

    asyncio.run(wear_out())


def test_an_engine_that_cannot_be_built_says_why():
    def build():
        raise ValueError("no such model: make one first")

    async def start():
        client = EngineClient(build, process=False)
        await client.start()
        with pytest.raises(UnavailableError, match="make one first"):
            await client.ready()
        await client.stop()

    asyncio.run(start())


def test_a_text_that_cannot_be_written_harms_nobody_else(serve, monkeypatch):
    with serve() as server:

        async def ask():
            client = server.client
            bad = Ask([1, 2], SamplingParams(4, logit_bias={10_000: 1.0}))  # the server would not let it pass
            answers = client.open([Ask([1, 2], SamplingParams(4, 0.0))])
            refused = client.open([bad])
            with pytest.raises(client_module.RefusedError, match="logit_bias"):
                async for _ in refused:
                    pass
            return sum([len(batch) async for batch in answers])

        future = asyncio.run_coroutine_threadsafe(ask(), server.client._loop)
        assert future.result(20) == 4


def slow_call(engine):
    """A call that takes as long as some steps."""
    time.sleep(0.02)


def broken_call(engine):
    """A call with a mistake of its own."""
    return engine.no_such_thing


def test_calls_that_fail_are_told_and_the_engine_goes_on(serve):
    with serve() as server:
        future = asyncio.run_coroutine_threadsafe(server.client.call(broken_call), server.client._loop)
        with pytest.raises(UnavailableError, match="AttributeError"):
            future.result(20)
        assert server.openai.completions.create(model="tiny", prompt="x", max_tokens=2).choices[0].text is not None
        assert server.client.n_restarts == 0


def test_calls_do_not_stop_texts(serve):
    with serve() as server:
        client, done = server.client, []

        async def call_for_ever():
            while not done:
                await client.call(slow_call)

        async def ask():
            callers = [asyncio.ensure_future(call_for_ever()) for _ in range(3)]
            async with asyncio.timeout(20):
                async for batch in client.open([Ask([1, 2], SamplingParams(20, 0.0, stop_ids=()))]):
                    done.extend(each for each in batch if each[1].finish_reason)
            await asyncio.gather(*callers)

        asyncio.run_coroutine_threadsafe(ask(), client._loop).result(30)
        assert done


class StuckEngine(Engine):
    """An engine whose second step never ends; each one that is built anew is as stuck."""

    n_steps = 0

    def advance(self):
        self.n_steps += 1
        if self.n_steps > 1:
            time.sleep(60)
        return super().advance()


def build_stuck():
    """A tiny one, in a process of its own."""
    tokenizer = with_chat_tokens(byte_tokenizer())
    engine = StuckEngine(make_model(tokenizer.vocab_size), tokenizer, n_rows=2, max_tokens=64)
    engine.source = "stuck.pt"
    return engine


def test_an_engine_that_is_stuck_is_ended_and_started_anew(eventually):
    async def read(client, pieces):
        async with asyncio.timeout(20):
            async for batch in client.open([Ask([1, 2], SamplingParams(4, 0.0, stop_ids=()))]):
                pieces += batch

    async def impatient(client):
        async with asyncio.timeout(20):
            while client.n_restarts == 1:  # clients who give up after half a second, one after the other
                with contextlib.suppress(UnavailableError):
                    answers = client.open([Ask([1, 2], SamplingParams(4, 0.0, stop_ids=()))])
                    await asyncio.sleep(0.5)
                    client.close(answers)
        await client.ready()

    async def ask():
        client = EngineClient(build_stuck, silence=2.0)
        await client.start()
        await client.ready()
        await asyncio.sleep(2.5)  # nothing is asked for: its silence is no sign
        first, pid = [], client.card.pid
        assert client.state == client_module.READY
        with pytest.raises(UnavailableError, match="the engine broke"):
            await read(client, first)
        await client.ready()
        await impatient(client)
        assert len(first) == 1 and client.n_restarts == 2 and client.card.pid != pid
        await client.stop()

    asyncio.run(ask())


class ClumsyEngine(Engine):
    """An engine with a mistake in what it does before a text is queued."""

    def add(self, prompt, *args):
        if len(prompt) == 3:
            raise RuntimeError("a secret of this text")
        return super().add(prompt, *args)


def test_texts_that_fail_are_counted_and_the_others_go_on(serve, capfd):
    with serve(kind=ClumsyEngine) as server:
        failed = httpx.post(server.url + TEXT, json={"prompt": [1, 2, 3]})
        assert failed.status_code == 503 and "RuntimeError" in failed.text and "secret" not in failed.text
        assert httpx.post(server.url + TEXT, json={"prompt": [1, 2], "max_tokens": 2}).status_code == 200
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'vllm:request_success_total{finished_reason="error",model_name="tiny"} 1.0' in metrics
        assert server.client.n_restarts == 0
    said = capfd.readouterr().err
    assert (
        "RuntimeError" in said
        and "in add" in said
        and "of this text" not in said.replace('a secret of this text")', "")
    )


def test_what_an_engine_counted_outlives_it(serve, eventually, monkeypatch):
    monkeypatch.setattr(client_module, "PAUSE", 0.001)
    prompt = {"prompt": list(range(1, 41)), "max_tokens": 2}
    with serve(kind=SlowEngine) as server:

        def queries():
            found = re.search(r"vllm:prefix_cache_queries_total\{.*\} (.*)", httpx.get(f"{server.url}/metrics").text)
            return float(found[1])

        def back(n):
            eventually(lambda: server.client.n_restarts == n and server.client.state == "ready")

        for n in (1, 2):  # twice, without a look at the metrics in between
            httpx.post(server.url + TEXT, json=prompt)
            asyncio.run_coroutine_threadsafe(server.client.call(break_next_step), server.client._loop)
            httpx.post(server.url + TEXT, json=prompt)
            back(n)
        httpx.post(server.url + TEXT, json=prompt)
        assert queries() >= 3 * 39
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'finished_reason="error",model_name="tiny"} 2.0' in metrics


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
