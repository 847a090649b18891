"""Pre-train a language model: 125M parameters on a GPU, a few million on a CPU.

    uv run python phase1_foundation/project3_pretrain/train_pretrain.py
    uv run python phase1_foundation/project3_pretrain/train_pretrain.py --model gpt2 --optimizer adamw --schedule cosine
    uv run python -m torch.distributed.run --nproc_per_node 2 phase1_foundation/project3_pretrain/train_pretrain.py

Tokenises the text first if that has not been done, resumes from checkpoints/project3/last.pt when it is there
(previous.pt when it is not), and leaves best.pt, last.pt, previous.pt, metrics.jsonl and curves.png behind. A run that
diverged says which of the two to go back to: to take previous.pt, delete last.pt and run again with a lower
--learning_rate. --no_resume renames what an earlier run left to *.old and starts anew.
"""

from pathlib import Path

import torch
import torch.distributed as dist

from common import catalog
from common.run import Run
from phase1_foundation.project3_pretrain import config, running
from phase1_foundation.project3_pretrain.data import TokenDataset
from phase1_foundation.project3_pretrain.evaluation import bits_per_byte, validation_loss
from phase1_foundation.project3_pretrain.hooks import plot_metrics
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import Transformer
from phase1_foundation.project3_pretrain.preparation import prepare
from phase1_foundation.project3_pretrain.presets import PRESETS
from phase1_foundation.project3_pretrain.running import (
    autocast_dtype,
    describe,
    files_of,
    set_determinism,
    set_dropout,
)
from phase1_foundation.project3_pretrain.token_file import fingerprint_of
from phase1_foundation.project3_pretrain.trainer import NextToken
from phase1_foundation.project3_pretrain.writing import write


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__) as run:
        train(run)


def train(run):
    """Pre-train as the settings say; returns the final `TrainState`."""
    s = run.settings
    set_determinism(s)
    tokenizer, train_set, val_set = load_data(run)
    model = catalog.apply(build_model(run, train_set), s.USE).to(run.device)
    count = sum(p.numel() for p in model.parameters())
    run.print(f"{s.CHECKPOINT or s.MODEL}: {count / 1e6:.2f}M parameters; {train_set.n_tokens:,} training tokens")
    about = describe(s, model, tokenizer, position_of(train_set))

    def measure():
        return validation_loss(model, val_set, max_tokens=s.EVAL_TOKENS, dtype=autocast_dtype(s))

    state = running.train(run, model, NextToken(), train_set, about, measure, lambda: write_sample(model, tokenizer, s))
    unconcluded = not (Path(s.OUT_DIR) / "curves.png").exists()  # a finished run that was killed while it concluded
    if run.is_main and (state.iter == state.total if state else unconcluded):
        conclude(run, val_set)
    return state


def load_data(run):
    """The tokenizer and the two datasets; the first rank prepares them where they do not exist."""
    s = run.settings
    if run.is_main:
        prepare(s)
    if run.world_size > 1:
        dist.barrier()
    tokenizer = prepare(s, only_load_tokenizer=True)
    sets = [
        TokenDataset(Path(s.DATA_DIR) / name, s.BLOCK_SIZE, tokenizer.fingerprint) for name in ("train.bin", "val.bin")
    ]
    return tokenizer, *sets


def position_of(dataset):
    """What identifies the training data: batches are a function of these, the seed and the step."""
    return {"tokenizer": dataset.fingerprint, "data": str(dataset.path), "digest": dataset.header["digest"]}


def build_model(run, train_set):
    """A new model by its preset, or the one of CHECKPOINT."""
    s = run.settings
    if s.CHECKPOINT:
        return load_initial(run, train_set)
    vocab_size = -(-train_set.vocab_size // 64) * 64  # a multiple of 64 keeps the head's product on fast tiles
    return Transformer(PRESETS[s.MODEL](vocab_size=vocab_size, block_size=s.BLOCK_SIZE, dropout=s.DROPOUT))


def load_initial(run, train_set):
    """The model of CHECKPOINT in float32, with this run's dropout; its shape is its own.

    Raises:
        ValueError: it was made for other tokens than `train_set` holds, or for shorter texts.
    """
    s = run.settings
    model, tokenizer = load(s.CHECKPOINT, dtype=torch.float32)
    if tokenizer is not None and fingerprint_of(tokenizer) != train_set.fingerprint:
        raise ValueError(
            f"CHECKPOINT={s.CHECKPOINT} has another tokenizer than the tokens of {train_set.path}: prepare the text "
            f"with its tokenizer (--tokenizer, and a --data_dir of its own), or train a new model without --checkpoint"
        )
    shape = model.config
    if shape.vocab_size < train_set.vocab_size:
        raise ValueError(
            f"CHECKPOINT={s.CHECKPOINT} knows vocab_size={shape.vocab_size} tokens, the tokens of {train_set.path} are "
            f"{train_set.vocab_size}: prepare the text with its tokenizer (--tokenizer, and a --data_dir of its own)"
        )
    if shape.block_size < s.BLOCK_SIZE:
        raise ValueError(
            f"BLOCK_SIZE={s.BLOCK_SIZE} exceeds the block_size={shape.block_size} of CHECKPOINT={s.CHECKPOINT}: "
            f"use --block_size {shape.block_size}"
        )
    set_dropout(model, s.DROPOUT)
    run.print(f"initial weights from {s.CHECKPOINT}; MODEL={s.MODEL} is ignored, DROPOUT={s.DROPOUT} applies; "
              f"windows of {s.BLOCK_SIZE} of its {shape.block_size} tokens")  # fmt: skip
    return model


def write_sample(model, tokenizer, s):
    """A sample that begins with PROMPT."""
    return write(model, tokenizer, s.PROMPT, s.SAMPLE_TOKENS, seed=s.SEED)


def conclude(run, val_set):
    """Say how good the best model became, draw the curves, show a sample."""
    s, out = run.settings, Path(run.settings.OUT_DIR)
    model, tokenizer = load(out / "best.pt", run.device)
    bits = bits_per_byte(model, val_set, max_tokens=s.EVAL_TOKENS, dtype=autocast_dtype(s))
    run.print(f"validation: {bits:.4f} bits a byte")
    plot_metrics(out / "metrics.jsonl", out / "curves.png", f"Pre-training {s.CHECKPOINT or s.MODEL}")
    run.print(f"--- sample\n{write_sample(model, tokenizer, s)}\n---")
    run.print(f"wrote {', '.join(files_of(out))} in {out}")


if __name__ == "__main__":
    main()
