"""Constants of project 6's benchmark."""

import os
import sys

from common import DATA
from common import settings as common_settings
from common.device import pick_device

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 0  # of weights and of the order
PARTS: list[str] = ["speed", "trl", "losses", "beta"]  # what to measure; of the rest, what stands in results/ is kept
CORPUS = str(DATA / "polite_train.jsonl.xz")  # preferences to learn from
PRESET = "gpt2" if _GPU else "cpu-small"  # the model whose steps are timed
BLOCK_SIZE = 512 if _GPU else 128  # tokens of an answer with its prompt; a row has twice as many
ROWS = 8  # of a packed step
STEPS = 4  # steps of one timed round
REPEATS = 5  # timed rounds, ours and the peer's in turn
CHECKPOINT: str | None = None  # the fine-tuned model of "losses" and "beta"; none: the newest of project 4
EPOCHS = 1.0  # of each run of "losses" and "beta"
BETAS: list[float] = [0.02, 0.1, 0.3, 1.0, 3.0]  # of "beta"
FLAGS = ""  # further flags of these runs, in one string: --flags="--learning_rate 1e-5"


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    s = settings or sys.modules[__name__]
    if not s.PARTS or not set(s.PARTS) <= set(PARTS):
        raise ValueError(f"PARTS={s.PARTS} must name at least one of {', '.join(PARTS)}, and nothing else")
    for name in ("BLOCK_SIZE", "ROWS", "STEPS", "REPEATS"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if not s.EPOCHS > 0 or not all(beta > 0 for beta in s.BETAS):
        raise ValueError(f"EPOCHS={s.EPOCHS} and BETAS={s.BETAS} must be above 0: use 1.0, and 0.1 0.3")
    if not os.path.isfile(s.CORPUS):
        raise ValueError(f"CORPUS={s.CORPUS} is no file: give preferences as JSON Lines")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
