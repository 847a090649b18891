"""Constants of project 9: which tiles show_tiles.py draws, and whose memory it counts."""

import os
import sys

from common import settings as common_settings

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# == Tiles ==
LENGTH = 32  # tokens of the row that is drawn
QUERIES = 4  # queries of a tile
KEYS = 4  # keys of a tile
WINDOW: int | None = None  # keys that a query sees, itself among them; none: all before it
DOCUMENTS: list[int] = []  # lengths of documents packed into the row; they must add up to LENGTH
CAUSAL = True  # a query sees no key after it

# == Memory ==
LENGTHS: list[int] = [256, 512, 1024, 2048]  # rows whose memory is counted
HEADS = 2  # query heads of these rows
HEAD_SIZE = 64  # of each head
TILE = 128  # queries and keys of a tile of these rows

# == System ==
SEED = 0  # of queries, keys and values
OUT_DIR = os.path.join(_ROOT, "checkpoints", "project9")  # where memory.png is written


def validate_config(settings=None):
    """Refuse combinations that cannot work."""
    s = settings or sys.modules[__name__]
    for name in ("LENGTH", "QUERIES", "KEYS", "HEADS", "HEAD_SIZE", "TILE"):
        if getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1: see the default in config.py")
    if s.WINDOW is not None and s.WINDOW < 1:
        raise ValueError(f"WINDOW={s.WINDOW} must be at least 1: a query sees itself; leave it out for all keys")
    if s.DOCUMENTS and (min(s.DOCUMENTS) < 1 or sum(s.DOCUMENTS) != s.LENGTH):
        raise ValueError(f"DOCUMENTS={s.DOCUMENTS} must be positive and add up to LENGTH={s.LENGTH}: change the last")
    if s.LENGTH > 1024:
        raise ValueError(f"LENGTH={s.LENGTH} is too long for a drawing: use at most 1024")
    if not s.LENGTHS or min(s.LENGTHS) < 1:
        raise ValueError(f"LENGTHS={s.LENGTHS} must be positive numbers: use 256 512 1024")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
