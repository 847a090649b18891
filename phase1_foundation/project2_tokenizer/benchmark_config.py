"""Constants of project 2's benchmark: those of project 2, and how to measure."""

import os
import sys

from common import settings as common_settings
from phase1_foundation.project2_tokenizer import config as _config

BASE_CONFIG = _config

# == Benchmark ==
CORPUS: str | None = (
    None  # text to measure on, .txt or .jsonl; none: data/wikipedia_train.txt if large, else the sample
)
TRAIN_BYTES = 100_000_000  # bytes of it to train on
TRAIN_VOCAB_SIZE = 32_000  # ids of the trained vocabulary
ENCODE_BYTES = 12_000_000  # bytes to encode, behind those trained on where there are so many
REPEATS = 5  # timed rounds of encoding, ours and peers in turn
TRAIN_REPEATS = 2  # timed rounds of training
THREADS = 2  # threads of training and of encoding in batches
GIGABYTE = False  # also train on a gigabyte and measure memory (a minute, a gigabyte of disk)
OUT_DIR: str | None = None  # where results go; none: results/


def validate_config(settings=None):
    """Refuse combinations that cannot work; raises ValueError with the remedy."""
    s = settings or sys.modules[__name__]
    _config.validate_config(settings)
    for name in ("TRAIN_BYTES", "ENCODE_BYTES", "REPEATS", "TRAIN_REPEATS", "THREADS"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1")
    if s.TRAIN_VOCAB_SIZE < 257:
        raise ValueError(f"TRAIN_VOCAB_SIZE={s.TRAIN_VOCAB_SIZE} must be at least 257: 256 bytes and a special token")
    if s.CORPUS is not None and not os.path.isfile(s.CORPUS):
        raise ValueError(f"CORPUS={s.CORPUS} does not exist: give a .txt or .jsonl file")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
