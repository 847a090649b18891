"""Constants of project 12's benchmark."""

import math
import sys

from common import settings as common_settings
from common.device import pick_device

_PARTS = ("checks", "timeline", "selective", "rates", "stalls", "offline", "peers")

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 0  # of weights and traces
PARTS: list[str] = [*_PARTS]  # what to measure; of the rest, what stands in results/ is kept
MODEL = "1.1B" if _GPU else "small"  # whose shape is measured, its weights random
CACHE = "paged" if _GPU else "contiguous"  # a name in the catalog's group caches
REPEATS = 3  # timed rounds where all requests come at once, all rivals in turn

# == Batch ==
N_ROWS = 64 if _GPU else 16  # requests at a time
MAX_TOKENS = 512 if _GPU else 64  # of a step with chunks

# == Trace ==
N_REQUESTS = 192 if _GPU else 64  # of each replay
PROMPT_TOKENS = 256.0 if _GPU else 48.0  # median length of a prompt
NEW_TOKENS = 96.0 if _GPU else 32.0  # median length of a continuation
SPREAD = 0.8  # of both, of the logarithm
LONGEST_PROMPT = 1024 if _GPU else 256  # where prompts are cut off
LONGEST_NEW = 512 if _GPU else 192  # where continuations are cut off
STALL_PROMPT_TOKENS = 768.0 if _GPU else 192.0  # median where the stalls of prompts are measured
RATES: list[float] = [0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7]  # of the requests/s served when all come at once
STALL_RATE = 0.6  # likewise, where stalls are measured
BOUND = 3.0  # times the latency of requests that come alone: what counts as equal latency


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    from common.catalog import GROUPS

    s = settings or sys.modules[__name__]
    if not s.PARTS or any(part not in _PARTS for part in s.PARTS):
        raise ValueError(f"PARTS={s.PARTS} must name some of {', '.join(_PARTS)}, and nothing else")
    for name, known in {"MODEL": ("small", "1.1B"), "CACHE": GROUPS["caches"]}.items():
        if getattr(s, name) not in known:
            raise ValueError(f"{name}={getattr(s, name)} is unknown: use one of {', '.join(known)}")
    for name in ("REPEATS", "N_ROWS", "N_REQUESTS", "PROMPT_TOKENS", "NEW_TOKENS", "LONGEST_PROMPT", "LONGEST_NEW",
                 "STALL_PROMPT_TOKENS"):  # fmt: skip
        if not 1 <= getattr(s, name) < math.inf:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if s.MAX_TOKENS < s.N_ROWS:
        raise ValueError(f"MAX_TOKENS={s.MAX_TOKENS} must be at least N_ROWS={s.N_ROWS}: each row decodes one a step")
    if not 0 <= s.SPREAD < math.inf:
        raise ValueError(f"SPREAD={s.SPREAD} must be at least 0 (all lengths equal)")
    for name, values in (("RATES", s.RATES), ("STALL_RATE", [s.STALL_RATE]), ("BOUND", [s.BOUND])):
        if not values or not all(0 < value < math.inf for value in values):
            raise ValueError(f"{name}={getattr(s, name)} must be positive")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
