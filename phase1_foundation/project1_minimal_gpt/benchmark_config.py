"""Constants of project 1's benchmark: those of project 1, and how to measure."""

import os
import sys

from common import settings as common_settings
from phase1_foundation.project1_minimal_gpt import config as _config

BASE_CONFIG = _config

# == Benchmark ==
REPEATS = 20  # timed training steps of ours and of the peer, in turn
COMPARE = True  # also train with nanoGPT's settings
OUT_DIR = os.path.join(_config.OUT_DIR, "benchmark")  # where the runs write; a folder for each
MAX_STEPS: int | None = None  # shorten both trainings, to try the benchmark out; none: as the config says


def validate_config(settings=None):
    """Refuse combinations that cannot work; raises ValueError with the remedy."""
    s = settings or sys.modules[__name__]
    _config.validate_config(settings)
    for name in ("REPEATS", "MAX_STEPS"):
        if getattr(s, name) is not None and getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
