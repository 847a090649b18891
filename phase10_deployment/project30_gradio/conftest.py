"""What the tests of this project share: a tiny model, its engine, and servers and pages at real sockets."""

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import uvicorn
from fastapi import FastAPI

from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens
from phase10_deployment.project28_serving.client import EngineClient
from phase10_deployment.project28_serving.engine import Engine
from phase10_deployment.project28_serving.gate import GateOptions
from phase10_deployment.project28_serving.server import ServerOptions, create_app
from phase10_deployment.project30_gradio.app import beside, build_app, free_port, mounted
from phase10_deployment.project30_gradio.backend import Backend
from phase10_deployment.project30_gradio.talking import Api

LONG = 256


def make_model(vocab_size):
    """A model whose attention matters: larger weights than at the beginning of training."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "block_size": LONG, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_kv_head": 2}
    model = Transformer(PRESETS["llama-7b"](**sizes, n_ff=48)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


class SlowEngine(Engine):
    """An engine that one can watch."""

    def step(self):
        """As of `Engine`, after a moment."""
        time.sleep(0.02)
        return super().step()


@pytest.fixture(scope="session")
def tokenizer():
    """A token for every byte, and those of chats."""
    return with_chat_tokens(byte_tokenizer())


@pytest.fixture(scope="session")
def model(tokenizer):
    """The model that is served."""
    return make_model(tokenizer.vocab_size)


@pytest.fixture(scope="session")
def build(tokenizer):
    """Makes an engine; options as of `Engine`."""

    def make(slow=False, **options) -> Engine:
        kind = SlowEngine if slow else Engine
        engine = kind(make_model(tokenizer.vocab_size), tokenizer, ChatTemplate(tokenizer),
                      **({"n_rows": 8, "max_tokens": 64, "page": 16} | options))  # fmt: skip
        engine.source = "tiny.pt"
        return engine

    return make


@contextlib.asynccontextmanager
async def open_house(build, keys=(), key=None, window=True):
    """A server of this event loop at a free port, and the backend of a page before it."""
    client = EngineClient(build, process=False)
    app = create_app(client, ServerOptions("tiny", gate=GateOptions(tuple(keys))))
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    await client.ready()
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield SimpleNamespace(url=url, client=client,
                              backend=Backend(Api(f"{url}/v1", key), client if window else None))  # fmt: skip
    finally:
        server.should_exit = True
        await task


@pytest.fixture(scope="session")
def visit(build):
    """`visit(scenario, **of open_house, engine={})`: run `await scenario(house)` beside a server."""

    def run(scenario, engine=None, **options):
        async def main():
            async with open_house(lambda: build(**engine or {}), **options) as house:
                return await asyncio.wait_for(scenario(house), 60)

        return asyncio.run(main())

    return run


@contextlib.contextmanager
def serving(app, port):
    """A web server in a thread."""
    config = uvicorn.Config(app, "127.0.0.1", port, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def running(build, keys=()):
    """The whole of a page and the API beside it, in a thread."""
    port, client = free_port("127.0.0.1"), EngineClient(build, process=False)
    api = create_app(client, ServerOptions("tiny", gate=GateOptions(tuple(keys))))
    page = build_app(f"http://127.0.0.1:{port}/v1", keys[0] if keys else None, client)
    with serving(beside(api, page), port) as url:
        wait_for(lambda: client.state == "ready")
        yield SimpleNamespace(url=url, client=client, page=page)


@pytest.fixture(scope="module")
def lonely_page():
    """The address of a page whose server is down."""
    with serving(mounted(FastAPI(), build_app("http://127.0.0.1:9/v1")), free_port("127.0.0.1")) as url:
        yield url


@pytest.fixture(scope="session")
def open_page(build):
    """`with open_page(keys=(), **of the engine) as page:` a whole page with the API beside it."""

    def start(keys=(), **engine_options):
        return running(lambda: build(**engine_options), keys)

    return start


def wait_for(holds, seconds=30.0):
    """Wait until something holds; fail if it never does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def eventually():
    """`eventually(lambda: ...)`: wait until it holds."""
    return wait_for


@pytest.fixture(scope="session")
def adapters(tmp_path_factory, tokenizer):
    """name -> folder of a trained adapter."""
    from phase2_finetuning.project5_lora.lora import add_lora, save_adapter

    model = add_lora(make_model(tokenizer.vocab_size), rank=4, alpha=8.0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("polite")
    save_adapter(model, folder)
    return {"polite": str(folder)}
