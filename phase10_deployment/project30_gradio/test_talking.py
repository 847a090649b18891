"""Asking a server at a real socket: streams, errors in words, what is forgotten, and breaking off."""

import asyncio
import itertools
import re

import httpx
import pytest

from phase2_finetuning.project4_sft.template import ChatTemplate
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase10_deployment.project28_serving.protocol import ChatRequest
from phase10_deployment.project30_gradio.chatting import answer, before_last_question, keep, titles
from phase10_deployment.project30_gradio.stops import Stops, until
from phase10_deployment.project30_gradio.talking import Api, ServerError, checked, told_by
from phase10_deployment.project30_gradio.wishes import Wishes

HELLO = [{"role": "user", "content": "Hello"}]
NOWHERE = "http://127.0.0.1:9/v1"  # the port at which nobody ever listens


def greedy(**more):
    return Wishes(temperature=0, max_tokens=24, **more)


async def last(turns):
    found = [turn async for turn in turns]
    return found[-1], found


# -- answers


def test_an_answer_is_what_the_model_writes_after_its_template(visit, model, tokenizer):
    async def scenario(house):
        return await last(answer(house.backend, asyncio.Event(), HELLO, "tiny", "Be brief.", greedy()))

    turn, turns = visit(scenario)
    template = ChatTemplate(tokenizer)
    prompt = template.prompt([{"role": "system", "content": "Be brief."}, *HELLO])
    expected = generate(model, tokenizer, prompt, SamplingParams(24, 0.0, stop_ids=template.stop_ids))
    assert turn.messages == [*HELLO, {"role": "assistant", "content": expected.text}]
    assert turn.over and not turn.failed and "<b>" in turn.told
    grown = [each.messages[-1]["content"] for each in turns if each.messages[-1]["role"] == "assistant"]
    assert len(grown) > 3 and all(b.startswith(a) for a, b in itertools.pairwise(grown))


def test_what_lay_in_the_cache_is_told(visit):
    long = [{"role": "user", "content": "why? " * 20}]

    async def scenario(house):
        for _ in range(2):
            turn, _ = await last(answer(house.backend, asyncio.Event(), long, None, "", greedy()))
        return turn.told

    assert "96 of 104 prompt tokens found in the cache" in visit(scenario)  # six blocks of 16


def test_the_oldest_messages_are_forgotten_the_system_prompt_is_not(visit):
    system = {"role": "system", "content": "Be brief."}
    talk = [{"role": role, "content": f"{i} " + "x" * 30} for i, role in enumerate(["user", "assistant"] * 6)]
    talk.append({"role": "user", "content": "now"})

    async def scenario(house):
        whole = await house.backend.api.fitted([system, talk[-1]], 24)
        cut = await house.backend.api.fitted([system, *talk], 24)
        turn, _ = await last(answer(house.backend, asyncio.Event(), talk, None, "Be brief.", greedy()))
        return whole, cut, turn

    whole, (kept, n_out), turn = visit(scenario)
    assert whole == ([system, talk[-1]], 0)
    assert kept[0] == system and kept[1]["role"] == "user" and kept[1:] == talk[n_out:] and 0 < n_out < len(talk)
    assert f"the oldest {n_out} messages are forgotten" in turn.told
    assert turn.messages[:-1] == talk  # on the page all of it stays


def test_a_model_is_chosen_by_name_and_so_is_an_adapter(visit, adapters):
    async def scenario(house):
        names = await house.backend.api.models()
        turns = [await last(answer(house.backend, asyncio.Event(), HELLO, name, "", greedy()))
                 for name in (*names, "other")]  # fmt: skip
        return names, [turn.messages[-1]["content"] for turn, _ in turns[:-1]], turns[-1][0]

    names, texts, refused = visit(scenario, engine={"adapters": adapters})
    assert names == ["tiny", "polite"] and texts[0] != texts[1]
    assert refused.failed and "other" in refused.told and "polite" in refused.told and refused.messages == HELLO


# -- the controls


def test_every_control_arrives_as_the_protocol_has_it():
    wishes = Wishes(0.5, 0.9, 40, 0.05, 77, 1.1, 0.2, 0.3, 9, "END\n\\n\\n", "5=-100\n7=2.5", True)
    request = ChatRequest(messages=HELLO, **wishes.body())
    told = request.model_dump(exclude_none=True)
    assert told | {"messages": None} == {
        "messages": None, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 77,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 9,
        "stop": ["END", "\n\n"], "logit_bias": {"5": -100.0, "7": 2.5}, "response_format": {"type": "json_object"},
    }  # fmt: skip


def test_what_is_off_is_not_sent():
    assert Wishes(temperature=0.0).body() == {"temperature": 0.0, "max_tokens": 256}
    with pytest.raises(ServerError, match="42=-100"):
        Wishes(logit_bias="a word").body()


# -- what goes wrong


def test_a_server_that_is_down_is_named_with_the_remedy():
    async def scenario():
        api = Api(NOWHERE)
        with pytest.raises(ServerError, match=r"127\.0\.0\.1:9/v1.*serve\.py"):
            await api.models()
        with pytest.raises(ServerError, match="no server answers"):
            await last(api.stream("/chat/completions", {"messages": HELLO}))
        return await api.health()

    assert asyncio.run(scenario()).status == "down"


