"""Constants of project 12: requests that arrive over time, served in one batch."""

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
SEED = 0  # of arrivals, lengths and texts

# == Batch ==
POLICY = "continuous"  # continuous: join and leave at every step; static: a batch begins and ends together
N_ROWS = 8  # requests at a time
MAX_TOKENS = 64  # tokens of a step: decodes first, then chunks of prompts; for static prompts are read whole
PATIENCE: int | None = 256  # steps of waiting that count as one level of priority; none: strict priorities
CACHE = "contiguous"  # a name in the catalog's group caches
GRAPHS = _GPU  # record decode steps into CUDA graphs

# == Trace ==
N_REQUESTS = 24  # requests of the trace
RATE = 100.0 if _GPU else 50.0  # arrivals per second, on average
PROMPT_TOKENS = 24.0  # median length of a prompt
NEW_TOKENS = 24.0  # median length of a continuation
SPREAD = 0.8  # of both: 0 is always the median, 1 goes from a third of it to three times for most
TEXT = os.path.join(_ROOT, "data", "shakespeare.txt")  # what prompts are cut out of
TEMPERATURE = 0.0  # 0: always the likeliest token

# == Output ==
PROMPT: list[str] = []  # continue these instead of a trace, all at once
MAX_NEW_TOKENS = 48  # length of a continuation of --prompt
COMPARE = False  # also with the other policy
CHECK = False  # is each text the one that is written alone?
WIDTH = 100  # steps in a line of the timeline; 0: no timeline
PLOT: str | None = None  # also draw the timeline to this PNG

_LEAST = {"N_ROWS": 1, "MAX_TOKENS": 1, "PATIENCE": 1, "N_REQUESTS": 1, "PROMPT_TOKENS": 1, "NEW_TOKENS": 1,
          "SPREAD": 0, "TEMPERATURE": 0, "MAX_NEW_TOKENS": 1, "WIDTH": 0}  # fmt: skip


def validate_config(settings=None):
    """Refuse what cannot work; raises ValueError with the remedy."""
    from common.catalog import GROUPS

    s = settings or sys.modules[__name__]
    for name, least in _LEAST.items():
        value = getattr(s, name)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name}={value} must be at least {least}: the default is "
                             f"{getattr(sys.modules[__name__], name)}")  # fmt: skip
    if not s.RATE > 0:
        raise ValueError(f"RATE={s.RATE} must be positive: use inf to let all requests come at once")
    if s.SEED < 0:
        raise ValueError(f"SEED={s.SEED} must be at least 0: use any other number for another trace")
    if s.MAX_TOKENS < s.N_ROWS:
        raise ValueError(f"MAX_TOKENS={s.MAX_TOKENS} must be at least N_ROWS={s.N_ROWS}, as each row decodes one token "
                         f"a step: raise it, or use fewer rows")  # fmt: skip
    for name, known in {"CACHE": GROUPS["caches"], "POLICY": ("continuous", "static"),
                        "DTYPE": ("float32", "bfloat16", "float16")}.items():  # fmt: skip
        if getattr(s, name) not in known:
            raise ValueError(f"{name}={getattr(s, name)} is unknown: use one of {', '.join(known)}")
    if s.CHECK and s.DTYPE != "float32":
        raise ValueError(f"DTYPE={s.DTYPE} rounds otherwise in another batch, so CHECK=True would tell nothing: use "
                         f"--dtype float32")  # fmt: skip


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
