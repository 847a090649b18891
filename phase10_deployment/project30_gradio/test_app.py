"""The whole page at a real socket: beside its API, in front of another one, and its command line."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from types import SimpleNamespace

import httpx
import pytest

from common import ROOT
from common.checkpoint import save
from common.settings import load
from phase1_foundation.project3_pretrain import loading
from phase10_deployment.project28_serving.engine import EngineOptions
from phase10_deployment.project30_gradio import app, config
from phase10_deployment.project30_gradio.chat_tab import sampling_controls
from phase10_deployment.project30_gradio.wishes import Wishes


@pytest.fixture(scope="module")
def page(open_page):
    """A page that the tests of this file share."""
    with open_page(slow=True) as page:
        yield page


def handler(page, name):
    """A function behind the page, by its qualified name."""
    return next(each.fn for each in page.fns.values() if each.fn and each.fn.__qualname__.endswith(name))


# -- one address


def test_the_page_and_the_api_share_an_address(page):
    home = httpx.get(page.url + "/")
    assert home.status_code == 200 and '"title":"LLM roadmap"' in home.text
    assert httpx.get(page.url + "/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(page.url + "/health").json()["status"] == "ready"
    assert "vllm:" in httpx.get(page.url + "/metrics").text


def test_the_page_needs_no_key_and_the_api_beside_it_does(open_page):
    with open_page(keys=["secret"]) as page:
        assert httpx.get(page.url + "/").status_code == 200
        assert httpx.get(page.url + "/v1/models").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(page.url + "/v1/models", headers=headers).status_code == 200


def test_nothing_of_the_page_comes_from_elsewhere(page):
    home = httpx.get(page.url + "/").text
    theme = httpx.get(page.url + "/theme.css").text
    for text in (home, theme):
        assert "googleapis" not in text and "cdn" not in text.lower().replace("cdnt", "")
    assert httpx.get(page.url + "/config").json()["analytics_enabled"] is False


def test_the_functions_behind_the_buttons_are_no_public_api(page):
    assert httpx.get(page.url + "/gradio_api/info").json()["named_endpoints"] == {}


# -- the conversation, as the page's own functions have it


def converse(page, scenario):
    """Run `await scenario(write, say, stop, request)` with the page's functions."""
    names = ("connect_writing.<locals>.write", "connect_writing.<locals>.say", "connect_writing.<locals>.stop")
    return asyncio.run(scenario(*(handler(page.page, name) for name in names), SimpleNamespace(session_hash="me")))


def controls(**wishes):
    """The values of all controls, with the system prompt in front."""
    return ["", *Wishes(**{"max_tokens": 200, "temperature": 1.0} | wishes)]


def test_a_message_is_said_answered_and_kept(page):
    async def scenario(write, say, stop, request):
        talk, _, box = say(request, "  Hello ", [])
        assert box == "" and talk == [{"role": "user", "content": "Hello"}]
        assert say(request, "  ", talk)[0] is not talk  # nothing to say: nothing changes
        turns = [
            each async for each in write(request, talk, "number", [], "tiny", *controls(max_tokens=12, temperature=0.0))
        ]
        return turns

    turns = converse(page, scenario)
    talk, _, told, box, saved, _ = turns[-1]
    assert [message["role"] for message in talk] == ["user", "assistant"] and "12</b> tokens" in told
    assert saved == [{"id": "number", "messages": talk}] and box.submit_btn == "Send"
    assert turns[0][3].stop_btn == "Stop"


def test_stop_ends_the_answer_frees_its_place_and_keeps_what_was_written(page, eventually):
    async def scenario(write, say, stop, request):
        talk, _, _ = say(request, "Hello", [])
        turns = []
        async for each in write(request, talk, "number", [], "tiny", *controls()):
            turns.append(each)
            if len(turns) == 4:
                assert say(request, "And?", talk)[2] != ""  # not while it writes
                stop(request)
        return turns

    talk, _, told, _, saved, _ = converse(page, scenario)[-1]
    assert "stopped" in told and talk[-1]["role"] == "assistant" and saved[0]["messages"] == talk
    eventually(lambda: page.client.gauges.running == 0 and page.client.n_open == 0)
    assert page.client.gauges.usage == 0.0


def test_the_controls_are_the_fields_of_wishes_in_order():
    import gradio as gr

    with gr.Blocks():
        components = sampling_controls(config)
    names = [component.label.lower().replace("-", "_").replace(" ", "_") for component in components]
    renamed = {"stop_texts": "stop", "answer_in_json": "json"}
    assert [renamed.get(name, name) for name in names] == ["system_prompt", *Wishes._fields]


# -- the command line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--api_url", "localhost:8000"], "API_URL=localhost:8000 must begin with http"),
        (["--temperature", "-1"], "TEMPERATURE=-1.0 must lie between"),
        (["--lora", "x"], "LORA=x must be name=folder"),
    ],
)
def test_flags_that_cannot_work_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as left:
        app.main(flags)
    assert left.value.code == 2 and words in capsys.readouterr().err


def test_without_any_model_it_says_how_to_make_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loading, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(loading, "MODELS", tmp_path)
    with pytest.raises(SystemExit) as left:
        app.main([])
    assert left.value.code == 2 and "train one with" in capsys.readouterr().err


def test_the_engine_is_made_as_the_flags_say(tmp_path):
    flags = ["--checkpoint", "a.pt", "--kv_cache_memory", "2", "--swap_mib", "1", "--lora", "x=there", "--page", "8",
             "--draft_tokens", "3", "--device", "cpu"]  # fmt: skip
    options = app.engine_options(load(config, flags))
    assert options.checkpoint == "a.pt" and options.kv_cache_memory == 2 * 2**20 and options.swap_bytes == 2**20
    assert options.adapters == {"x": "there"} and (options.page, options.draft_tokens) == (8, 3)
    assert options.max_running == config.MAX_RUNNING and len(fields(EngineOptions)) >= 16


def test_a_page_before_a_server_that_is_down_opens_all_the_same():
    page = app.build_app("http://127.0.0.1:9/v1")
    look = handler(page, "build_status.<locals>.look")
    line, _, known = asyncio.run(look((None, None), None))
    assert "pg-bad" in line and "no server answers" in line
    again, _, _ = asyncio.run(look(known, None))
    assert again != line  # what has not changed is not sent again
    show = handler(page, "tokens_panel.<locals>.show")
    assert "pg-bad" in asyncio.run(show("Hi", None, False, True))


@pytest.mark.slow
def test_one_command_serves_a_chat_and_ends_when_asked(tmp_path, model, tokenizer, eventually):
    path, port = tmp_path / "tiny.pt", app.free_port("127.0.0.1")
    save(path, {
        "iter": 1, "model_state_dict": model.state_dict(), "optimizer_state_dict": {},
        "train_loss": 0.0, "val_loss": 0.0,
        "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "tokenizer": tokenizer.to_dict(),
    })  # fmt: skip
    command = [
        sys.executable,
        "phase10_deployment/project30_gradio/app.py",
        "--checkpoint",
        str(path),
        "--port",
        str(port),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            try:
                if httpx.get(url + "/health").json()["status"] == "ready":
                    break
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        assert "LLM roadmap" in httpx.get(url + "/").text
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        assert httpx.post(url + "/v1/chat/completions", json=body, timeout=30).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, process.stdout.read()
    finally:
        process.kill()


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
