"""Pre-train a language model: 125M parameters on a GPU, a few million on a CPU.

    uv run python phase1_foundation/project3_pretrain/train_pretrain.py
    uv run python phase1_foundation/project3_pretrain/train_pretrain.py --model gpt2 --optimizer adamw --schedule cosine
    uv run python -m torch.distributed.run --nproc_per_node 2 phase1_foundation/project3_pretrain/train_pretrain.py

Tokenises the text first if that has not been done, resumes from checkpoints/project3/last.pt when it is there, and
leaves best.pt, last.pt, metrics.jsonl and curves.png behind.
"""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from common import catalog, checkpoint
from common.run import Run
from phase1_foundation.project3_pretrain import config
from phase1_foundation.project3_pretrain.data import TokenDataset
from phase1_foundation.project3_pretrain.evaluation import bits_per_byte, validation_loss
from phase1_foundation.project3_pretrain.hooks import (
    Checkpoint,
    Evaluate,
    ExponentialAverage,
    Progress,
    Sample,
    StopOnRequest,
    plot_metrics,
    rewind_metrics,
)
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.preparation import prepare
from phase1_foundation.project3_pretrain.presets import PRESETS
from phase1_foundation.project3_pretrain.schedules import SCHEDULES
from phase1_foundation.project3_pretrain.trainer import NextToken, Step, fit
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
    model = catalog.apply(build_model(s, tokenizer), s.USE).to(run.device)
    count = sum(p.numel() for p in model.parameters())
    run.print(f"{s.MODEL}: {count / 1e6:.2f}M parameters; {train_set.n_tokens:,} training tokens")
    step = build_step(run, model)
    start, best = resume(run, step, train_set) if s.RESUME else (0, float("inf"))
    if start >= s.MAX_STEPS:
        run.print(f"{s.OUT_DIR}/last.pt has finished its {start} steps: give a larger --max_steps, or --no_resume")
        return None
    if s.COMPILE:
        model.compile()
    sequences = s.BATCH_TOKENS // s.BLOCK_SIZE
    micro = s.MICRO_BATCH or choose_micro_batch(model, sequences // run.world_size, run.device)
    run.print(f"batch of {sequences} x {s.BLOCK_SIZE} tokens, {micro} sequences a forward")
    batches = train_set.batches(s.SEED, sequences, micro, run.rank, run.world_size)
    hooks = build_hooks(run, model, tokenizer, train_set, val_set, start, best)
    state = fit(step, batches, build_schedule(s), hooks, start, s.SEED)
    if run.is_main:
        conclude(run, model, tokenizer, val_set)
    return state


def set_determinism(s):
    """Choose bit-exact algorithms on a GPU, or the fast ones."""
    if s.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest" if s.DETERMINISTIC else "high")


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


def build_model(s, tokenizer):
    """A new model by its preset, or the one of CHECKPOINT."""
    if s.CHECKPOINT:
        return load(s.CHECKPOINT)[0]
    vocab_size = -(-tokenizer.vocab_size // 64) * 64  # a multiple of 64 keeps the head's product on fast tiles
    return Transformer(PRESETS[s.MODEL](vocab_size=vocab_size, block_size=s.BLOCK_SIZE, dropout=s.DROPOUT))


def build_step(run, model):
    """The optimizer step of this run."""
    s = run.settings
    optimizer = build_optimizer(
        model, s.OPTIMIZER, s.LEARNING_RATE, s.WEIGHT_DECAY, (s.BETA1, s.BETA2),
        momentum=s.MOMENTUM, embed_lr=s.EMBED_LEARNING_RATE,
    )  # fmt: skip
    dtype = None if s.DTYPE == "float32" else getattr(torch, s.DTYPE)
    return Step(model, NextToken(), optimizer, s.CLIP, dtype)


def build_schedule(s):
    """The learning-rate schedule of this run."""
    options = {"decay_fraction": s.DECAY_FRACTION} if s.SCHEDULE == "wsd" else {}
    return SCHEDULES[s.SCHEDULE](s.MAX_STEPS, s.WARMUP_STEPS, **options)


def choose_micro_batch(model, sequences, device):
    """The largest divisor of `sequences` whose activations fit the free memory of a GPU (at most 32)."""
    if device.type != "cuda":
        return min(sequences, 32)
    c = model.config
    per_token = 40 * c.n_layer * c.n_embd + 4 * c.vocab_size  # bytes: compiled bf16 activations, and the logits
    states = 16 * sum(p.numel() for p in model.parameters())  # float32 weights, gradients and two moments
    free = 0.8 * torch.cuda.mem_get_info(device)[0] - states
    fits = max(1, min(32, int(free / (per_token * c.block_size))))
    return max(n for n in range(1, fits + 1) if sequences % n == 0)


def resume(run, step, train_set):
    """Continue from OUT_DIR/last.pt where it exists: returns (steps done, best validation loss).

    Raises:
        ValueError: the checkpoint belongs to another model or other data.
    """
    path = Path(run.settings.OUT_DIR) / "last.pt"
    if not path.exists():
        return 0, float("inf")
    old = checkpoint.load(path)
    other = "use another --out_dir, or --no_resume to start anew (last.pt and best.pt there are then overwritten)"
    if old["config"]["model"] != step.model.config.to_dict():
        raise ValueError(f"{path} holds a model of another shape, {old['config']['model']}: {other}")
    if old["data_position"]["tokenizer"] != train_set.fingerprint:
        raise ValueError(f"{path} was trained with another tokenizer than {train_set.path}: {other}")
    step.model.load_state_dict(old["model_state_dict"])
    step.load_state_dict(old["optimizer_state_dict"])
    run.print(f"resuming {path} after step {old['iter']}")
    return old["iter"], old.get("best_val_loss", old["val_loss"])


def build_hooks(run, model, tokenizer, train_set, val_set, start, best):
    """What happens around the steps: stop, averages, evaluation, progress, samples, checkpoints."""
    s = run.settings
    metrics = Path(s.OUT_DIR) / "metrics.jsonl"
    if run.is_main:
        Path(s.OUT_DIR).mkdir(parents=True, exist_ok=True)
        rewind_metrics(metrics, start)
    run.metrics(metrics)

    def describe():
        return {
            "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": s.as_dict()},
            "tokenizer": tokenizer.to_dict(),
            "data_position": {"seed": s.SEED, "tokenizer": train_set.fingerprint, "data": str(train_set.path)},
        }

    def measure():
        return validation_loss(model, val_set, max_tokens=s.EVAL_TOKENS, dtype=autocast_dtype(s))

    return [
        StopOnRequest(run),
        *([ExponentialAverage(model, s.EMA)] if s.EMA else []),
        Evaluate(measure, s.EVAL_EVERY, run),
        Progress(run, s.MAX_STEPS, start, block_size=s.BLOCK_SIZE),
        Sample(lambda: write_sample(model, tokenizer, s), s.SAMPLE_EVERY, run),
        Checkpoint(s.OUT_DIR, describe, s.SAVE_EVERY, best),
    ]


def autocast_dtype(s):
    """The torch type of DTYPE, or None for float32."""
    return None if s.DTYPE == "float32" else getattr(torch, s.DTYPE)


def write_sample(model, tokenizer, s):
    """A sample that begins with PROMPT."""
    return write(model, tokenizer, s.PROMPT, s.SAMPLE_TOKENS, seed=s.SEED)


def conclude(run, model, tokenizer, val_set):
    """Say how good the model became, draw the curves, show a sample."""
    s = run.settings
    bits = bits_per_byte(model, val_set, max_tokens=s.EVAL_TOKENS, dtype=autocast_dtype(s))
    run.print(f"validation: {bits:.4f} bits a byte")
    out = Path(s.OUT_DIR)
    plot_metrics(out / "metrics.jsonl", out / "curves.png", f"Pre-training {s.MODEL}")
    run.print(f"--- sample\n{write_sample(model, tokenizer, s)}\n---")
    run.print(f"wrote {out / 'best.pt'}, last.pt, metrics.jsonl and curves.png")


if __name__ == "__main__":
    main()
