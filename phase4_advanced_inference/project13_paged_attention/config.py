"""Constants of project 13: many prompts continued at once, over a cache of blocks."""

import math
import os
import sys

from common import settings as common_settings
from common.device import pick_device

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# == System ==
CHECKPOINT: str | None = None  # a checkpoint, a Hugging Face folder or org/name; none: the bundled or newest model
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
DTYPE = "bfloat16" if _GPU else "float32"  # of weights and cache
SEED: int | None = 0  # the same texts every time; none: other ones

# == Prompts ==
PROMPT: list[str] = []  # beginnings of texts, as many as you like; none given: see PROMPTS_FILE
PROMPTS_FILE: str | None = None  # a text file with a prompt on each line; none: passages of DOCUMENT
DOCUMENT = os.path.join(_ROOT, "data", "shakespeare.txt")  # where the passages are cut from, at its empty lines
PASSAGES = 16  # how many are cut
PASSAGE_TOKENS = 24  # tokens of a passage at most
HEADER = (
    "Here is the beginning of a speech from an old play. Read it with care, and go on with it in the same voice, as "
    "the man who wrote the play might have done:\n\n"
)  # every passage begins with it, so that there is something to share

# == Engine ==
ROWS = 8  # texts that run at a time; the others wait
PAGE = 16  # tokens of a block, a power of two
MEMORY_MIB: float | None = None  # for keys and values; none: enough for all rows to be full
STEP_TOKENS = 256  # tokens of a step at most, those of prompts among them
SHARE = True  # texts that begin alike share the blocks of their beginning
SWAP_MIB = 0.0  # memory of the host for texts that had to leave; 0: they are read anew
AHEAD: bool | None = None  # plan a step while the device runs the one before; none: on a GPU
GRAPHS = _GPU  # record decode steps into CUDA graphs

# == Draft ==
DRAFT_TOKENS = 0  # tokens that are guessed and checked in a step; 0: no speculation
DRAFT = "ngram"  # who guesses: ngram, ngram:n=2, or a smaller model: a checkpoint, a Hugging Face folder or org/name
RULE = "coupled"  # coupled: the very text of plain decoding, rejection: the same distribution

# == Sampling ==
MAX_NEW_TOKENS = 48  # length of a continuation
TEMPERATURE = 0.8  # 0: always the likeliest token
TOP_K: int | None = 50  # keep only the k likeliest tokens; none: all
TOP_P: float | None = None  # keep only the likeliest tokens that together reach this; none: all
MIN_P: float | None = None  # keep only tokens at least this likely relative to the likeliest; none: all
REPETITION_PENALTY = 1.0  # above 1: tokens that occurred become less likely
STOP: list[str] = ["\\n\\n"]  # texts that end a continuation: here the empty line behind a speech

# == Output ==
EVERY = 10  # steps between two lines of progress
SHOW_BLOCKS = 0  # draw the blocks after each of so many steps
COMPARE = False  # write all again with project 8, one by one and in batches, and tell whether the texts are the same

_RULES = {
    "PASSAGES": (lambda value: value >= 1, "be at least 1"),
    "PASSAGE_TOKENS": (lambda value: value >= 1, "be at least 1"),
    "ROWS": (lambda value: value >= 1, "be at least 1"),
    "PAGE": (lambda value: value >= 1 and not value & (value - 1), "be a power of two"),
    "MEMORY_MIB": (lambda value: 0 < value < math.inf, "be positive"),
    "SWAP_MIB": (lambda value: 0 <= value < math.inf, "be at least 0"),
    "DRAFT_TOKENS": (lambda value: value >= 0, "be at least 0 (no speculation)"),
    "EVERY": (lambda value: value >= 1, "be at least 1"),
    "SHOW_BLOCKS": (lambda value: value >= 0, "be at least 0"),
}
_SAMPLING = ("MAX_NEW_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "MIN_P", "REPETITION_PENALTY", "STOP")


def sampling_params(s):
    """The sampling parameters that these settings ask for."""
    from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams

    stop = tuple(text.replace("\\n", "\n") for text in s.STOP)
    return SamplingParams(
        s.MAX_NEW_TOKENS, s.TEMPERATURE, s.TOP_K, s.TOP_P, s.MIN_P, s.REPETITION_PENALTY, stop=stop, seed=s.SEED
    )


def validate_config(settings=None):
    """Refuse what cannot work; raises ValueError with the remedy."""
    from phase4_advanced_inference.project11_speculative_decoding.rules import RULES

    s = settings or sys.modules[__name__]
    for name, known in {"RULE": RULES, "DTYPE": ("float32", "bfloat16", "float16")}.items():
        if getattr(s, name) not in known:
            raise ValueError(f"{name}={getattr(s, name)} is unknown: use one of {', '.join(known)}")
    for name, (holds, words) in _RULES.items():
        value = getattr(s, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name}={value} must {words}: the default is {getattr(sys.modules[__name__], name)}")
    if s.STEP_TOKENS < s.ROWS:
        raise ValueError(f"STEP_TOKENS={s.STEP_TOKENS} must be at least ROWS={s.ROWS}: each row decodes one a step")
    if s.PROMPT and s.PROMPTS_FILE:
        raise ValueError(f"PROMPTS_FILE={s.PROMPTS_FILE} and {len(s.PROMPT)} prompts: give one of both")
    try:
        sampling_params(s)
    except ValueError as error:
        values = ", ".join(f"{name}={getattr(s, name)}" for name in _SAMPLING)
        raise ValueError(f"{values}: {error}") from error


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