def test_an_answer_of_a_server_that_is_down_gives_the_question_back():
    from phase10_deployment.project30_gradio.backend import Backend

    turn, _ = asyncio.run(last(answer(Backend(Api(NOWHERE)), asyncio.Event(), HELLO, None, "", greedy())))
    assert turn.over and turn.failed and turn.messages == HELLO and "pg-bad" in turn.told


def test_a_wrong_key_is_refused_with_the_flag_and_the_right_one_is_not(visit):
    async def scenario(house):
        wrong, right = Api(f"{house.url}/v1", "wrong"), Api(f"{house.url}/v1", "secret")
        with pytest.raises(ServerError, match="--api_key"):
            await wrong.models()
        with pytest.raises(ServerError, match="--api_key"):
            await last(wrong.stream("/chat/completions", {"messages": HELLO}))
        health, words, _ = await house.backend.tell()  # whose key is missing
        return await right.models(), health.status, words

    assert visit(scenario, keys=["secret"])[:2] == (["tiny"], "refused")


def test_errors_of_others_are_told():
    def answered(status, **content):
        return httpx.Response(status, request=httpx.Request("GET", "http://there/v1/models"), **content)

    with pytest.raises(ServerError, match="the queue is full"):
        checked(answered(429, json={"error": {"message": "the queue is full"}}))
    with pytest.raises(ServerError, match="end with /v1"):
        checked(answered(404, text="<html>not here</html>"))
    assert told_by('data: {"choices": [{"text": "a"}], "usage": null}')[0].text == "a"
    with pytest.raises(ServerError, match="the engine broke"):
        told_by('data: {"error": {"message": "the engine broke"}}')


# -- breaking off


def test_stopping_closes_the_connection_and_the_engine_forgets_the_text(visit):
    async def scenario(house):
        stop, seen = asyncio.Event(), []
        wishes = Wishes(temperature=1.0, max_tokens=240, logit_bias="")
        async for turn in answer(house.backend, stop, HELLO, None, "", wishes):
            seen.append(turn)
            if len(seen) == 4:
                assert house.client.gauges.running == 1 and house.client.gauges.usage > 0
                stop.set()
        for _ in range(100):
            if not house.client.gauges.running:
                break
            await asyncio.sleep(0.02)
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"{house.url}/metrics")).text
        return seen[-1], house.client.gauges, house.client.n_open, metrics

    turn, gauges, n_open, metrics = visit(scenario, engine={"slow": True})
    assert turn.over and "stopped" in turn.told and turn.messages[-1]["role"] == "assistant"
    assert gauges.running == 0 and gauges.usage == 0.0 and n_open == 0
    assert re.search(r'finished_reason="abort"[^}]*\} 1\.0', metrics)


def test_a_source_is_closed_by_the_word_not_by_the_garbage_collector():
    async def scenario():
        closed, stop = [], asyncio.Event()

        async def source():
            try:
                for i in range(1000):
                    yield i
                    await asyncio.sleep(0 if i < 3 else 60)  # the fourth piece never comes
            finally:
                closed.append(True)

        seen = []
        asyncio.get_running_loop().call_later(0.05, stop.set)
        async for i in until(stop, source()):
            seen.append(i)
        return seen, list(closed)

    assert asyncio.run(scenario()) == ([0, 1, 2, 3], [True])


def test_a_source_that_waits_with_a_piece_in_its_hand_is_closed_too():
    async def scenario():
        closed, stop = [], asyncio.Event()

        async def source():
            try:
                while True:
                    yield "a piece"
            finally:
                closed.append(True)

        pieces = source()  # held here, so that nothing collects it
        async for _ in until(stop, pieces):
            stop.set()
        return list(closed)  # as it is now: the end of the event loop closes everything

    assert asyncio.run(scenario()) == [True]


def test_an_error_of_the_source_comes_through():
    async def broken():
        yield 1
        raise ServerError("gone")

    async def scenario():
        async for _ in until(asyncio.Event(), broken()):
            pass

    with pytest.raises(ServerError, match="gone"):
        asyncio.run(scenario())


def test_sessions_stop_their_own():
    async def scenario():
        stops = Stops()
        with stops.begin("a", "chat") as one, stops.begin("b", "chat") as two, stops.begin("a", "blocks") as three:
            stops.stop("a", "chat")
            assert (one.is_set(), two.is_set(), three.is_set()) == (True, False, False)
            stops.stop("a")
            assert (two.is_set(), three.is_set()) == (False, True) and stops.busy("b", "chat")
            with stops.begin("b", "chat") as later:  # a new text ends the old one
                assert two.is_set() and not later.is_set()
        assert not stops.busy("a", "chat") and not stops.busy("b", "chat")
        await stops.end("a", "chat")

    asyncio.run(scenario())


# -- history


def test_conversations_are_kept_the_newest_in_front_each_once():
    saved = []
    for number, words in (("a", "one"), ("b", "two"), ("a", "three")):
        saved = keep(saved, number, [{"role": "user", "content": words}])
    assert titles(saved) == [("three", "a"), ("two", "b")]
    assert keep(saved, "a", []) == saved[1:]
    for i in range(30):
        saved = keep(saved, str(i), [{"role": "user", "content": "word " * 30}])
    assert len(saved) == 20 and titles(saved)[0][0].endswith("…") and len(titles(saved)[0][0]) < 60


def test_the_last_question_is_given_back():
    talk = [*HELLO, {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "And?"}]
    assert before_last_question(talk) == (talk[:2], "And?")
    assert before_last_question([]) == ([], "")


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
