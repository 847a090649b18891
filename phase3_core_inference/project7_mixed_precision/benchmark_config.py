"""Constants of project 7's benchmark."""

import sys

from common import settings as common_settings
from common.device import pick_device

# == Benchmark ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 0  # of weights and tokens
PARTS: list[str] = ["checks", "products", "steps", "inference", "run"]  # of the rest, what stands in results/ is kept
MODELS: list[str] = ["124M", "1.1B"] if _GPU else ["small"]  # shapes whose training steps are timed
REPEATS = 5  # timed rounds, all rivals in turn
RUN_STEPS = 0  # steps of the training runs that are compared; 0 leaves them out
RUNS_AT_ONCE = 1  # how many of them share the device; their losses do not depend on it
RUN_FLAGS = ""  # further flags of all of them, in one string: --run_flags="--data_dir ..."

_CHOICES = {"PARTS": ("checks", "products", "steps", "inference", "run"), "MODELS": ("small", "124M", "1.1B")}


def validate_config(settings=None):
    """Refuse what cannot be measured."""
    s = settings or sys.modules[__name__]
    for name, choices in _CHOICES.items():
        values = getattr(s, name)
        if not values or any(value not in choices for value in values):
            raise ValueError(f"{name}={values} must name some of {', '.join(choices)}, and nothing else")
    for name in ("REPEATS", "RUNS_AT_ONCE"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if s.RUN_STEPS < 0:
        raise ValueError(f"RUN_STEPS={s.RUN_STEPS} must be at least 0")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
