"""Constants of project 11: text that is drafted and checked."""

import sys

from common import settings as common_settings
from common.device import pick_device

# == System ==
CHECKPOINT: str | None = None  # a checkpoint, a Hugging Face folder or org/name; none: the bundled or newest model
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
DTYPE = "bfloat16" if _GPU else "float32"  # of weights and caches
SEED: int | None = None  # the same text every time; none: another one

# == Draft ==
DRAFT = "ngram"  # ngram, ngram:n=2, or a smaller model: a checkpoint, a Hugging Face folder or org/name
DRAFT_TOKENS = 4  # tokens of a draft at most
RULE = "rejection"  # rejection: the same distribution, coupled: the very text of plain decoding

# == Cache ==
CACHE = "contiguous"  # a name in the catalog's group caches
GRAPHS = _GPU  # record steps into CUDA graphs

# == Sampling ==
PROMPT: list[str] = ["The "]  # how the text begins; several are continued in one batch
MAX_NEW_TOKENS = 96  # length of a continuation
TEMPERATURE = 0.0  # 0: always the likeliest token
TOP_K: int | None = None  # keep only the k likeliest tokens; none: all
TOP_P: float | None = None  # keep only the likeliest tokens that together reach this; none: all
MIN_P: float | None = None  # keep only tokens at least this likely relative to the likeliest; none: all
REPETITION_PENALTY = 1.0  # above 1: tokens that occurred become less likely
STOP: list[str] = []  # texts that end a continuation
COMPARE = True  # also write it without a draft, and tell both speeds


def sampling_params(s):
    """The sampling parameters that these settings ask for."""
    from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams

    stop = tuple(text.replace("\\n", "\n") for text in s.STOP)
    return SamplingParams(
        s.MAX_NEW_TOKENS, s.TEMPERATURE, s.TOP_K, s.TOP_P, s.MIN_P, s.REPETITION_PENALTY, stop=stop, seed=s.SEED
    )


def validate_config(settings=None):
    """Refuse combinations that cannot work; raises ValueError with the remedy."""
    from common.catalog import GROUPS
    from phase4_advanced_inference.project11_speculative_decoding.rules import RULES

    s = settings or sys.modules[__name__]
    for name, known in {
        "CACHE": GROUPS["caches"], "RULE": RULES, "DTYPE": ("float32", "bfloat16", "float16"),
    }.items():  # fmt: skip
        if getattr(s, name) not in known:
            raise ValueError(f"{name}={getattr(s, name)} is unknown: use one of {', '.join(known)}")
    for name in ("DRAFT_TOKENS", "MAX_NEW_TOKENS"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if not s.PROMPT:
        raise ValueError('PROMPT=[] begins no text: use --prompt "" for one from the beginning of a document')
    try:
        sampling_params(s)
    except ValueError as error:
        values = ", ".join(f"{name}={getattr(s, name)}" for name in ("TEMPERATURE", "TOP_K", "TOP_P", "MIN_P",
                                                                     "REPETITION_PENALTY", "STOP"))  # fmt: skip
        raise ValueError(f"{values}: {error}") from error


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
