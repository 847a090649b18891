"""Constants of project 5: low-rank adapters beside the frozen model of project 3.

Those of project 4 hold here, too (conversations, epochs, evaluation); what is trained, and how fast, differs.
"""

import os
import sys
import types

from common import settings as common_settings
from common.device import pick_device
from phase2_finetuning.project4_sft import config as _config

BASE_CONFIG = _config

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# == System ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
OUT_DIR = os.path.join(_ROOT, "checkpoints", "project5")  # checkpoints, adapter/, metrics.jsonl and curves

# == Adapter ==
RANK = 8  # rank of the updates
ALPHA = 16.0  # updates are scaled by ALPHA / RANK
RANK_STABILIZED = False  # by ALPHA / sqrt(RANK) instead (rsLoRA)
DORA = False  # train the length of each weight, too (DoRA)
TARGETS: list[str] = ["attention", "mlp"]  # layers that get one, by parts of their names: q_proj, blocks.0 ...
LORA_DROPOUT = 0.05  # on what goes into an update
TRAIN_TOKENS = True  # train the rows of tokens that the template adds: frozen, they would mean nothing
BASE_DTYPE = "float32"  # what the frozen model is stored in: float32 or bfloat16 (half the memory)

# == Training ==
LEARNING_RATE = 1e-3 if _GPU else 1e-2  # peak, of adapters: several times that of all weights


def validate_config(settings=None):
    """Refuse combinations that cannot work; raises ValueError with the remedy."""
    constants = common_settings.constants_of(sys.modules[__name__])  # those of project 4 among them
    values = {name: getattr(settings, name) if settings else constants[name].default for name in constants}
    s = types.SimpleNamespace(**values)
    if s.RANK < 1:
        raise ValueError(f"RANK={s.RANK} must be at least 1: use 4, 8 or 16")
    if not s.ALPHA > 0:
        raise ValueError(f"ALPHA={s.ALPHA} must be positive: once or twice the rank is usual")
    if not 0 <= s.LORA_DROPOUT < 1:
        raise ValueError(f"LORA_DROPOUT={s.LORA_DROPOUT} must be at least 0 and below 1: use 0 or 0.05")
    if not s.TARGETS:
        raise ValueError(f"TARGETS={s.TARGETS} leaves nothing to train: use attention and mlp")
    if s.BASE_DTYPE not in ("float32", "bfloat16"):
        raise ValueError(f"BASE_DTYPE={s.BASE_DTYPE} is unknown: use float32 or bfloat16")
    _config.validate_config(s)


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
