"""
Peers

This file implements the servers that are compared, each in a process of its own, and what they serve, following:
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - systems are compared as their
  clients find them, behind the same interface
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - any weights will do:
  each request gets as many tokens as it asks for

Only benchmark.py and its test use it.

Each component is explained with paper references for educational purposes.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import torch

from common import ROOT
from phase1_foundation.project2_tokenizer.bytes_alphabet import to_printable
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain.hub import to_huggingface
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.token_file import END_OF_TEXT
from phase2_finetuning.project4_sft.template import CHAT_TOKENS
from phase2_finetuning.project4_sft.vocabulary import with_chat_tokens
from phase2_finetuning.project5_lora.lora import LoRALinear, add_lora, remove_lora, save_adapter

NAME = "model"  # by which clients call ours; the peer's is its folder
FIRST_WORD = 256  # below it are the tokens of single bytes
STARTING = 600.0  # seconds that a server may take until it is ready
OURS, THEIRS = "phase10_deployment.project28_serving.serve", "transformers.cli.transformers"


class Served:
    """A server in a process of its own.

    PAPER: "Clipper: A Low-Latency Online Prediction Serving System", arXiv:1612.03079, section 4.4.
    PAPER CONTEXT: models run in containers of their own, and are asked through one narrow interface.
    INTUITION: both cooks get the same kitchen, and only what leaves the hatch is judged.
    IMPLEMENTATION: a command at a free port, its output in a file; it is ready when /health says so. The whole process
        group is ended with it.
    WHY: what a server costs is its process: interpreter, sockets, and the memory that it keeps.

    Args:
        name: for messages; model: by which clients call what it serves; command: without host and port; log: the file
            for its output. Use it as a context.

    Raises RuntimeError with the end of the log if it ends before it is ready.
    """

    def __init__(self, name: str, model: str, command: Sequence[str], log: str | Path):
        self.name, self.model, self.log, self.port = name, model, Path(log), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        with open(self.log, "w", encoding="utf-8") as out:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)], stdout=out, stderr=out, cwd=ROOT,
                env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                start_new_session=True,
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + STARTING
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.name} ended with status {self.process.returncode}: {self.said()}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                self.health()
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name} was not ready after {STARTING:.0f} s: {self.said()}")

    def health(self) -> dict:
        """What it says of itself; raises OSError if it is not ready."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
            return json.load(response)

    def connect(self) -> socket.socket:
        """A connection that is kept: the lightest client there is."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=STARTING)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def said(self) -> str:
        """The end of its output."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-1500:].strip() or "it said nothing"

    def memory(self) -> dict[str, int]:
        """Bytes that are resident: of the process that serves, and of that of its engine, if it has one."""
        import psutil

        server = psutil.Process(self.process.pid)
        children = [child.memory_info().rss for child in server.children(recursive=True)]
        return {"server": server.memory_info().rss, **({"engine": max(children)} if children else {})}

    def close(self) -> None:
        """End it, and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def allow_many_connections() -> None:
    """Let this process and those that it starts have as many open sockets as the system permits."""
    try:
        import resource
    except ImportError:  # no POSIX system
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def our_command(model: str | Path, flags: Sequence[str] = ()) -> list[str]:
    """What starts serve.py with a model."""
    return [sys.executable, "-m", OURS, "--checkpoint", str(model), "--model_name", NAME, "--log_level", "warning",
            *flags]  # fmt: skip


def their_command(model: str | Path, device: str, dtype: str, flags: Sequence[str] = (), start: str = "") -> list[str]:
    """What starts `transformers serve` with a model; start: what to write for `transformers`, if not this Python."""
    begin = shlex.split(start) if start else [sys.executable, "-m", THEIRS]
    return [*begin, "serve", str(model), "--continuous-batching", "--device", device, "--dtype", dtype, *flags]


# -- what is served


def words_tokenizer(vocab_size: int) -> BPETokenizer:
    """A tokenizer to which each word of a few letters, the space before it included, is one token.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 6.
    PAPER CONTEXT: lengths of prompts and answers are what a trace sets; what stands in them plays no part.
    INTUITION: lorem ipsum, in which everybody counts the same number of words.
    IMPLEMENTATION: byte-level BPE without training: " a" ... " z", " aa" ... and so on, until the vocabulary is full.
        No other pairs merge, so words of ids in any order are read as these ids.
    WHY: `transformers serve` takes text alone; so both can be given a prompt of exactly as many tokens.

    >>> tokenizer = words_tokenizer(1024)
    >>> tokenizer.decode([FIRST_WORD, 300, 500]), tokenizer.encode(" a as ik")
    (' a as ik', [256, 300, 500])
    """
    vocab = {to_printable(bytes([i])): i for i in range(FIRST_WORD)}
    n_words = vocab_size - FIRST_WORD - 1 - len(CHAT_TOKENS)
    if n_words < 1:
        raise ValueError(f"vocab_size={vocab_size} leaves no room for words: use at least {vocab_size - n_words + 1}")
    merges: list[tuple[str, str]] = []
    words = [to_printable(b" ")]
    while len(merges) < n_words:
        word = words[len(merges) // len(string.ascii_lowercase)]
        merges.append((word, string.ascii_lowercase[len(merges) % len(string.ascii_lowercase)]))
        words.append("".join(merges[-1]))
        vocab[words[-1]] = FIRST_WORD + len(merges) - 1
    return with_chat_tokens(BPETokenizer(vocab, merges, {END_OF_TEXT: FIRST_WORD + n_words}, rule="merges"))


def words_of(tokenizer: BPETokenizer) -> range:
    """The ids of its words."""
    return range(FIRST_WORD, min(tokenizer.special_tokens.values()))


@torch.no_grad()
def write_model(folder: str | Path, shape: dict, block_size: int, device, seed: int = 0, std: float | None = None):
    """Write a model of this shape, its weights random, as a Hugging Face folder; returns its tokenizer.

    It writes words alone, no halves of characters and no ends, which servers show in ways of their own.
    std: of all weights, so large that attention matters and texts differ, in float32; None: as before training.
    """
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" and std is None else torch.float32
    with torch.device(device):
        model = Transformer(PRESETS["llama-7b"](block_size=block_size, **shape)).to(dtype).eval()
    for parameter in model.parameters() if std else ():
        torch.nn.init.normal_(parameter, std=std)
    tokenizer = words_tokenizer(shape["vocab_size"])
    words = words_of(tokenizer)
    model.head.weight[: words.start] = model.head.weight[words.stop :] = 0  # logits 0: some word has more
    to_huggingface(model, tokenizer, folder)
    return tokenizer


@torch.no_grad()
def write_adapters(model, folder: str | Path, n: int, rank: int) -> list[str]:
    """Write so many random LoRA adapters of all linear layers; returns their folders."""
    add_lora(model, rank, 2.0 * rank)
    folders = []
    for number in range(n):
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                for parameter in layer.parameters():
                    if parameter.requires_grad:
                        torch.nn.init.normal_(parameter, std=0.01)
        folders.append(str(save_adapter(model, Path(folder) / f"adapter{number}")))
    remove_lora(model)
    return folders
