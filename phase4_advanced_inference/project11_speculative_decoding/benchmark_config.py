"""Constants of project 11's benchmark."""

import math
import os
import sys

from common import settings as common_settings
from common.device import pick_device

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 0  # of initial weights, places of prompts, and sampling
PARTS: list[str] = ["checks", "acceptance", "speed", "peers"]  # what to measure; the rest stays as it is

# == Pair ==
PAIR_DIR = os.path.join(_ROOT, "checkpoints", "project11")  # target/best.pt and draft/best.pt: trained if not there
TRAIN_DATA_PATH = os.path.join(_ROOT, "data", "sample_corpus.jsonl.xz")  # what both are trained on
TRAIN_STEPS = 600 if _GPU else 300  # of both
TRAIN_FLAGS = "--batch_tokens 65536" if _GPU else ""  # further flags of train_pretrain.py

# == Prompts ==
N_PROMPTS = 16  # prompts of each set
PROMPT_TOKENS = 128 if _GPU else 96  # of each
NEW_TOKENS = 128 if _GPU else 64  # of each continuation
KS: list[int] = [1, 2, 4, 8]  # lengths of drafts
K = 4  # length where only one is measured
TEMPERATURES: list[float] = [0.0, 0.7, 1.0]  # of sampling
SPEED_KS: list[int] = [1, 2, 4]  # lengths of drafts that are timed
BATCHES: list[int] = [1, 8]  # prompts at a time that are timed
CACHE = "paged" if _GPU else "contiguous"  # of target and draft: which reads k + 1 tokens in the time of one
REPEATS = 5 if _GPU else 3  # timed runs, all rivals in turn

_RULES = (
    (("TRAIN_STEPS", "N_PROMPTS", "PROMPT_TOKENS", "NEW_TOKENS", "K", "REPEATS"), lambda value: value >= 1),
    (("KS", "SPEED_KS", "BATCHES"), lambda values: bool(values) and min(values) >= 1),
)


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    s = settings or sys.modules[__name__]
    known = ("checks", "acceptance", "speed", "peers")
    if not s.PARTS or set(s.PARTS) - set(known):
        raise ValueError(f"PARTS={s.PARTS} must name some of {', '.join(known)}, and nothing else")
    for names, holds in _RULES:
        for name in names:
            if not holds(getattr(s, name)):
                raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if not s.TEMPERATURES or not all(0 <= value < math.inf for value in s.TEMPERATURES):
        raise ValueError(f"TEMPERATURES={s.TEMPERATURES} must be some numbers of at least 0")
    if s.PROMPT_TOKENS + s.NEW_TOKENS > 256:
        raise ValueError(f"PROMPT_TOKENS={s.PROMPT_TOKENS} and NEW_TOKENS={s.NEW_TOKENS} exceed the 256 tokens that "
                         f"the pair can read: use fewer")  # fmt: skip
    if max(s.BATCHES) > s.N_PROMPTS:
        raise ValueError(f"BATCHES={s.BATCHES} exceed N_PROMPTS={s.N_PROMPTS}: use more prompts")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
