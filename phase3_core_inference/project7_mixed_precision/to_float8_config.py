"""Constants of to_float8.py."""

import os
import sys

from common import CHECKPOINTS
from common import settings as common_settings
from phase1_foundation.project3_pretrain.loading import newest_checkpoint

TRAINED = ("project3", "project4", "project5", "project6", "speedrun")  # below checkpoints/

# == Conversion ==
CHECKPOINT: str | None = None  # a checkpoint, a Hugging Face folder or org/name; none: the newest of projects 3 to 6
STORED = str(CHECKPOINTS / "project7" / "float8.pt")  # where the model with weights of one byte is written
SKIP: list[str] = []  # layers that stay as they are, by parts of their names: blocks.0, down_proj ...


def validate_config(settings=None):
    """Refuse what cannot work."""
    s = settings or sys.modules[__name__]
    if not s.STORED.endswith(".pt"):
        raise ValueError(f"STORED={s.STORED} must be the name of a checkpoint: let it end with .pt")
    source = source_of(s)
    if source and os.path.abspath(s.STORED) == os.path.abspath(source):
        raise ValueError(f"STORED={s.STORED} would replace CHECKPOINT: choose another name")


def source_of(settings):
    """What is converted: CHECKPOINT, or the newest file of the projects that train; None where there is none."""
    given = settings.CHECKPOINT
    if given:
        return (newest_checkpoint(given) if os.path.isdir(given) else None) or given
    found = filter(None, (newest_checkpoint(CHECKPOINTS / folder) for folder in TRAINED))
    return max(found, key=os.path.getmtime, default=None)


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
