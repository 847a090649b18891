"""Show where gradients lie, what float16 and float8 lose of them, and what that does to a training.

    uv run python phase3_core_inference/project7_mixed_precision/show_underflow.py
    uv run python phase3_core_inference/project7_mixed_precision/show_underflow.py --step_tokens 1024 --scale 256

A small model learns the bundled text byte by byte three times on the same batches: in float32, in float16 as it is, and
in float16 with a scaled loss. After the first, the gradients of one batch are collected. The loss is divided by the
tokens of a whole optimizer step on a GPU (--step_tokens), of which this batch is one part of many: so small are the
gradients that each part sees.
"""

import numpy as np
import torch

from common.plots import curves
from common.run import Run
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.trainer import NextToken, Step, fit
from phase3_core_inference.project7_mixed_precision import config
from phase3_core_inference.project7_mixed_precision.formats import FORMATS
from phase3_core_inference.project7_mixed_precision.loss_scaling import LossScaler, ScaledStep
from phase3_core_inference.project7_mixed_precision.underflow import GradientRecorder, histogram, losses_of_formats

WARMUP = 10  # steps


class _Part:
    """Windows of a text as bytes, a pure function of the step; counted as a part of a larger step."""

    def __init__(self, s):
        self.text = torch.from_numpy(np.fromfile(s.TEXT, dtype=np.uint8).astype(np.int64))
        self.shape, self.seed = (s.ROWS, s.BLOCK_SIZE + 1), s.SEED

    def __getitem__(self, step):
        """One micro batch (tokens, targets)."""
        generator = torch.Generator().manual_seed(self.seed * 10_000 + step)
        starts = torch.randint(0, len(self.text) - self.shape[1], (self.shape[0], 1), generator=generator)
        rows = self.text[starts + torch.arange(self.shape[1])]  # (B, T + 1)
        return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())]


class _OfAWholeStep(NextToken):
    """The objective whose count is that of the whole step."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def count(self, batch):
        """Tokens of the whole step."""
        return self.tokens


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__) as run:
        s = run.settings
        batches = _Part(s)
        plain = build(run, Step, dtype=None)
        losses = {"float32": train(run, "float32", plain, batches)}
        tensors = collect(plain, batches)
        report_gradients(run, tensors)
        for name, scaler in {
            "float16": LossScaler(1.0, interval=10**9),
            "float16, scaled": LossScaler(s.SCALE),
        }.items():
            losses[name] = train(run, name, build(run, ScaledStep, dtype=torch.float16, scaler=scaler), batches)
        run.print(f"bits a byte, mean of the last steps: {'; '.join(f'{n} {v:.3f}' for n, v in losses.items())}")
        draw(run, tensors)


def build(run, kind, **options):
    """A fresh model with the step that trains it; the same weights every time."""
    s = run.settings
    torch.manual_seed(s.SEED)
    model = Transformer(PRESETS[s.MODEL](vocab_size=256, block_size=s.BLOCK_SIZE)).to(run.device)
    optimizer = build_optimizer(model, "adamw", s.LEARNING_RATE, 0.1)
    return kind(model, _OfAWholeStep(s.STEP_TOKENS), optimizer, None, **options)


def train(run, name, step, batches):
    """Train for STEPS; returns the mean of the last fifth of the losses, in bits a byte."""
    s = run.settings
    part = s.ROWS * s.BLOCK_SIZE / s.STEP_TOKENS  # of the step's tokens: what the loss was divided by too much
    losses, skipped = [], []

    def remember(state):
        losses.append(state.train_loss / part / np.log(2))
        skipped.append(not np.isfinite(state.grad_norm))

    fit(step, batches, [min(1.0, (i + 1) / WARMUP) for i in range(s.STEPS)], [remember], seed=s.SEED)
    last = float(np.mean(losses[-max(1, s.STEPS // 5) :]))
    run.print(f"{name:<16} {losses[0]:.3f} -> {last:.3f} bits a byte; {sum(skipped)} of {s.STEPS} steps left out")
    return last


def collect(step, batches):
    """The gradients of the linear layers' outputs, of one batch after the training."""
    with GradientRecorder(step.model) as recorder:
        step.backward(batches[10**6], step.objective.tokens)
    return recorder.tensors


def report_gradients(run, tensors):
    """Print what each format would lose."""
    s = run.settings
    total = sum(tensor.numel() for tensor in tensors.values())
    run.print(f"{total:,} gradients of the outputs of {len(tensors)} linear layers, loss / {s.STEP_TOKENS:,} tokens;")
    run.print(f"become zero:  {'as they are':>12} {f'loss x {s.SCALE:g}':>16} {'a scale a tensor':>18}")
    for name, (bare, scaled, own) in losses_of_formats(tensors, s.SCALE).items():
        run.print(f"{name:<13} {bare:>12.1%} {scaled:>16.1%} {own:>18.1%}")


def draw(run, tensors):
    """The histogram, as it is and scaled, with float16's limits."""
    s = run.settings
    exponents, shares = histogram(tensors)
    _, scaled = histogram({name: tensor * s.SCALE for name, tensor in tensors.items()})
    half = FORMATS["float16"]
    curves(
        s.PICTURE,
        {"gradients": (exponents, shares), f"with the loss times {s.SCALE:g}": (exponents, scaled)},
        "exponent: log2 |gradient|, rounded down",
        "% of the values",
        "Gradients of activations, and the numbers that float16 has",
        vlines={
            "smallest float16": np.log2(half.smallest),
            "smallest with all its bits": np.log2(half.smallest_normal),
            "largest": np.log2(half.largest),
        },
    )
    run.print(f"wrote {s.PICTURE}")


if __name__ == "__main__":
    main()
