"""Constants of project 10's benchmark."""

import sys

from common import settings as common_settings
from common.device import pick_device

_PARTS = ("checks", "first_token", "costs", "responses")

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 0  # of weights and tokens
PARTS: list[str] = [*_PARTS]  # what to measure; of the rest, what stands in results/ is kept
MODEL = "1.1B" if _GPU else "small"  # whose time to the first token is measured
PROMPT_TOKENS = 8064 if _GPU else 960  # of a prompt
CHUNK = 2048 if _GPU else 512  # tokens of a prefill step at most
CACHE = "paged" if _GPU else "contiguous"  # a name in the catalog's group caches
HIT_RATES: list[float] = [0.25, 0.5, 0.75, 0.875]  # parts of the prompt that are known
REPEATS = 5  # timed rounds, all rivals in turn


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    from common.catalog import GROUPS

    s = settings or sys.modules[__name__]
    if not s.PARTS or any(part not in _PARTS for part in s.PARTS):
        raise ValueError(f"PARTS={s.PARTS} must name some of {', '.join(_PARTS)}, and nothing else")
    if s.MODEL not in ("small", "1.1B"):
        raise ValueError(f"MODEL={s.MODEL} is unknown: use small or 1.1B")
    if s.CACHE not in GROUPS["caches"] or s.CACHE == "sliding":
        raise ValueError(f"CACHE={s.CACHE} must be one that keeps the beginnings of texts: contiguous, flash or paged")
    for name, least in (("PROMPT_TOKENS", 16), ("CHUNK", 1), ("REPEATS", 1)):
        if getattr(s, name) < least:
            raise ValueError(f"{name}={getattr(s, name)} must be at least {least}")
    if not s.HIT_RATES or not all(0 < rate < 1 for rate in s.HIT_RATES):
        raise ValueError(f"HIT_RATES={s.HIT_RATES} must lie between 0 and 1")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
