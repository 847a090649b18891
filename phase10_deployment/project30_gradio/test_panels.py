"""The panels of the playground against a real server: with its engine in view, and with its API alone."""

import asyncio
import re

import pytest

from phase10_deployment.project30_gradio import engine_panels, panels
from phase10_deployment.project30_gradio.backend import Backend
from phase10_deployment.project30_gradio.talking import Api, ServerError

STORY = "Once upon a time there was a king, and the king had a daughter."


def test_tokens_of_a_text_and_of_a_chat(visit):
    async def scenario(house):
        plain = await panels.show_tokens(house.backend, "Hi", "tiny", False, True)
        chat = await panels.show_tokens(house.backend, "Hi", "tiny", True, False)
        return plain, chat, await panels.show_tokens(house.backend, "", "tiny", False, True)

    plain, chat, nothing = visit(scenario)
    assert [part for part in re.findall(r">([^<>]+)<i>", plain)] == ["H", "i"]
    assert "&lt;|user|&gt;" in chat and "&lt;|assistant|&gt;" in chat and "Write something" in nothing


def test_the_api_tells_the_same_odds_as_the_engine_as_far_as_it_tells(visit):
    async def scenario(house):
        engine = await panels.next_odds(house.backend, STORY, "tiny")
        api = await panels.next_odds(Backend(house.backend.api), STORY, "tiny")
        return engine, api

    engine, api = visit(scenario)
    assert engine.whole and not api.whole and len(api.logprobs) <= 20 < len(engine.logprobs)
    assert api.logprobs == pytest.approx(engine.logprobs[: len(api.logprobs)], abs=1e-4)
    assert "of the vocabulary" in panels.show_odds(engine, 1.0, 0, 1.0, 0.0)
    assert "all that the API tells" in panels.show_odds(api, 0.7, 5, 0.9, 0.0)
    assert "<b>5</b><span>tokens may be drawn" in panels.show_odds(engine, 1.0, 5, 1.0, 0.0)
    assert "Write the beginning" in panels.show_odds(None, 1.0, 0, 1.0, 0.0)


def test_attention_by_layer_and_head(visit):
    async def scenario(house):
        long = await panels.attend(house.backend, STORY * 3, "tiny", 99)  # the last layer, and the first 64 tokens
        with pytest.raises(ServerError, match="write a text"):
            await panels.attend(house.backend, "", "tiny", 0)
        return await panels.attend(house.backend, "The king", "tiny", 0), long

    maps, long = visit(scenario)
    assert [token.text for token in maps.tokens] == list("The king") and len(maps.heads) == 4
    assert len(long.tokens) == 64
    heads, picture = panels.show_attention(maps, 9)  # there are four: the last of them
    assert heads.count("<img") == 4 and heads.index("pg-chosen") > heads.index('alt="head 2"')
    assert picture.count("pg-weight") == 36 and "on the first token" in picture


def test_a_batch_shares_its_beginning_and_leaves_nothing_behind(visit):
    async def scenario(house):
        films = [film async for film in engine_panels.run_batch(house.backend, "me", STORY, "tiny", 4, 24, False)]
        return films[-1], house.client.gauges

    film, gauges = visit(scenario)
    busy = [moment for moment in film.moments if len(moment.rows) == 4]
    assert busy and max(moment.saved for moment in busy) == 3 * (len(STORY) // 16)
    assert film.over and len(film.moments[film.place].rows) > 0  # the fullest moment is shown
    assert not film.moments[-1].rows and film.moments[-1].kept and gauges.running == 0
    assert "4</b><span>texts run" in engine_panels.show_moment(film.moments, film.moments.index(busy[0]))
    assert "Let a few texts" in engine_panels.show_moment([], 0)


def test_texts_that_begin_differently_share_nothing(visit):
    async def scenario(house):
        films = [film async for film in engine_panels.run_batch(house.backend, "me", STORY, "tiny", 3, 8, True)]
        return films[-1]

    assert max(moment.saved for moment in visit(scenario).moments) == 0


def test_a_batch_that_is_stopped_frees_its_blocks(visit):
    async def scenario(house):
        async for film in engine_panels.run_batch(house.backend, "me", STORY, "tiny", 3, 180, False):
            if film.moments[-1].rows:
                house.backend.stops.stop("me")
        for _ in range(100):
            if not house.client.gauges.running:
                break
            await asyncio.sleep(0.02)
        return film, house.client.gauges

    film, gauges = visit(scenario, engine={"slow": True})
    assert gauges.running == 0 and gauges.usage == 0.0
    assert max(row.n_tokens for moment in film.moments for row in moment.rows) < len(STORY) + 100  # long before the end


def test_a_prompt_that_is_sent_twice_is_found(visit):
    async def scenario(house):
        sent, _ = await engine_panels.send_prompt(house.backend, STORY, "tiny", [])
        sent, _ = await engine_panels.send_prompt(house.backend, STORY, "tiny", sent)
        sent, picture = await engine_panels.send_prompt(house.backend, "X" + STORY, "tiny", sent)
        for _ in range(8):
            sent, _ = await engine_panels.send_prompt(house.backend, "a", "tiny", sent)
        return sent, picture

    sent, picture = visit(scenario)
    whole = len(STORY) // 16 * 16
    assert f"<b>0 of {len(STORY) + 1}</b>" in picture and f"<b>{whole} of {len(STORY)}</b>" in picture
    assert len(sent) == engine_panels.MOST_SENT


def test_speculation_writes_what_was_asked_for_and_can_be_stopped(visit):
    async def scenario(house):
        twice = "the cat sat on the mat. the cat sat on the mat. the cat"
        pictures = [each async for each in engine_panels.speculate(house.backend, "me", twice, "tiny", 4, 12, 0.0)]
        stopped = []
        async for each in engine_panels.speculate(house.backend, "me", twice, "tiny", 4, 100, 0.0):
            stopped.append(each)
            house.backend.stops.stop("me")
        with pytest.raises(ServerError, match="the model reads 256"):
            await anext(engine_panels.speculate(house.backend, "me", "x" * 300, "tiny", 4, 12, 0.0))
        return pictures, stopped

    pictures, stopped = visit(scenario)
    n_tokens = int(re.search(r"<b>(\d+)</b><span>tokens written", pictures[-1])[1])
    assert 12 <= n_tokens <= 16 and len(stopped) == 1
    assert f"<b>{len(pictures)}</b><span>runs of the model" in pictures[-1]


def test_panels_that_need_the_engine_say_so_and_the_others_work(visit):
    async def scenario(house):
        assert house.backend.client is None
        for panel in (
            panels.attend(house.backend, "The king", "tiny", 0),
            anext(engine_panels.run_batch(house.backend, "me", STORY, "tiny", 2, 8, False)),
            anext(engine_panels.speculate(house.backend, "me", STORY, "tiny", 4, 8, 0.0)),
        ):
            with pytest.raises(ServerError, match="without --api_url"):
                await panel
        health, words, models = await house.backend.tell()
        assert health.status == "ready" and models == ["tiny"] and house.url in words
        return await engine_panels.send_prompt(house.backend, STORY, None, [])

    assert "tokens found" in visit(scenario, window=False)[1]


def test_panels_tell_that_the_server_is_down():
    down = Backend(Api("http://127.0.0.1:9/v1"))
    with pytest.raises(ServerError, match="no server answers"):
        asyncio.run(panels.show_tokens(down, "Hi", None, False, True))
    health, words, models = asyncio.run(down.tell())
    assert health.status == "down" and "serve.py" in words and models == []


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
