"""Constants of project 8: generating text through a KV cache."""

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
STOP: list[str] = []  # texts that end a continuation

# == Generation ==
PROMPT: list[str] = ["The "]  # how the text begins; several are continued in one batch
INTERACTIVE = False  # continue what is typed, line after line
COMPARE = False  # also without a cache: the same tokens, and tokens/s of both


def validate_config(settings=None):
    """Refuse combinations that cannot work; raises ValueError with the remedy."""
    from common.catalog import GROUPS
    from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams

    s = settings or sys.modules[__name__]
    if s.CACHE not in GROUPS["caches"]:
        raise ValueError(f"CACHE={s.CACHE} is unknown: use one of {', '.join(GROUPS['caches'])}")
    if s.DTYPE not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"DTYPE={s.DTYPE} is unknown: use float32, bfloat16 or float16")
    for name, good in (("CHUNK", 512), ("CAPACITY", 1024), ("MAX_NEW_TOKENS", 128)):
        value = getattr(s, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1: use {good}")
    for name, good in (("TEMPERATURE", 0.8), ("REPETITION_PENALTY", 1.0)):
        if getattr(s, name) < 0:
            raise ValueError(f"{name}={getattr(s, name)} must not be negative: use {good}")
    if not s.PROMPT:
        raise ValueError('PROMPT=[] begins no text: use --prompt "" for one from the beginning of a document')
    SamplingParams(s.MAX_NEW_TOKENS, s.TEMPERATURE, s.TOP_K, s.TOP_P, s.MIN_P, s.REPETITION_PENALTY, tuple(s.STOP))


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
