"""Constants of project 1: a character-level GPT.

Every constant is a flag of the scripts (``--n_embd 256``). The defaults look at the device: a GPU trains the model of
nanoGPT's Shakespeare lesson; a CPU trains a small one, in minutes on two cores.
"""

import os
import sys

from common import settings as common_settings
from common.device import pick_device

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# == System ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
SEED = 1337  # of initialisation, batches, dropout and sampling
DTYPE = "bfloat16" if _GPU else "float32"  # autocast type of forward and backward; weights stay float32
COMPILE = _GPU  # compile the model with torch.compile
OUT_DIR = os.path.join(_ROOT, "checkpoints", "project1")  # best.pt, last.pt, metrics.jsonl and curves.png

# == Model ==
BLOCK_SIZE = 256 if _GPU else 64  # characters of context
N_LAYER = 6 if _GPU else 4  # blocks
N_HEAD = 6 if _GPU else 4  # attention heads of a block
N_EMBD = 384 if _GPU else 128  # width of the residual stream
DROPOUT = 0.3 if _GPU else 0.0  # share of activations dropped; the small model hardly sees a text twice
BIAS = True  # biases in linear layers and LayerNorms, as in GPT-2
TIE_HEAD = True  # the output layer multiplies by the token embedding
ATTENTION = "fast"  # fast: PyTorch's fused kernel; explicit: the formula, step by step
GELU = "tanh" if _GPU else "exact"  # tanh: GPT-2's approximation; exact: the definition, faster on a CPU
INIT_STD = 0.02 if _GPU else 0.08  # standard deviation of initial weights; GPT-2's 0.02 suits widths of several hundred

# == Training ==
MAX_ITERS = 3500 if _GPU else 1600  # optimizer steps
BATCH_SIZE = 64 if _GPU else 16  # sequences of one step
LEARNING_RATE = 2e-3 if _GPU else 6e-3  # peak
MIN_LEARNING_RATE = 0.0  # where the cosine ends
WARMUP_ITERS = 100  # steps of linear warm-up
WEIGHT_DECAY = 1.0 if _GPU else 0.1  # decoupled, on matrices and embeddings alone
BETA1 = 0.9  # AdamW: memory of the gradient
BETA2 = 0.99  # AdamW: memory of its square
CLIP = 1.0  # largest gradient norm; 0 turns clipping off
EVAL_EVERY = 250 if _GPU else 200  # steps between two validations
EVAL_WINDOWS = 400  # validation windows of one of them; the end of the run takes all
LOG_EVERY = 50 if _GPU else 10  # steps between two looks at the training loss
RESUME = False  # continue from OUT_DIR/last.pt

# == Sampling ==
PROMPT = "ROMEO:"  # how the text begins
MAX_NEW_TOKENS = 300  # characters to generate
TEMPERATURE = 0.8  # below 1: more careful; 0: always the most likely character
TOP_K: int | None = 50  # keep only the k most likely characters; none: all
TOP_P: float | None = None  # keep only the most likely characters that together reach this probability; none: all

# == Generation ==
CHECKPOINT = os.path.join(OUT_DIR, "best.pt")  # the model to load
NUM_SAMPLES = 1  # texts to generate
INTERACTIVE = False  # ask for prompts until an empty line

# == Data ==
TRAIN_DATA_PATH = os.path.join(_ROOT, "data", "shakespeare.txt")  # UTF-8 text; tiny Shakespeare is bundled
VAL_FRACTION = 0.1  # the end of the text, held out for validation

# == Download ==
SIZE = "small"  # small, medium or large; tiny Shakespeare has one size
SOURCE = "shakespeare"  # shakespeare, wikitext or wikipedia
NO_FALLBACK = False  # fail instead of taking the bundled sample when the hub cannot be reached


def validate_config(settings=None):
    """Refuse combinations that cannot work.

    Raises:
        ValueError: names the constants, their values and the remedy.
    """
    s = settings or sys.modules[__name__]
    for name in ("BLOCK_SIZE", "N_LAYER", "N_HEAD", "N_EMBD", "MAX_ITERS", "BATCH_SIZE", "LEARNING_RATE", "INIT_STD",
                 "EVAL_EVERY", "EVAL_WINDOWS", "LOG_EVERY", "NUM_SAMPLES"):  # fmt: skip
        if not getattr(s, name) > 0:
            raise ValueError(f"{name}={getattr(s, name)} must be positive")
    for name in ("MIN_LEARNING_RATE", "WEIGHT_DECAY", "CLIP", "WARMUP_ITERS", "MAX_NEW_TOKENS", "SEED"):
        if not getattr(s, name) >= 0:
            raise ValueError(f"{name}={getattr(s, name)} must not be negative")
    for name in ("DROPOUT", "BETA1", "BETA2"):
        if not 0 <= getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 0 and below 1")
    if s.N_EMBD % s.N_HEAD:
        low = max(1, s.N_EMBD // s.N_HEAD) * s.N_HEAD
        raise ValueError(f"N_EMBD={s.N_EMBD} must be divisible by N_HEAD={s.N_HEAD}: use {low} or {low + s.N_HEAD}")
    if s.WARMUP_ITERS >= s.MAX_ITERS:
        raise ValueError(
            f"WARMUP_ITERS={s.WARMUP_ITERS} must be below MAX_ITERS={s.MAX_ITERS}: use WARMUP_ITERS={s.MAX_ITERS // 20}"
        )
    if s.MIN_LEARNING_RATE > s.LEARNING_RATE:
        raise ValueError(
            f"MIN_LEARNING_RATE={s.MIN_LEARNING_RATE} must not exceed LEARNING_RATE={s.LEARNING_RATE}: "
            f"use MIN_LEARNING_RATE={s.LEARNING_RATE / 10:g}"
        )
    if not 0 < s.VAL_FRACTION < 1:
        raise ValueError(f"VAL_FRACTION={s.VAL_FRACTION} must lie between 0 and 1: use 0.1")
    _one_of(s, "DTYPE", ("float32", "bfloat16"))
    _one_of(s, "ATTENTION", ("fast", "explicit"))
    _one_of(s, "GELU", ("tanh", "exact"))
    _one_of(s, "SIZE", ("small", "medium", "large"))
    _one_of(s, "SOURCE", ("shakespeare", "wikitext", "wikipedia"))
    _check_sampling(s)


def _check_sampling(s):
    """Raise for values that leave no distribution to draw from."""
    if not 0 <= s.TEMPERATURE < float("inf"):
        raise ValueError(f"TEMPERATURE={s.TEMPERATURE} must be a number of at least 0: use 0.8, or 0 for greedy")
    if s.TOP_K is not None and s.TOP_K < 1:
        raise ValueError(f"TOP_K={s.TOP_K} must be at least 1: use 50, or none to keep all characters")
    if s.TOP_P is not None and not 0 < s.TOP_P <= 1:
        raise ValueError(f"TOP_P={s.TOP_P} must be above 0 and at most 1: use 0.9, or none to keep all characters")


def _one_of(settings, name, known):
    """Raise unless the constant's value is among the known ones."""
    if getattr(settings, name) not in known:
        raise ValueError(f"{name}={getattr(settings, name)} is unknown: use one of {', '.join(known)}")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
