"""Constants of project 4: supervised fine-tuning of project 3's model on conversations.

Those of project 3 hold here, too (a model, an optimizer, a schedule), with smaller rates and shorter runs.
"""

import math
import os
import sys
import types

from common import settings as common_settings
from common.device import pick_device
from phase1_foundation.project3_pretrain import config as _config

BASE_CONFIG = _config

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# == System ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
OUT_DIR = os.path.join(_ROOT, "checkpoints", "project4")  # checkpoints, metrics.jsonl and curves

# == Model ==
CHECKPOINT: str | None = None  # the model to fine-tune: a checkpoint, a Hugging Face folder or org/name; none: newest
DROPOUT = 0.1  # the same conversations are read several times

# == Training ==
EPOCHS = 3.0  # how often every conversation is read; MAX_STEPS, if given, decides instead
MAX_STEPS = 0  # optimizer steps; 0: as many as EPOCHS needs
BATCH_TOKENS = 32_768 if _GPU else 2048  # tokens of one optimizer step, padding included
OPTIMIZER = "adamw"  # adamw or muon
LEARNING_RATE = 3e-4 if _GPU else 1e-3  # peak, of hidden matrices and vectors
EMBED_LEARNING_RATE: float | None = None  # peak, of embeddings and head; none: LEARNING_RATE
WEIGHT_DECAY = 0.0  # pre-training has found the size of the weights
SCHEDULE = "cosine"  # cosine or wsd
WARMUP_STEPS = 10  # linear warm-up

# == Evaluation ==
EVAL_EVERY = 50  # steps between two validations
SAVE_EVERY = 100  # steps between two writes of last.pt
PROMPT = "What is the capital of France?"  # the question of samples

# == Data ==
SOURCE = "dolly"  # download_data.py: dolly, smoltalk or ultrachat
SIZE = "small"  # download_data.py: small, medium or large
TRAIN_DATA_PATH = os.path.join(_ROOT, "data", "sft_train.jsonl")  # conversations, one a line
VAL_FRACTION = 0.05  # part of the conversations held out, by their first question
FORGETTING_DATA: str | None = None  # a val.bin of pre-training: its loss before and after shows what was forgotten


def validate_config(settings=None):
    """Refuse combinations that cannot work; raises ValueError with the remedy."""
    constants = common_settings.constants_of(sys.modules[__name__])  # those of project 3 among them
    values = {name: getattr(settings, name) if settings else constants[name].default for name in constants}
    s = types.SimpleNamespace(**values)
    if not 0 < s.EPOCHS < math.inf:
        raise ValueError(f"EPOCHS={s.EPOCHS} must be positive: the default is {EPOCHS}")
    if s.MAX_STEPS < 0:
        raise ValueError(f"MAX_STEPS={s.MAX_STEPS} must be positive, or 0 to go by EPOCHS")
    if not 0 < s.VAL_FRACTION < 0.5:
        raise ValueError(f"VAL_FRACTION={s.VAL_FRACTION} must be above 0 and below 0.5: the default is {VAL_FRACTION}")
    if s.BLOCK_SIZE < 16:
        raise ValueError(f"BLOCK_SIZE={s.BLOCK_SIZE} leaves no room for a question and an answer: use at least 16")
    # What MAX_STEPS=0 will become is not known yet: the rest is judged as for a run that is long enough.
    _config.validate_config(types.SimpleNamespace(**values | {"MAX_STEPS": s.MAX_STEPS or 10 * s.WARMUP_STEPS + 100}))


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
