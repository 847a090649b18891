"""What the tests of this project share: a tiny model, its engine, and servers at real sockets."""

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import uvicorn
from openai import OpenAI

from phase1_foundation.project3_pretrain.hub_tokenizer import ForeignTokenizer
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer, with_chat_tokens
from phase10_deployment.project28_serving.client import EngineClient
from phase10_deployment.project28_serving.engine import Engine
from phase10_deployment.project28_serving.server import ServerOptions, create_app

LONG = 1024


def make_model(vocab_size):
    """A model whose attention matters: larger weights than at the beginning of training."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "block_size": LONG, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_kv_head": 2}
    model = Transformer(PRESETS["llama-7b"](**sizes, n_ff=48)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


def sentencepiece_like(decoder=None):
    """A tokenizer.json as those of Llama: blanks as a sign of their own, bytes for what has no token."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers

    words = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *map(chr, range(33, 127)), "\u2581", "\u2581n",
             "na", "me", "name"]  # fmt: skip
    merges = [("\u2581", "n"), ("n", "a"), ("m", "e"), ("na", "me")]
    model = models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoder or decoders.Sequence(steps)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens(["<tool_call>"])
    return ForeignTokenizer(tokenizer.to_str())


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

    def make(kind=Engine, **options) -> Engine:
        engine = kind(make_model(tokenizer.vocab_size), tokenizer, ChatTemplate(tokenizer),
                      **({"n_rows": 8, "max_tokens": 64} | options))  # fmt: skip
        engine.source = "tiny.pt"
        return engine

    return make


class SlowEngine(Engine):
    """An engine whose steps take so long that a test can act between two of them, and can be counted."""

    n_steps = 0

    def advance(self):
        """As of `Engine`, after a moment."""
        type(self).n_steps += 1
        time.sleep(0.01)
        return super().advance()


@contextlib.contextmanager
def running(client: EngineClient, options: ServerOptions):
    """A server at a free port, in a thread."""
    app = create_app(client, options)
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started and client.state not in ("loading", "restarting"))
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        key = (options.gate.api_keys or ("none",))[0]
        yield SimpleNamespace(url=url, client=client, app=app, server=app.state.server,
                              openai=OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60))  # fmt: skip
    finally:
        server.should_exit = True
        thread.join(20)


def wait_for(holds, seconds=30.0):
    """Wait until something holds; fail if it never does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def serve(build):
    """`with serve(**of the engine, options=ServerOptions(...)) as running:` a server with an engine in a thread."""

    def start(options=None, process=False, **engine_options):
        client = EngineClient(lambda: build(**engine_options), process)
        return running(client, options or ServerOptions("tiny"))

    return start


@pytest.fixture(scope="session")
def eventually():
    """`eventually(lambda: ...)`: wait until it holds."""
    return wait_for


@pytest.fixture(scope="module")
def tiny(serve):
    """A server that the tests of a file share."""
    with serve() as server:
        yield server
