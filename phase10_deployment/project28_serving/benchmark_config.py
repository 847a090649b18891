"""Constants of project 28's benchmark."""

import sys

from common import settings as common_settings
from common.device import pick_device

_PARTS = ("checks", "first_token", "throughput", "streams", "concurrency", "arrivals", "forms", "leaving", "adapters")
_QUICK = {
    "MODEL": "tiny", "N_ROWS": 8, "MAX_TOKENS": 64, "N_REQUESTS": 8, "SHORTEST": 4, "LONGEST": 16, "NEW_TOKENS": 12,
    "REPEATS": 1, "FIRST_N": 5, "LONG_PROMPT": 64, "N_STREAMS": 8, "ROUNDS": 3, "CONCURRENT": [1, 4],
    "LEAVING_N": 3, "PROCESSES": 1, "KV_MIB": 32, "SECONDS": 1.0,
}  # fmt: skip

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 0  # of weights, lengths and tokens
PARTS: list[str] = [*_PARTS]  # what to measure; of the rest, what stands in results/ is kept
REPEATS = 3  # timed rounds, all rivals in turn
QUICK = False  # a tiny model and a few short requests, to see whether everything runs: what comes out is no figure
FOLDER: str | None = None  # where results go; none: results/, with --quick a temporary folder
PEER = True  # also measure `transformers serve`
PEER_START = ""  # what starts `transformers`; empty: this Python; or "uv run --with transformers[serving] transformers"
PROCESSES = 4 if _GPU else 1  # of clients

# == Engine ==
MODEL = "1.1B" if _GPU else "small"  # whose shape is measured, its weights random
PAGE = 16  # tokens of a block
N_ROWS = 256 if _GPU else 64  # texts at a time
MAX_TOKENS = 8192 if _GPU else 256  # of a step
KV_MIB = 12288 if _GPU else 512  # for keys and values, of each engine
KV_PART = 0.3  # of a GPU's memory, which `transformers serve` may take for its own
COMPILED = False  # compile steps: minutes until the first one, of the engine and of each server

# == Trace ==
N_REQUESTS = 256 if _GPU else 48  # of a round
SHORTEST = 32 if _GPU else 8  # tokens of a prompt at least
LONGEST = 512 if _GPU else 128  # tokens of a prompt at most
NEW_TOKENS = 256 if _GPU else 48  # of each answer
SECONDS = 5.0 if _GPU else 20.0  # of arrivals, in each round
LOADS: list[float] = [0.5, 0.8]  # rates of arrival, as parts of the rate that we can serve
CONCURRENT: list[int] = [1, 4, 16, 64, 256] if _GPU else [1, 4, 16, 64]  # streams at a time, for the picture

# == Latency ==
FIRST_N = 200 if _GPU else 100  # first tokens of each kind, the engine's and the server's in turn
LONG_PROMPT = 1024  # tokens of the longer prompt
LEAVING_N = 50  # clients who leave
N_STREAMS = 64  # at a time, round after round
ROUNDS = 10  # of them
RANK = 16  # of adapters
N_ADAPTERS = 4  # mixed in one batch

_POSITIVE = ("REPEATS", "PROCESSES", "N_ROWS", "KV_MIB", "N_REQUESTS", "SHORTEST", "NEW_TOKENS", "FIRST_N",
             "LONG_PROMPT", "LEAVING_N", "N_STREAMS", "RANK", "N_ADAPTERS")  # fmt: skip


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    s = settings or sys.modules[__name__]
    if not s.PARTS or any(part not in _PARTS for part in s.PARTS):
        raise ValueError(f"PARTS={s.PARTS} must name some of {', '.join(_PARTS)}, and nothing else")
    if s.MODEL not in ("tiny", "small", "1.1B"):
        raise ValueError(f"MODEL={s.MODEL} is unknown: use tiny, small or 1.1B")
    for name in _POSITIVE:
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if not s.SECONDS > 0:
        raise ValueError(f"SECONDS={s.SECONDS} must be positive")
    if s.ROUNDS < 3:
        raise ValueError(f"ROUNDS={s.ROUNDS} must be at least 3: memory is compared with that after the second")
    if not s.LOADS or not all(0 < load <= 2 for load in s.LOADS):
        raise ValueError(f"LOADS={s.LOADS} must be parts of the full rate, above 0 and at most 2")
    if not s.CONCURRENT or min(s.CONCURRENT) < 1:
        raise ValueError(f"CONCURRENT={s.CONCURRENT} must be numbers of at least 1")
    if s.LONGEST < s.SHORTEST or s.MAX_TOKENS < s.N_ROWS:
        raise ValueError(f"LONGEST={s.LONGEST} must be at least SHORTEST={s.SHORTEST}, and MAX_TOKENS={s.MAX_TOKENS} "
                         f"at least N_ROWS={s.N_ROWS}")  # fmt: skip


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])


def quick(s):
    """The same settings with small sizes, but for those that a flag has set."""
    for name in _QUICK.keys() - s.overrides:
        setattr(s, name, _QUICK[name])
    return s
