"""Constants of project 28: an engine behind an OpenAI-compatible API."""

import math
import sys

from common import settings as common_settings
from common.device import pick_device

# == Model ==
CHECKPOINT: str | None = None  # a checkpoint, a Hugging Face folder or org/name; none: the bundled or newest model
MODEL_NAME: str | None = None  # by which clients call it; none: the name of its folder
LORA: list[str] = []  # adapters as name=folder, each a model name of its own, mixed in one batch
USE: list[str] = []  # transforms of the catalog, such as fp8_weights
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
DTYPE = "bfloat16" if _GPU else "float32"  # of weights, keys and values

# == Server ==
HOST = "127.0.0.1"  # address to listen at; 0.0.0.0: all of this machine
PORT = 8000  # 0: any free one
API_KEY: list[str] = []  # keys that are let in, also from LLM_ROADMAP_API_KEYS (comma separated); none: everybody
ORIGIN: list[str] = []  # web pages whose scripts may ask, such as http://localhost:3000
LOG_LEVEL = "info"  # of the web server: critical, error, warning, info, debug; never shows a prompt
TRACES = False  # send traces by OpenTelemetry, if its libraries are installed

# == Engine ==
MAX_RUNNING = 256 if _GPU else 64  # texts that are written at a time
CONTEXT: int | None = None  # tokens of a text, prompt and answer; none: as many as the model has positions
KV_CACHE_MEMORY: float | None = None  # MiB for keys and values; none: what is needed, or 85% of what a GPU has free
MAX_BATCH_TOKENS = 2048 if _GPU else 256  # of a step: prompts are read in chunks beside those who write
PAGE = 16  # tokens of a block, a power of two
SHARE = True  # texts that begin alike share the blocks of their beginning
SWAP_MIB = 0.0  # memory of the host for texts that had to leave; 0: they are read anew
GRAPHS = _GPU  # record steps into CUDA graphs
COMPILED = False  # compile steps: minutes at the start, fewer milliseconds afterwards
DRAFT = "ngram"  # who guesses: ngram, ngram:n=2, or a smaller model: a checkpoint, a Hugging Face folder or org/name
DRAFT_TOKENS = 0  # tokens that are guessed and checked in a step; 0: no speculation

# == Limits ==
MAX_WAITING = 256  # texts in the queue; more are refused with 429
MAX_PER_KEY: int | None = None  # requests at a time with one key, or of one address; none: any number
MAX_BODY_KIB = 4096  # of a request
MAX_CHOICES = 16  # texts of a request: n times its prompts
MAX_STOPS = 16  # stop texts of a request
DRAIN_SECONDS = 30.0  # at most, for accepted requests to finish after SIGTERM
SILENT_SECONDS = 300.0  # of an engine that should write: then it is taken to be stuck, ended, and started anew

_LEVELS = ("critical", "error", "warning", "info", "debug")
_RULES = {
    "PORT": (lambda value: 0 <= value < 65536, "lie between 0 (any free one) and 65535"),
    "MAX_RUNNING": (lambda value: value >= 1, "be at least 1"),
    "CONTEXT": (lambda value: value >= 16, "be at least 16"),
    "KV_CACHE_MEMORY": (lambda value: 0 < value < math.inf, "be positive"),
    "PAGE": (lambda value: value >= 1 and not value & (value - 1), "be a power of two"),
    "SWAP_MIB": (lambda value: 0 <= value < math.inf, "be at least 0"),
    "DRAFT_TOKENS": (lambda value: value >= 0, "be at least 0 (no speculation)"),
    "MAX_WAITING": (lambda value: value >= 0, "be at least 0"),
    "MAX_PER_KEY": (lambda value: value >= 1, "be at least 1"),
    "MAX_BODY_KIB": (lambda value: value >= 1, "be at least 1"),
    "MAX_CHOICES": (lambda value: value >= 1, "be at least 1"),
    "MAX_STOPS": (lambda value: value >= 0, "be at least 0"),
    "SILENT_SECONDS": (lambda value: 0 < value < math.inf, "be positive"),
    "DRAIN_SECONDS": (lambda value: 0 <= value < math.inf, "be at least 0"),
}


def validate_config(settings=None):
    """Refuse what cannot work; raises ValueError with the remedy."""
    s = settings or sys.modules[__name__]
    for name, known in {"DTYPE": ("float32", "bfloat16", "float16"), "LOG_LEVEL": _LEVELS}.items():
        if getattr(s, name) not in known:
            raise ValueError(f"{name}={getattr(s, name)} is unknown: use one of {', '.join(known)}")
    for name, (holds, words) in _RULES.items():
        value = getattr(s, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name}={value} must {words}: the default is {getattr(sys.modules[__name__], name)}")
    if s.MAX_BATCH_TOKENS < s.MAX_RUNNING:
        raise ValueError(f"MAX_BATCH_TOKENS={s.MAX_BATCH_TOKENS} must be at least MAX_RUNNING={s.MAX_RUNNING}: each "
                         f"text that is written takes one a step")  # fmt: skip
    for pair in s.LORA:
        if not all(pair.partition("=")):
            raise ValueError(f"LORA={pair} must be name=folder, such as polite=checkpoints/project5/adapter")
    if len(adapters_of(s)) < len(s.LORA) or s.MODEL_NAME in adapters_of(s):
        raise ValueError(
            f"LORA={s.LORA} must give each adapter a name of its own, other than MODEL_NAME={s.MODEL_NAME}"
        )


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])


def adapters_of(s) -> dict[str, str]:
    """name -> folder."""
    return dict(pair.split("=", 1) for pair in s.LORA)
