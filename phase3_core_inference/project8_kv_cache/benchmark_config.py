"""Constants of project 8's benchmark."""

import sys

from common import settings as common_settings
from common.device import pick_device

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 0  # of weights and tokens
PARTS: list[str] = ["checks", "length", "kernels", "generate", "memory"]  # what to measure; the rest stays as it is
LENGTHS: list[int] = [64, 256, 1024, 4096, 8000] if _GPU else [32, 64, 128, 256, 480]  # tokens before those timed
LENGTH_TOKENS = 32 if _GPU else 8  # tokens timed behind each length
KERNEL_LENGTHS: list[int] = [128, 960, 8000] if _GPU else [128, 960]  # tokens before a step timed by kernel
MODELS: list[str] = ["124M", "1.1B"] if _GPU else ["small"]  # shapes that are measured
BATCHES: list[int] = [1, 64] if _GPU else [1, 8]  # prompts at a time
PROMPT_TOKENS = 128 if _GPU else 64  # of each prompt that is continued
NEW_TOKENS = 127 if _GPU else 32  # tokens that each continuation gets
STATIC: list[str] = ["124M"] if _GPU else ["small"]  # models whose peer also gets its compiled static cache, batch 1
COMPILED: list[str] = ["124M"] if _GPU else []  # models that are also compiled, batch 1
REPEATS = 3  # timed runs, all rivals in turn


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    s = settings or sys.modules[__name__]
    shapes = ("small", "124M", "1.1B")
    known = {
        "PARTS": ("checks", "length", "kernels", "generate", "memory"),
        "MODELS": shapes,
        "STATIC": shapes,
        "COMPILED": shapes,
    }
    for name, choices in known.items():
        unknown = [value for value in getattr(s, name) if value not in choices]
        if unknown or (not getattr(s, name) and name in ("PARTS", "MODELS")):
            raise ValueError(f"{name}={getattr(s, name)} must name some of {', '.join(choices)}, and nothing else")
    for name in ("LENGTH_TOKENS", "PROMPT_TOKENS", "NEW_TOKENS", "REPEATS"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    for name in ("LENGTHS", "KERNEL_LENGTHS", "BATCHES"):
        if not getattr(s, name) or min(getattr(s, name)) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be some numbers of at least 1")
    longest = s.PROMPT_TOKENS + s.NEW_TOKENS
    if longest > 1024:
        raise ValueError(f"PROMPT_TOKENS={s.PROMPT_TOKENS} and NEW_TOKENS={s.NEW_TOKENS} exceed the block_size of 1024")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
