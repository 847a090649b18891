"""Constants of project 3's benchmark."""

import sys

from common import settings as common_settings
from common.device import pick_device

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
SEED = 0  # of weights and tokens
PARTS: list[str] = ["speed", "checks", "recipes"]  # what to measure; of the rest, what stands in results/ is kept
MICRO_BATCH = 60  # sequences of 1024 tokens in one forward (GPU)
MICROS = 8  # micro batches of one optimizer step (GPU): 491,520 tokens with 60 sequences
REPEATS = 5  # timed optimizer steps
NANOGPT: str | None = None  # a checkout of karpathy/nanoGPT, to be measured in turn
QUALITY_STEPS = 0  # steps of the training runs that are compared; 0 leaves them out
QUALITY_FLAGS = ""  # further flags of all of them, in one string: --quality_flags="--data_dir ..."


def validate_config(settings=None):
    """Refuse combinations that cannot work."""
    s = settings or sys.modules[__name__]
    unknown = [part for part in s.PARTS if part not in ("speed", "checks", "recipes")]
    if unknown or not s.PARTS:
        raise ValueError(f"PARTS={s.PARTS} must name at least one of speed, checks, recipes, and nothing else")
    for name in ("MICRO_BATCH", "MICROS", "REPEATS"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
