"""Constants of project 10: asking many questions about one text, which is read once."""

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
DTYPE = "bfloat16" if _GPU else "float32"  # of weights and caches
SEED: int | None = 0  # the same texts every time; none: other ones

# == Cache ==
BUDGET_MIB = 1024.0  # memory for keys and values of past texts
CHUNK = 512  # tokens of a prefill step at most
CACHE = "contiguous"  # a name in the catalog's group caches
GRAPHS = _GPU  # record decode steps into CUDA graphs
PREFIXES: str | None = None  # a folder: what was read is taken from there first, and written there afterwards

# == Data ==
DOCUMENT = os.path.join(_ROOT, "data", "shakespeare.txt")  # the text that all questions are about
DOCUMENT_TOKENS: int | None = None  # how much of it is used; none: what the model's context has room for

# == Generation ==
QUESTION: list[str] = ["ROMEO:", "JULIET:", "The king"]  # each is put behind the text, one after the other
MAX_NEW_TOKENS = 16  # length of an answer
TEMPERATURE = 0.0  # 0: always the likeliest token
COMPARE = False  # also without reuse: the same text, and the time to the first token of both

_RULES = {
    "BUDGET_MIB": (lambda value: 0 <= value < math.inf, "be at least 0"),
    "CHUNK": (lambda value: value >= 1, "be at least 1"),
    "DOCUMENT_TOKENS": (lambda value: value >= 1, "be at least 1"),
    "MAX_NEW_TOKENS": (lambda value: value >= 1, "be at least 1"),
    "TEMPERATURE": (lambda value: 0 <= value < math.inf, "be 0 (greedy) or positive"),
}


def validate_config(settings=None):
    """Refuse what cannot work; raises ValueError with the remedy."""
    from common.catalog import GROUPS

    s = settings or sys.modules[__name__]
    for name, (holds, words) in _RULES.items():
        value = getattr(s, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name}={value} must {words}: the default is {getattr(sys.modules[__name__], name)}")
    if s.CACHE not in GROUPS["caches"] or s.CACHE == "sliding":
        keep = [name for name in GROUPS["caches"] if name != "sliding"]
        raise ValueError(f"CACHE={s.CACHE} is unknown, or forgets the beginnings of texts: use {' or '.join(keep)}")
    if s.DTYPE not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"DTYPE={s.DTYPE} is unknown: use float32, bfloat16 or float16")
    if s.PREFIXES and os.path.exists(s.PREFIXES) and not os.path.isdir(s.PREFIXES):
        raise ValueError(f"PREFIXES={s.PREFIXES} is a file: name a folder, which may be new")
    if not s.QUESTION:
        raise ValueError("QUESTION=[] asks nothing: give at least one")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
