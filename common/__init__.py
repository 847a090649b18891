"""The ground floor: what every project needs and no paper describes.

Shape letters used in comments throughout the roadmap::

    B  batch (sequences)      H    query heads         V  vocabulary
    T  time (tokens)          Hkv  key/value heads     L  layers
    C  channels (n_embd)      D    head size           N  tokens of a ragged batch, flattened
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # every command runs from here
DATA = ROOT / "data"
CHECKPOINTS = ROOT / "checkpoints"
RESULTS = ROOT / "results"
MODELS = ROOT / "models"
