"""Constants of project 6: preference optimization of project 4's model, or of any that has learned to chat.

Those of projects 3 and 4 hold here, too, with smaller rates, and without dropout: the reference has none either.
"""

import math
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
OUT_DIR = os.path.join(_ROOT, "checkpoints", "project6")  # checkpoints, metrics.jsonl and curves

# == Model ==
CHECKPOINT: str | None = None  # the model that chats: a checkpoint, a Hugging Face folder or org/name; none: newest
BLOCK_SIZE = 512 if _GPU else 128  # tokens of a prompt with its answer; a row holds two, or several short pairs
DROPOUT = 0.0  # noise would blur the ratio to the reference

# == Preferences ==
LOSS = "dpo"  # dpo, ipo, simpo or orpo
BETA = 0.1  # dpo: the price of leaving the reference; small is cheap
LABEL_SMOOTHING = 0.0  # dpo: the chance that a label is flipped (cDPO)
IPO_TAU = 0.5  # ipo: the margin sought is 1 / (2 IPO_TAU) nats a token
SIMPO_BETA = 2.0  # simpo: scale of the reward, a mean log-probability
SIMPO_GAMMA = 1.0  # simpo: the margin sought, in reward
ORPO_WEIGHT = 0.1  # orpo: weight of the odds ratio beside fine-tuning
REFERENCE = "precomputed"  # precomputed, or adapters_off: the same model without its adapters (--use lora)

# == Training ==
EPOCHS = 1.0  # how often every pair is read; MAX_STEPS, if given, decides instead
MAX_STEPS = 0  # optimizer steps; 0: as many as EPOCHS needs
BATCH_TOKENS = 2048  # places of one optimizer step for each side, chosen and rejected
LEARNING_RATE = 5e-5 if _GPU else 2e-4  # peak
WARMUP_STEPS = 5  # linear warm-up
COMPILE = False  # such a run has a few dozen steps, and compiling took 50 seconds where eight steps took one

# == Evaluation ==
EVAL_EVERY = 20 if _GPU else 7  # steps between two validations
SAVE_EVERY = 100 if _GPU else 10  # steps between two writes of last.pt
KL_TOKENS = 1024  # held-out answer tokens at which the distance to the reference is measured
ANSWERS = 16  # held-out prompts that are answered before and after, to compare lengths; 0: none

# == Data ==
SOURCE = "ultrafeedback"  # download_data.py: ultrafeedback or hh
TRAIN_DATA_PATH = os.path.join(_ROOT, "data", "preference_train.jsonl")  # preferences, one a line
VAL_DATA_PATH: str | None = None  # held-out preferences; none: VAL_FRACTION of the training ones, by their prompts


def validate_config(settings=None):
    """Refuse combinations that cannot work; raises ValueError with the remedy."""
    constants = common_settings.constants_of(sys.modules[__name__])  # those of projects 3 and 4 among them
    values = {name: getattr(settings, name) if settings else constants[name].default for name in constants}
    s = types.SimpleNamespace(**values)
    for name, known in (("LOSS", ("dpo", "ipo", "simpo", "orpo")), ("REFERENCE", ("precomputed", "adapters_off"))):
        if getattr(s, name) not in known:
            raise ValueError(f"{name}={getattr(s, name)} is unknown: use one of {', '.join(known)}")
    for name in ("BETA", "IPO_TAU", "SIMPO_BETA", "ORPO_WEIGHT"):
        if not 0 < getattr(s, name) < math.inf:
            default = constants[name].default
            raise ValueError(f"{name}={getattr(s, name)} must be above 0 and finite: the default is {default}")
    if not 0 <= s.SIMPO_GAMMA < math.inf:
        raise ValueError(f"SIMPO_GAMMA={s.SIMPO_GAMMA} must be at least 0: the default is {SIMPO_GAMMA}")
    if not 0 <= s.LABEL_SMOOTHING < 0.5:
        raise ValueError(
            f"LABEL_SMOOTHING={s.LABEL_SMOOTHING} must be at least 0 and below 0.5, where labels say nothing: use 0.1"
        )
    if s.KL_TOKENS < 1 or s.ANSWERS < 0:
        raise ValueError(f"KL_TOKENS={s.KL_TOKENS} must be at least 1 and ANSWERS={s.ANSWERS} at least 0: use 1024, 16")
    _config.validate_config(settings or s)


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
