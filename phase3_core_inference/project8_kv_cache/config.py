"""Constants of project 8: generating text through a KV cache."""

import math
import sys

from common import settings as common_settings
from common.device import pick_device

# == System ==
CHECKPOINT: str | None = None  # a checkpoint, a Hugging Face folder or org/name; none: the bundled or newest model
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
DTYPE = "bfloat16" if _GPU else "float32"  # of weights and cache
SEED: int | None = None  # the same text every time; none: another one

# == Cache ==
CACHE = "contiguous"  # a name in the catalog's group caches: contiguous, sliding
CAPACITY: int | None = None  # tokens a row has room for; none: the model's block_size
CHUNK = 512  # tokens of a prefill step at most
COMPILE = False  # compile decode steps: worth it for long texts only
GRAPHS = _GPU  # record decode steps into CUDA graphs

# == Sampling ==
MAX_NEW_TOKENS = 128  # length of a continuation
TEMPERATURE = 0.8  # 0: always the likeliest token
TOP_K: int | None = 50  # keep only the k likeliest tokens; none: all
TOP_P: float | None = None  # keep only the likeliest tokens that together reach this; none: all
MIN_P: float | None = None  # keep only tokens at least this likely relative to the likeliest; none: all
REPETITION_PENALTY = 1.0  # above 1: tokens that occurred become less likely
PRESENCE_PENALTY = 0.0  # above 0: tokens that were written become less likely
FREQUENCY_PENALTY = 0.0  # the same, once for each time that they were
STOP: list[str] = []  # texts that end a continuation

# == Generation ==
PROMPT: list[str] = ["The "]  # how the text begins; several are continued in one batch
INTERACTIVE = False  # continue what is typed, line after line
COMPARE = False  # also without a cache: the same tokens, and tokens/s of both


# What a number must do; nan passes none of the tests, none passes all.
_RULES = {
    "CAPACITY": (lambda value: value >= 2, "be at least 2"),
    "CHUNK": (lambda value: value >= 1, "be at least 1"),
    "MAX_NEW_TOKENS": (lambda value: value >= 1, "be at least 1"),
    "TEMPERATURE": (lambda value: 0 <= value < math.inf, "be 0 (greedy) or positive"),
    "TOP_K": (lambda value: value >= 1, "be at least 1"),
    "TOP_P": (lambda value: 0 < value <= 1, "lie above 0 and not above 1"),
    "MIN_P": (lambda value: 0 <= value <= 1, "lie between 0 and 1"),
    "REPETITION_PENALTY": (lambda value: 0 < value < math.inf, "be positive"),
    "PRESENCE_PENALTY": (lambda value: -2 <= value <= 2, "lie between -2 and 2"),
    "FREQUENCY_PENALTY": (lambda value: -2 <= value <= 2, "lie between -2 and 2"),
}


def validate_config(settings=None):
    """Refuse combinations that cannot work; raises ValueError with the remedy."""
    from common.catalog import GROUPS
    from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams

    s = settings or sys.modules[__name__]
    if s.CACHE not in GROUPS["caches"]:
        raise ValueError(f"CACHE={s.CACHE} is unknown: use one of {', '.join(GROUPS['caches'])}")
    if s.DTYPE not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"DTYPE={s.DTYPE} is unknown: use float32, bfloat16 or float16")
    for name, (holds, words) in _RULES.items():
        value = getattr(s, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name}={value} must {words}: the default is {getattr(sys.modules[__name__], name)}")
    if not s.PROMPT:
        raise ValueError('PROMPT=[] begins no text: use --prompt "" for one from the beginning of a document')
    SamplingParams(stop=tuple(s.STOP))


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
