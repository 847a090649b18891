"""Constants of merge.py."""

import os
import sys

from common import CHECKPOINTS
from common import settings as common_settings
from phase1_foundation.project3_pretrain.loading import newest_checkpoint

# == Merge ==
CHECKPOINT = str(CHECKPOINTS / "project5" / "best.pt")  # a model with adapters, or the base of ADAPTER
ADAPTER: str | None = None  # a PEFT folder, or org/name: merged into the plain model of CHECKPOINT
MERGED = str(CHECKPOINTS / "project5" / "merged.pt")  # where the plain model is written


def validate_config(settings=None):
    """Refuse what cannot work."""
    s = settings or sys.modules[__name__]
    if not s.MERGED.endswith(".pt"):
        raise ValueError(f"MERGED={s.MERGED} must be the name of a checkpoint: let it end with .pt")
    source = newest_checkpoint(s.CHECKPOINT) if os.path.isdir(s.CHECKPOINT) else s.CHECKPOINT
    if os.path.abspath(s.MERGED) == os.path.abspath(source or s.CHECKPOINT):
        raise ValueError(f"MERGED={s.MERGED} would replace CHECKPOINT: choose another name")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
