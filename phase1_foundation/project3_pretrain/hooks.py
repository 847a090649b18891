"""
Hooks of the training loop

This file implements what happens around a training step, following:
- "PaLM: Scaling Language Modeling with Pathways" (Chowdhery et al., 2022) - reporting model FLOPs utilization
- "Training Compute-Optimal Large Language Models" (Hoffmann et al., 2022) - judging a run by its held-out loss

Each component is explained with paper references for educational purposes.
"""

import contextlib
import json
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist

from common import checkpoint
from common.checkpoint import atomic_write
from common.device import peak_flops, peak_memory
from common.plots import curves
from common.progress import Reporter
from phase1_foundation.project3_pretrain.trainer import DivergedError, flops_per_token


class Progress:
    """
    One aligned line and one line of ``metrics.jsonl``: loss, gradient norm, tokens/s, MFU, remaining time

    PAPER: arXiv:2204.02311 (PaLM), section 4.1: MFU as the measure of a training system.
    PAPER CONTEXT: observed tokens/s over what the hardware's peak would allow for the model's own FLOPs.
    INTUITION: tokens/s says how fast, MFU says how well the machine is used.
    IMPLEMENTATION: the rate counts the time of steps alone, not that of evaluations and checkpoints.
    WHY: whoever waits wants to know how long; whoever tunes wants to know how far from the limit.

    Args:
        run: prints and logs.
        total, start: steps of the whole run, and steps already done.
        every_s: least seconds between two lines.
        block_size: tokens of a sequence, for the FLOPs of attention.
        peak_lr: what the schedule multiplies; the line shows the product.
    """

    def __init__(self, run, total, start=0, every_s=1.0, block_size=1024, peak_lr=1.0):
        self.run, self.block_size, self.peak_lr = run, block_size, peak_lr
        self.reporter = Reporter(total, every_s=every_s, start=start, echo=run.print)

    def __call__(self, state):
        """Log the step, print it when it is time."""
        fields = {"loss": state.train_loss, "norm": state.grad_norm, "lr": state.lr_scale * self.peak_lr}
        self.reporter.unit = state.step.objective.unit
        peak = peak_flops(self.run.device) if self.reporter.unit == "tok" else None  # known FLOPs are those of a token
        if peak and self.reporter.rate:
            flops = flops_per_token(state.step.model, self.block_size) / state.step.world_size
            fields["mfu"] = f"{self.reporter.rate * flops / peak:.1%}"
        norm = state.grad_norm if math.isfinite(state.grad_norm) else None  # a step that was left out; JSON has no inf
        self.run.log(step=state.iter, train_loss=state.train_loss, grad_norm=norm, lr_scale=state.lr_scale,
                     tokens=state.tokens, tokens_per_s=self.reporter.rate)  # fmt: skip
        self.reporter.report(state.iter, units=state.tokens, seconds=state.seconds, **fields)

    def close(self, state):
        """Say what memory the run took at its peak."""
        if memory := peak_memory(self.run.device):
            self.run.print(f"peak memory {memory / 2**30:.2f} GiB")


class Evaluate:
    """
    Validation loss at regular steps

    PAPER: arXiv:2203.15556 (Hoffmann et al.), section 3: models are compared by held-out loss.
    PAPER CONTEXT: the training loss of a model that sees data twice flatters it; a held-out set does not.
    INTUITION: stop, read something new, carry on.
    IMPLEMENTATION: sets ``state.val_loss`` to ``measure()`` every `every` steps and at the end; `measure` itself puts
        the model into evaluation mode, as `evaluation.score` does. It may return a dict, with "val_loss" in it.
    WHY: the best checkpoint is chosen by it, and curves of two recipes are compared by it.

    Raises:
        DivergedError: the validation loss is not a number; `Checkpoint`, which stands behind, then saves nothing.
    """

    def __init__(self, measure, every, run):
        self.measure, self.every, self.run = measure, every, run

    def __call__(self, state):
        """Evaluate when it is time."""
        if state.iter % self.every == 0 or state.iter == state.total:
            with torch.compiler.set_stance("force_eager"):  # compiling the evaluation would cost more than it saves
                found = self.measure()
            figures = found if isinstance(found, dict) else {"val_loss": found}
            state.val_loss = figures["val_loss"]
            if not math.isfinite(state.val_loss):
                raise DivergedError(f"the validation loss became {state.val_loss}")
            self.run.log(step=state.iter, **figures)
            others = "".join(f"  {name} {value:.4f}" for name, value in figures.items() if name != "val_loss")
            self.run.print(f"step {state.iter}/{state.total}  validation loss {state.val_loss:.4f} "
                           f"{state.step.objective.loss_unit}{others}")  # fmt: skip


