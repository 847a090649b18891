"""Constants of project 3: pre-training a GPT-2-sized model on a GPU, a small one on a CPU.

Every constant is a flag of the scripts (``--max_steps 500``). The defaults look at the device: the 125M recipe needs a
GPU; on a CPU a model of a few million parameters learns in minutes.
"""

import importlib.util
import math
import os
import sys

from common import catalog
from common import settings as common_settings
from common.device import pick_device

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# == System ==
DEVICE = pick_device()  # cuda, mps or cpu
_GPU = DEVICE == "cuda"
_TRITON = importlib.util.find_spec("triton") is not None  # not on Windows
SEED = 1337  # of initialisation, batches and dropout
DTYPE = "bfloat16" if _GPU else "float32"  # of forward and backward; with master_ before it, of the weights, too
COMPILE = _GPU  # compile the model with torch.compile
DETERMINISTIC = False  # bit-exact on a GPU, too; slower
USE: list[str] = (["cudnn", "fused_loss"] if _TRITON else ["cudnn"]) if _GPU else []  # transforms from the catalog
OUT_DIR = os.path.join(_ROOT, "checkpoints", "project3")  # checkpoints, metrics.jsonl and curves
RESUME = True  # continue from OUT_DIR/last.pt when it is there
CHECKPOINT: str | None = None  # initial weights: a checkpoint, a Hugging Face folder or org/name

# == Model ==
MODEL = "llama-125m" if _GPU else "cpu-small"  # a name from presets.py
BLOCK_SIZE = 1024 if _GPU else 128  # tokens of context
DROPOUT = 0.0  # in attention, MLP and embeddings

# == Training ==
MAX_STEPS = 1000 if _GPU else 500  # optimizer steps
BATCH_TOKENS = 491_520 if _GPU else 2048  # tokens of one optimizer step, over all micro batches and ranks
MICRO_BATCH = 0  # sequences of one forward; 0 chooses the largest that fits the free memory
OPTIMIZER = "muon"  # muon (hidden matrices; AdamW for the rest) or adamw
LEARNING_RATE = 3e-3 if _GPU else 6e-3  # peak, of hidden matrices and vectors
EMBED_LEARNING_RATE: float | None = 3e-3 if _GPU else 6e-3  # peak, of embeddings and head; none: LEARNING_RATE
WEIGHT_DECAY = 0.1  # decoupled, on matrices alone
BETA1 = 0.9  # AdamW: memory of the gradient
BETA2 = 0.95  # AdamW: memory of its square
MOMENTUM = 0.95  # Muon
CLIP = 1.0  # largest gradient norm; 0 turns clipping off
SCHEDULE = "wsd"  # wsd (warm-up, stable, decay) or cosine
WARMUP_STEPS = 50 if _GPU else 30  # linear warm-up
DECAY_FRACTION = 0.4 if _GPU else 0.6  # wsd: last part of the steps, in which the rate falls to zero
EMA = 0.0  # decay of an exponential average of the weights; 0 keeps none

# == Evaluation ==
EVAL_EVERY = 125 if _GPU else 100  # steps between two validations
EVAL_TOKENS = 2_097_152 if _GPU else 65_536  # validation tokens of one evaluation
SAVE_EVERY = 250 if _GPU else 100  # steps between two writes of last.pt
SAMPLE_EVERY = 0  # steps between two samples; 0: only at the end
SAMPLE_TOKENS = 96  # length of a sample
PROMPT = "The "  # how samples begin

# == Data ==
SIZE = "small"  # download_data.py: small, medium or large
SOURCE = "fineweb"  # download_data.py: fineweb, wikipedia or wikitext
NO_FALLBACK = False  # download_data.py: fail instead of taking the bundled sample
TRAIN_DATA_PATH = os.path.join(_ROOT, "data", "pretrain_train.txt")  # text files: commas between, or a pattern
DATA_DIR = os.path.join(_ROOT, "data", "pretrain")  # tokenised data: train.bin, val.bin
TOKENIZER = "gpt2" if _GPU else os.path.join(_ROOT, "checkpoints", "project3", "tokenizer.pkl")  # gpt2, .pkl or .json
VOCAB_SIZE = 50257 if _GPU else 4096  # of a tokenizer that has to be trained first
NUM_SPECIAL_TOKENS = 1  # <|endoftext|>
VAL_DATA_PATH: str | None = None  # a held-out text of its own; none: VAL_FRACTION of the documents
VAL_FRACTION = 0.02  # part of the documents held out
NUM_WORKERS = os.cpu_count() or 1  # threads of tokenisation


