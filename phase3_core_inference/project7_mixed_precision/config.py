"""Constants of project 7: the lesson on gradients that are too small, and the conversion of a checkpoint.

Training itself is project 3's: ``train_pretrain.py --dtype float16`` or ``--use fp8``, with its own constants.
"""

import os
import sys

from common import DATA
from common import settings as common_settings
from common.device import pick_device

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# == System ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 1337  # of weights and batches
TEXT = str(DATA / "shakespeare.txt")  # what is learned, byte by byte
PICTURE = os.path.join(_ROOT, "checkpoints", "project7", "underflow.png")  # the histogram

# == Model ==
MODEL = "cpu-small" if _GPU else "cpu-tiny"  # from project 3's presets; CPUs are slow in float16
BLOCK_SIZE = 64  # bytes of context

# == Training ==
STEPS = 60  # optimizer steps of each run
ROWS = 16  # sequences of one step
STEP_TOKENS = 491_520  # by so many the loss is divided: a GPU's step, of which this batch is a part
LEARNING_RATE = 3e-3  # of AdamW, constant after ten steps of warm-up
SCALE = 2.0**16  # of the loss


def validate_config(settings=None):
    """Refuse what cannot work."""
    from phase1_foundation.project3_pretrain.presets import PRESETS

    s = settings or sys.modules[__name__]
    if s.MODEL not in PRESETS:
        raise ValueError(f"MODEL={s.MODEL} is unknown: use one of {', '.join(PRESETS)}")
    for name in ("BLOCK_SIZE", "STEPS", "ROWS", "STEP_TOKENS"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1: the default is {globals()[name]}")
    for name in ("LEARNING_RATE", "SCALE"):
        if not 0 < getattr(s, name) < float("inf"):
            raise ValueError(f"{name}={getattr(s, name)} must be positive: the default is {globals()[name]}")
    if not os.path.isfile(s.TEXT):
        raise ValueError(f"TEXT={s.TEXT} is no file: give any text, or leave out --text for the bundled one")
    if os.path.getsize(s.TEXT) < 2 * s.BLOCK_SIZE:
        raise ValueError(
            f"TEXT={s.TEXT} is shorter than two windows of BLOCK_SIZE={s.BLOCK_SIZE} bytes: give a longer one"
        )


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
