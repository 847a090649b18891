"""Constants of project 4's benchmark."""

import os
import sys

from common import DATA
from common import settings as common_settings
from common.device import pick_device

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
SEED = 0  # of weights and of the order
CORPUS = str(DATA / "sft_sample.jsonl.xz")  # conversations to pack
PRESET = "gpt2" if DEVICE == "cuda" else "cpu-small"  # the model whose steps are timed
BLOCK_SIZE = 1024 if DEVICE == "cuda" else 256  # tokens of a row
ROWS = 16  # of a step
STEPS = 8  # steps of one timed round
REPEATS = 5  # timed rounds, ours and the peer's in turn


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    s = settings or sys.modules[__name__]
    for name in ("BLOCK_SIZE", "ROWS", "STEPS", "REPEATS"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if not os.path.isfile(s.CORPUS):
        raise ValueError(f"CORPUS={s.CORPUS} is no file: give conversations as JSON Lines")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
