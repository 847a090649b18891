"""Constants of project 9's benchmark."""

import sys

from common import settings as common_settings
from common.device import pick_device

_PARTS = ("attention", "decode", "cache", "memory", "step", "together")

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
SEED = 0  # of queries, keys, values and weights
PARTS: list[str] = [*_PARTS]  # what to measure; of the rest, what stands in results/ is kept
REPEATS = 7  # timed rounds, all rivals in turn
HEAD_SIZES: list[int] = [128, 64]  # of the attention that is timed: 2048 channels in all
LENGTHS: list[int] = [1024, 2048, 4096, 8192, 16384]  # tokens of a row
TOKENS = 16384  # of all rows together
MASKED_LENGTH = 8192  # tokens of a row with a window or with documents
CONTEXT = 32768  # keys of the row that is decoded
MEMORY_LENGTHS: list[int] = [1024, 2048] if DEVICE == "cpu" else [1024, 4096, 8192]  # rows whose memory is counted
STEP_LENGTHS: list[int] = [1024, 4096]  # context of the training steps
STEP_HEADS: list[int] = [12, 6]  # heads of the 124M model: of 64 and of 128 channels
STEP_TOKENS = 32768  # of one training step


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    s = settings or sys.modules[__name__]
    unknown = [part for part in s.PARTS if part not in _PARTS]
    if unknown or not s.PARTS:
        raise ValueError(f"PARTS={s.PARTS} must name at least one of {', '.join(_PARTS)}, and nothing else")
    for name in ("REPEATS", "TOKENS", "MASKED_LENGTH", "CONTEXT", "STEP_TOKENS"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1: see the default")
    for name, total in (("LENGTHS", "TOKENS"), ("STEP_LENGTHS", "STEP_TOKENS")):
        if any(length < 1 or getattr(s, total) % length for length in getattr(s, name)):
            raise ValueError(f"{name}={getattr(s, name)} must divide {total}={getattr(s, total)}: use powers of two")
    if any(size not in (64, 128) for size in s.HEAD_SIZES):
        raise ValueError(f"HEAD_SIZES={s.HEAD_SIZES} must be 64 or 128: these the peers know, too")
    if any(heads < 1 or 768 % heads for heads in s.STEP_HEADS):
        raise ValueError(f"STEP_HEADS={s.STEP_HEADS} must divide 768: use 12 or 6")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
