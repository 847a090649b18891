"""
Loading

This file implements the one way to load a model, whatever it was saved as; the models follow:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - GPT-2, and project 1's minimal GPT
- "LLaMA: Open and Efficient Foundation Language Models" (Touvron et al., 2023) - Llama and its relatives

Each component is explained with paper references for educational purposes.
"""

from pathlib import Path

import torch
from torch import Tensor

from common import CHECKPOINTS, MODELS, catalog, checkpoint
from common.checkpoint import CheckpointError
from common.device import check_device
from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain.hub import from_huggingface
from phase1_foundation.project3_pretrain.hub_tokenizer import ForeignTokenizer
from phase1_foundation.project3_pretrain.model import ModelConfig, Transformer

# checkpoint["tokenizer"]["kind"] -> from_dict
TOKENIZERS = {"char": CharTokenizer, "bpe": BPETokenizer, "foreign": ForeignTokenizer}

# Project 1's names -> ours; what is not listed is called the same.
MINIMAL_GPT_NAMES = {
    "token_embedding.weight": "embed.tokens.weight",
    "position_embedding.weight": "embed.positions.weight",
}
MINIMAL_GPT_MLPS = {"tanh": "gelu", "exact": "gelu_exact"}


def load(path=None, device="cpu", dtype: torch.dtype | None = None):
    """Load a model from anywhere: (model in eval mode, tokenizer).

    PAPER: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3 (the shape alone).
    PAPER CONTEXT: weights mean nothing without the architecture, the tokenizer, and what was done to the model since.
    INTUITION: rebuild the empty house from its plan, with every extension in order; then carry the furniture in.
    IMPLEMENTATION: build on `meta`, replay the recipe through the catalog, then read the weights into place.
    WHY: every script's `--checkpoint` comes through here, so whatever one project makes all others can use.

    Args:
        path: a .pt checkpoint, a folder of them (the newest), a Hugging Face folder, or ``org/name``; None: the bundled
            model in models/, else the newest checkpoint in checkpoints/.
        device, dtype: where the weights go, and as what (None: as stored).

    Raises FileNotFoundError if nothing is there, CheckpointError or ValueError (naming the file) if it does not fit,
    ValueError for a device that is not there.
    """
    source = default_source() if path is None else path
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        source = newest_checkpoint(source) or source
    if Path(source).is_file() or Path(source).suffix == ".pt":
        return load_checkpoint(source, device, dtype)
    return from_huggingface(source, device, dtype)


def default_source() -> Path:
    """The bundled model, or the newest checkpoint; raises FileNotFoundError that tells how to make one."""
    bundled = [
        path.parent for path in (MODELS / "config.json", *sorted(MODELS.glob("*/config.json"))) if path.is_file()
    ]
    found = bundled[0] if bundled else newest_checkpoint(CHECKPOINTS)
    if found is None:
        raise FileNotFoundError(
            f"there is no model yet, neither in {MODELS} nor in {CHECKPOINTS}: train one with "
            f"`uv run python phase1_foundation/project3_pretrain/train_pretrain.py`, or pass --checkpoint org/name"
        )
    return found


def newest_checkpoint(folder) -> Path | None:
    """The best.pt of the run below `folder` that wrote last, or the .pt file itself where there is none beside it."""
    newest = max(Path(folder).rglob("*.pt"), key=lambda path: path.stat().st_mtime, default=None)
    best = newest.with_name("best.pt") if newest else None
    return best if best and best.is_file() else newest


def load_checkpoint(path, device="cpu", dtype: torch.dtype | None = None):
    """Load one of our .pt files: (model in eval mode, tokenizer or None)."""
    device = check_device(device)
    saved = checkpoint.load(path)
    try:
        check_weights(saved["model_state_dict"])
        with torch.device("meta"):
            model, state = catalog.resolve("architectures", (saved.get("config") or {})["kind"])(saved)
            model = catalog.apply(model, saved.get("recipe") or [])
        fill(model, state, device, dtype)
        tokenizer = read_tokenizer(saved.get("tokenizer"))
    except torch.OutOfMemoryError:  # the device's fault, not the file's
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path} holds no model that can be rebuilt: {reason}") from error
    return model.eval(), tokenizer


def check_weights(state) -> None:
    """Raise ValueError unless `state` maps names to tensors."""
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"model_state_dict is {state!r:.60}, not a dict of tensors")


def fill(model: torch.nn.Module, state: dict[str, Tensor], device, dtype: torch.dtype | None) -> None:
    """Turn a model on `meta` into one on `device` with the weights in `state`.

    Raises RuntimeError naming missing, unexpected or misshapen tensors.
    """
    # Still on meta, nothing is copied: the parameters take on the dtypes that were stored.
    model.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, assign=True)
    model.to(dtype).to_empty(device=device)  # tables that are not saved (RoPE) compute themselves on leaving meta
    model.load_state_dict(state)


def read_tokenizer(values: dict | None):
    """The tokenizer that a checkpoint holds as a plain dict, or None."""
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ValueError(f"tokenizer is {values!r:.60}, not a dict with its kind")
    if values.get("kind") not in list(TOKENIZERS):
        raise ValueError(f"the tokenizer kind {values.get('kind')!r} is unknown: known are {', '.join(TOKENIZERS)}")
    return TOKENIZERS[values["kind"]].from_dict(values)


def build_transformer(saved: dict) -> tuple[Transformer, dict[str, Tensor]]:
    """The architecture "transformer": the model as it was constructed, before its recipe, and its weights."""
    return Transformer(ModelConfig.from_dict(saved["config"]["model"])), saved["model_state_dict"]


def build_minimal_gpt(saved: dict) -> tuple[Transformer, dict[str, Tensor]]:
    """The architecture "minimal_gpt": project 1's GPT as a Transformer, and its weights under our names."""
    shape = saved["config"]["model"]
    bias = shape["bias"]
    config = ModelConfig(
        **{
            name: shape[name]
            for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "tie_head")
        },
        mlp=MINIMAL_GPT_MLPS[shape["gelu"]],
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm_bias=bias,
    )
    state = {}
    for name, tensor in saved["model_state_dict"].items():
        if ".qkv_proj." in name:  # rows: all of q, all of k, all of v
            parts = zip("qkv", tensor.chunk(3), strict=True)
            state |= {name.replace("qkv_proj", f"{letter}_proj"): part.contiguous() for letter, part in parts}
        else:
            state[MINIMAL_GPT_NAMES.get(name, name)] = tensor
    return Transformer(config), state


def from_minimal_gpt(saved: dict, device="cpu", dtype: torch.dtype | None = None) -> Transformer:
    """A checkpoint of project 1 (the dict) as a `Transformer` that computes the same logits, in eval mode.

    PAPER: "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3.
    PAPER CONTEXT: both models are this architecture, in other words.
    INTUITION: the same song in another notation.
    IMPLEMENTATION: two names change, and the rows of `qkv_proj` become `q_proj`, `k_proj` and `v_proj`.
    WHY: what a reader trained on the first day works on every later floor.
    """
    with torch.device("meta"):
        model, state = build_minimal_gpt(saved)
    fill(model, state, device, dtype)
    return model.eval()