class Checkpoint:
    """
    Write ``last.pt`` regularly and at the end, ``best.pt`` whenever the validation loss is the lowest so far

    PAPER: "Scaling Data-Constrained Language Models" (Muennighoff et al., 2023), arXiv:2305.16264.
    PAPER CONTEXT: a run that repeats its data can overfit; the best model is then not the last one.
    INTUITION: one file to continue from, the one before it in case, and one to use.
    IMPLEMENTATION: written atomically (common/checkpoint.py), by the first rank alone. Whether an update was good is
        known only at the next loss, so ``last.pt`` becomes ``previous.pt`` when the new one is whole.
    WHY: whenever the process dies, a whole checkpoint lies on the disk, and one whose weights have proved good.

    Args:
        folder: where to; only the first rank writes.
        describe: ``describe() -> dict`` with config, tokenizer and whatever else the checkpoint should hold.
        every: steps between two writes of ``last.pt``.
        best: the lowest validation loss so far (after a resume).
        start: steps already done (after a resume).
        averaged: makes a context in which the model has the weights for ``best.pt`` (`ExponentialAverage.applied`).
    """

    def __init__(self, folder, describe, every, best=math.inf, start=0, averaged=contextlib.nullcontext):
        self.folder, self.describe, self.every, self.best = Path(folder), describe, every, best
        self.averaged = averaged
        self.written = start  # the step of the file that a resume would take

    def __call__(self, state):
        """Write what is due."""
        main = not dist.is_initialized() or dist.get_rank() == 0
        better = state.val_loss < self.best
        if better:
            self.best = state.val_loss
        if better and main:
            with self.averaged():
                self.write(state, "best.pt")
        if state.iter % self.every == 0 or state.iter == state.total or state.stop:
            if main:
                self.rotate(state)
            self.written = state.iter

    def rotate(self, state):
        """Write a new ``last.pt`` and keep the old one; whoever is killed in between leaves ``previous.pt``."""
        new, last = self.folder / "last.pt.new", self.folder / "last.pt"
        self.write(state, new.name)
        if last.exists():
            os.replace(last, self.folder / "previous.pt")
        os.replace(new, last)

    def write(self, state, name):
        """Write one file, atomically."""
        model = state.step.model
        content = {
            "iter": state.iter,
            "model_state_dict": state.step.weights(),
            "optimizer_state_dict": state.step.state_dict(),
            "train_loss": state.train_loss,
            "val_loss": state.val_loss,
            "best_val_loss": self.best,
            "recipe": list(model.recipe),
            "rng_state": torch.get_rng_state(),  # for the record: all randomness is a function of (seed, step, rank)
            **self.describe(),
            **state.extra,
        }
        checkpoint.save(self.folder / name, content)

    def remedy(self, state):
        """Say which file to go back to after a divergence: the newest whose weights gave a loss that was a number."""
        last, previous = self.folder / "last.pt", self.folder / "previous.pt"
        if not self.written:
            return "No checkpoint was written yet: the next run starts anew."
        newest = last if last.exists() else previous
        if self.written < state.iter:
            return f"The next run continues from {newest} (step {self.written})."
        if newest == last and previous.exists():
            return f"{last} already holds such weights: delete it, and the next run continues from {previous}."
        return f"{newest} already holds such weights, and there is no earlier one: start anew with --no_resume."