# Numbers and what they must be; nan passes none of the tests.
_RULES = (
    (("MAX_STEPS", "BATCH_TOKENS", "BLOCK_SIZE", "EVAL_EVERY", "EVAL_TOKENS", "SAVE_EVERY", "NUM_WORKERS"),
     "at least 1", lambda value: value >= 1),
    (("LEARNING_RATE",), "above 0 and finite", lambda value: 0 < value < math.inf),
    (("EMBED_LEARNING_RATE", "WEIGHT_DECAY"), "at least 0 and finite", lambda value: 0 <= value < math.inf),
    (("CLIP", "WARMUP_STEPS", "MICRO_BATCH", "SAMPLE_EVERY", "SAMPLE_TOKENS"), "at least 0", lambda value: value >= 0),
    (("DROPOUT", "EMA", "BETA1", "BETA2", "MOMENTUM"), "at least 0 and below 1", lambda value: 0 <= value < 1),
    (("VAL_FRACTION",), "at least 0 and below 0.5", lambda value: 0 <= value < 0.5),
    (("DECAY_FRACTION",), "above 0 and at most 1", lambda value: 0 < value <= 1),
)  # fmt: skip


def validate_config(settings=None):
    """Refuse combinations that cannot work.

    Raises:
        ValueError: names the constants, their values and the remedy.
    """
    from phase1_foundation.project3_pretrain.presets import PRESETS

    s = settings or sys.modules[__name__]
    _one_of(s, "MODEL", PRESETS)
    _one_of(s, "OPTIMIZER", ("muon", "adamw"))
    _one_of(s, "SCHEDULE", ("wsd", "cosine"))
    _one_of(s, "DTYPE", catalog.GROUPS["steps"])
    for names, words, holds in _RULES:
        for name in names:
            value, default = getattr(s, name), getattr(sys.modules[__name__], name)
            if value is not None and not holds(value):
                raise ValueError(f"{name}={value} must be {words}: the default is {default}")
    if s.EMA and s.DTYPE.startswith("master_"):
        raise ValueError(
            f"EMA={s.EMA} averages the model's weights, of which DTYPE={s.DTYPE} keeps rounded ones: use EMA=0, or "
            f"DTYPE={s.DTYPE.removeprefix('master_')}"
        )
    _validate_batch(s)
    _validate_schedule(s)
    if s.VOCAB_SIZE - s.NUM_SPECIAL_TOKENS < 256:
        raise ValueError(
            f"VOCAB_SIZE={s.VOCAB_SIZE} must be at least 256 (one token a byte) plus "
            f"NUM_SPECIAL_TOKENS={s.NUM_SPECIAL_TOKENS}: use VOCAB_SIZE={256 + s.NUM_SPECIAL_TOKENS} or more"
        )


def _validate_batch(s):
    """Refuse a step that is no whole number of sequences on every process of this run."""
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by torch.distributed.run
    unit = s.BLOCK_SIZE * processes
    if s.BATCH_TOKENS % unit:
        shared = f", shared by {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"BATCH_TOKENS={s.BATCH_TOKENS} must be a multiple of BLOCK_SIZE={s.BLOCK_SIZE}{shared}: "
            f"use BATCH_TOKENS={max(1, round(s.BATCH_TOKENS / unit)) * unit}"
        )


def _validate_schedule(s):
    """Refuse a warm-up that is longer than the run or reaches into the decay."""
    if s.WARMUP_STEPS >= s.MAX_STEPS:
        raise ValueError(
            f"WARMUP_STEPS={s.WARMUP_STEPS} must be below MAX_STEPS={s.MAX_STEPS}: use WARMUP_STEPS={s.MAX_STEPS // 20}"
        )
    left = s.MAX_STEPS - int(s.DECAY_FRACTION * s.MAX_STEPS)
    if s.SCHEDULE == "wsd" and left < s.WARMUP_STEPS:
        raise ValueError(
            f"WARMUP_STEPS={s.WARMUP_STEPS} must end before the decay begins: DECAY_FRACTION={s.DECAY_FRACTION} of "
            f"MAX_STEPS={s.MAX_STEPS} leaves {left} steps: use WARMUP_STEPS={left // 2}, or a smaller DECAY_FRACTION"
        )


def _one_of(settings, name, known):
    """Raise unless the constant's value is among the known ones."""
    if getattr(settings, name) not in known:
        raise ValueError(f"{name}={getattr(settings, name)} is unknown: use one of {', '.join(known)}")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])
