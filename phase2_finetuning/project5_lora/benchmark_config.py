"""Constants of project 5's benchmark."""

import os
import sys

from common import DATA
from common import settings as common_settings
from common.device import pick_device

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 0  # of weights, tokens and the order of conversations
PARTS: list[str] = ["checks", "cost", "batch", "loss"]  # what to measure; of the rest, what stands in results/ is kept
RANK = 8  # of the adapters whose cost is measured, on all linear layers
MODELS: list[str] = ["124M", "1.1B"] if _GPU else ["small"]  # shapes whose training steps are timed
COMPILE: list[str] = ["124M"] if _GPU else []  # those that are compiled, ours and the peers'
REPEATS = 5  # timed steps, all rivals in turn
ADAPTERS = 8  # of a batch in which each row has its own
ROWS = 32  # of that batch
ROW_TOKENS = 64 if _GPU else 16  # tokens of a row
CHECKPOINT: str | None = None  # the model to fine-tune for the losses; none: the newest of project 3 or the speedrun
CORPUS = str(DATA / "sft_sample.jsonl.xz")  # conversations to fine-tune on
STEPS = 60  # optimizer steps of each fine-tuning whose loss is compared
EVALUATIONS = 6  # points of its curve
EVAL_TOKENS = 16_384  # tokens of one evaluation
FULL_RATE = 3e-4 if _GPU else 2e-3  # learning rate of all weights: the best of those compared (README)
LORA_RATE = 2e-3 if _GPU else 1e-2  # learning rate of adapters: the best of those compared (README)


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    s = settings or sys.modules[__name__]
    known = {"PARTS": ("checks", "cost", "batch", "loss"), "MODELS": ("small", "124M", "1.1B")}
    for name, choices in (*known.items(), ("COMPILE", known["MODELS"])):
        unknown = [value for value in getattr(s, name) if value not in choices]
        if unknown or (not getattr(s, name) and name != "COMPILE"):
            raise ValueError(f"{name}={getattr(s, name)} must name some of {', '.join(choices)}, and nothing else")
    for name in ("RANK", "REPEATS", "ADAPTERS", "ROWS", "ROW_TOKENS", "STEPS", "EVALUATIONS", "EVAL_TOKENS"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if s.ROWS < s.ADAPTERS:
        raise ValueError(f"ROWS={s.ROWS} leaves some of ADAPTERS={s.ADAPTERS} without a row: use as many, or more")
    for name in ("FULL_RATE", "LORA_RATE"):
        if not getattr(s, name) > 0:
            raise ValueError(f"{name}={getattr(s, name)} must be positive")
    if not os.path.isfile(s.CORPUS):
        raise ValueError(f"CORPUS={s.CORPUS} is no file: give conversations as JSON Lines")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
