"""Constants of compare_stages.py."""

import os
import sys

from common import CHECKPOINTS, DATA
from common import settings as common_settings
from common.device import pick_device

# == Stages ==
DEVICE = pick_device()  # cuda, mps or cpu
STAGES: list[str] = []  # name=checkpoint, in order; none: the newest of projects 3 (or the speedrun), 4, 5 and 6
PRETRAIN_DATA: str | None = None  # a val.bin of pre-training: what was forgotten; none: that of the speedrun, if any
SFT_DATA = str(DATA / "sft_sample.jsonl.xz")  # conversations; those that train_sft.py holds out are used
VAL_FRACTION = 0.05  # part of the conversations held out: as in the training
PREFERENCE_DATA = str(DATA / "polite_test.jsonl.xz")  # held-out preferences
PROMPTS: list[str] = ["What is the capital of France?", "Name three colors.", "What is a noun?"]  # answered by all
MAX_TOKENS = 65_536  # of each set, evenly spread
OUT_DIR = str(CHECKPOINTS / "stages")  # stages.md and stages.png


def validate_config(settings=None):
    """Refuse what cannot be compared."""
    s = settings or sys.modules[__name__]
    if s.MAX_TOKENS < 1:
        raise ValueError(f"MAX_TOKENS={s.MAX_TOKENS} must be at least 1: the default is {MAX_TOKENS}")
    if not 0 < s.VAL_FRACTION < 0.5:
        raise ValueError(f"VAL_FRACTION={s.VAL_FRACTION} must be above 0 and below 0.5: the default is {VAL_FRACTION}")
    for name in ("PRETRAIN_DATA", "SFT_DATA", "PREFERENCE_DATA"):
        path = getattr(s, name)
        if path is not None and not os.path.isfile(path):
            raise ValueError(f"{name}={path} is no file: give another path")
    for stage in s.STAGES:
        if "=" not in stage:
            raise ValueError(f"STAGES={stage} is no name=checkpoint: write sft=checkpoints/project4/best.pt")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
