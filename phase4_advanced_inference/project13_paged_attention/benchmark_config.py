"""Constants of project 13's benchmark."""

import sys

from common import settings as common_settings
from common.device import pick_device

_PARTS = ("checks", "kernels", "throughput", "pressure", "sharing", "first_token", "load")

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 0  # of weights, lengths and tokens
PARTS: list[str] = [*_PARTS]  # what to measure; of the rest, what stands in results/ is kept
REPEATS = 3  # timed rounds, all rivals in turn
PEER = True  # also measure transformers' continuous batching, which takes most of the time

# == Engine ==
MODEL = "1.1B" if _GPU else "small"  # whose shape is measured, its weights random
PAGE = 16 if _GPU else 4  # tokens of a block: texts on a CPU are short here
N_ROWS = 256 if _GPU else 16  # texts at a time
MAX_TOKENS = 8192 if _GPU else 256  # of a step
COMPILED = _GPU  # also measure compiled steps: less time a step, minutes until the first one

# == Trace ==
N_REQUESTS = 256 if _GPU else 48  # all there at once
SHORTEST = 32 if _GPU else 8  # tokens of a prompt at least
LONGEST = 512 if _GPU else 128  # tokens of a prompt at most
NEW_TOKENS = 256 if _GPU else 48  # of each continuation

# == First token ==
LONG_PROMPT = 8064 if _GPU else 960  # tokens of a prompt whose beginning is known
CHUNK = 2048 if _GPU else 960  # tokens of a step, while it is read
HIT_RATES: list[float] = [0.25, 0.5, 0.75, 0.875]  # parts of it that are

_POSITIVE = ("LONG_PROMPT", "CHUNK", "REPEATS", "PAGE", "N_ROWS", "N_REQUESTS", "SHORTEST", "NEW_TOKENS")


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    s = settings or sys.modules[__name__]
    if not s.PARTS or any(part not in _PARTS for part in s.PARTS):
        raise ValueError(f"PARTS={s.PARTS} must name some of {', '.join(_PARTS)}, and nothing else")
    if s.MODEL not in ("small", "1.1B"):
        raise ValueError(f"MODEL={s.MODEL} is unknown: use small or 1.1B")
    for name in _POSITIVE:
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if not s.HIT_RATES or not all(0 < rate < 1 for rate in s.HIT_RATES):
        raise ValueError(f"HIT_RATES={s.HIT_RATES} must lie between 0 and 1")
    if s.LONGEST < s.SHORTEST or s.MAX_TOKENS < s.N_ROWS:
        raise ValueError(f"LONGEST={s.LONGEST} must be at least SHORTEST={s.SHORTEST}, and MAX_TOKENS={s.MAX_TOKENS} "
                         f"at least N_ROWS={s.N_ROWS}")  # fmt: skip


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
