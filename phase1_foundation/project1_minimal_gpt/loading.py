"""From a checkpoint of this project back to a model and its tokenizer."""

from pathlib import Path

import torch

from common import checkpoint
from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project1_minimal_gpt.model import GPT, GPTConfig

TRAIN_COMMAND = "uv run python phase1_foundation/project1_minimal_gpt/train.py"


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, CharTokenizer, dict]:
    """Read a checkpoint: returns the model in eval mode, its tokenizer, and the whole checkpoint.

    Raises:
        FileNotFoundError: there is none; the message names the command that makes one.
        CheckpointError: the file is damaged or not of this project.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: make one with `{TRAIN_COMMAND}`")
    saved = checkpoint.load(path)
    kind = (saved.get("config") or {}).get("kind")
    if kind != "minimal_gpt":
        raise checkpoint.CheckpointError(
            f"{path} holds a model of kind {kind!r}, not project 1's minimal_gpt: make one with `{TRAIN_COMMAND}`"
        )
    model = GPT(GPTConfig(**saved["config"]["model"]))
    try:
        model.load_state_dict(saved["model_state_dict"])
    except RuntimeError as error:
        raise checkpoint.CheckpointError(f"the weights in {path} do not fit its own config: {error}") from error
    return model.to(device).eval(), CharTokenizer.from_dict(saved["tokenizer"]), saved