class StopOnRequest:
    """
    End the run after the step in which Ctrl-C was pressed, on whichever rank; stands before `Checkpoint`

    PAPER: arXiv:2204.02311 (PaLM), section 5.1, restarts its run from checkpoints, too.
    PAPER CONTEXT: long runs are interrupted, by people and by machines, and must lose nothing.
    INTUITION: finish the sentence, put the pen down, close the book.
    IMPLEMENTATION: ranks agree by adding up their flags, those of other hooks' ``state.stop`` among them;
        `Checkpoint` then sees ``state.stop`` and writes.
    WHY: a rank that stops alone would leave the others waiting for it forever.
    """

    def __init__(self, run):
        self.run = run

    def __call__(self, state):
        """Set ``state.stop`` on all ranks at once."""
        state.stop = state.step.sum_over_ranks(float(self.run.stopping or state.stop)) > 0


class ExponentialAverage:
    """
    Exponential moving average of the weights (EMA)

    PAPER: arXiv:1412.6980 (Adam), section 7.2, temporal averaging.
    PAPER CONTEXT: the last iterate is noisy; averaging the parameters over the run generalises better.
    INTUITION: the weights bounce around the floor of a valley, and their average lies near the floor.
    IMPLEMENTATION: after each step average <- decay * average + (1 - decay) * weights, in float32; ``last.pt`` keeps
        it under ``ema``; evaluation, samples and ``best.pt`` use the model inside `applied`.
    WHY: most useful while the learning rate is high; a decay to zero does much the same, so it is off by default.

    Args:
        model: the one that is trained.
        decay: how much of the average stays in each step.
        average: the ``ema`` of a checkpoint, to continue; None begins with the model's weights.
    """

    def __init__(self, model, decay, average=None):
        self.model, self.decay = model, decay
        self.average = {
            name: (p if average is None else average[name]).detach().to(p.device, torch.float32, copy=True)
            for name, p in model.named_parameters()
        }

    def __call__(self, state):
        """Move the average."""
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter.detach().float(), 1 - self.decay)
        state.extra["ema"] = self.average

    @contextlib.contextmanager
    def applied(self):
        """Give the model its averaged weights within a ``with`` block; afterwards it has its own, bit for bit."""
        parameters = dict(self.model.named_parameters())
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            _copy(self.average, parameters)
            yield
        finally:
            _copy(own, parameters)


@torch.no_grad()
def _copy(values, parameters):
    """Set parameters to values by name."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


class Sample:
    """
    Print what the model writes, every `every` steps

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 8 (samples).
    PAPER CONTEXT: samples show what a loss does not: repetition, broken words, forgotten names.
    INTUITION: a number says that it got better, a sample says at what.
    IMPLEMENTATION: ``write() -> str`` (of writing.py) draws with a generator of its own and leaves training as it was.
    WHY: most mistakes in data and tokenizer are seen here first.
    """

    def __init__(self, write, every, run):
        self.write, self.every, self.run = write, every, run

    def __call__(self, state):
        """Print a sample when it is time."""
        if self.every and state.iter % self.every == 0 and self.run.is_main:
            self.run.print(f"--- sample at step {state.iter}\n{self.write()}\n---")


def read_metrics(path, before=None):
    """Read ``metrics.jsonl``: a list of dicts; a torn last line (after a crash) and steps past `before` are dropped."""
    lines = []
    if Path(path).exists():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the process died while it wrote this line
            if before is None or entry["step"] <= before:
                lines.append(entry)
    return lines


def rewind_metrics(path, step):
    """Forget what was logged after `step`: a resumed run logs it again."""
    kept = read_metrics(path, before=step)
    if Path(path).exists():
        atomic_write(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def plot_metrics(path, picture, title):
    """Draw the loss curves of a ``metrics.jsonl`` to a PNG."""
    entries = read_metrics(path)
    series = {}
    for name, key in (("training", "train_loss"), ("validation", "val_loss")):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            series[name] = tuple(zip(*points))
    if series:
        curves(picture, series, "step", "loss (nats a token)", title)
