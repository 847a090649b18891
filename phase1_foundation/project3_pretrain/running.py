"""
Running a training

This file implements what every training script does around `fit` (beginning, resuming, the usual hooks) following:
- "PaLM: Scaling Language Modeling with Pathways" (Chowdhery et al., 2022) - resuming bit by bit

Each component is explained with paper references for educational purposes.
"""

import contextlib
import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common import catalog, checkpoint
from common.checkpoint import CheckpointError
from phase1_foundation.project3_pretrain.hooks import (
    Checkpoint,
    Evaluate,
    ExponentialAverage,
    Progress,
    Sample,
    StopOnRequest,
    rewind_metrics,
)
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.schedules import SCHEDULES
from phase1_foundation.project3_pretrain.trainer import fit

FILES = ("last.pt", "previous.pt", "best.pt", "metrics.jsonl", "curves.png")  # what a run leaves in OUT_DIR
MOST_SEQUENCES = 64  # of one forward; 60 are 4% faster than 30 on an H100

# Settings that change where a run finds things or what it reports, not what it computes.
_HARMLESS = {
    "DEVICE", "OUT_DIR", "RESUME", "CHECKPOINT", "EVAL_EVERY", "EVAL_TOKENS", "SAVE_EVERY", "SAMPLE_EVERY",
    "SAMPLE_TOKENS", "PROMPT", "SIZE", "SOURCE", "NO_FALLBACK", "TRAIN_DATA_PATH", "DATA_DIR", "TOKENIZER",
    "VOCAB_SIZE", "NUM_SPECIAL_TOKENS", "VAL_DATA_PATH", "VAL_FRACTION", "NUM_WORKERS", "ANSWERS", "KL_TOKENS",
    "FORGETTING_DATA",
}  # fmt: skip


@dataclass
class Start:
    """Where a run begins: at its first step, or at what a checkpoint says."""

    step: int = 0  # steps already done
    best: float = math.inf  # lowest validation loss so far
    average: dict | None = None  # of the weights (EMA)


def set_determinism(s):
    """Choose bit-exact algorithms on a GPU, or the fast ones."""
    if s.DETERMINISTIC:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest" if s.DETERMINISTIC else "high")


def set_dropout(model, dropout):
    """Give a loaded model the dropout of a new run."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.config = dataclasses.replace(model.config, dropout=dropout)


def autocast_dtype(s):
    """The torch type in which DTYPE computes, or None for float32."""
    return None if s.DTYPE == "float32" else getattr(torch, s.DTYPE.removeprefix("master_"))


def build_step(s, model, objective):
    """The optimizer step that the settings describe."""
    optimizer = build_optimizer(
        model, s.OPTIMIZER, s.LEARNING_RATE, s.WEIGHT_DECAY, (s.BETA1, s.BETA2),
        momentum=s.MOMENTUM, embed_lr=s.EMBED_LEARNING_RATE,
    )  # fmt: skip
    return catalog.resolve("steps", s.DTYPE)(model, objective, optimizer, s.CLIP, autocast_dtype(s))


def build_schedule(s):
    """The learning-rate schedule that the settings describe."""
    options = {"decay_fraction": s.DECAY_FRACTION} if s.SCHEDULE == "wsd" else {}
    return SCHEDULES[s.SCHEDULE](s.MAX_STEPS, s.WARMUP_STEPS, **options)


def choose_micro_batch(model, sequences, device, row_tokens):
    """The largest divisor of a rank's `sequences`, rows of so many tokens, whose activations fit the free memory of a
    GPU (at most 64)."""
    fits = MOST_SEQUENCES
    if device.type == "cuda":
        c = model.config
        per_token = 40 * c.n_layer * c.n_embd + 4 * c.vocab_size  # bytes: compiled bf16 activations, and the logits
        states = 16 * sum(p.numel() for p in model.parameters())  # float32 weights, gradients and two moments
        free = 0.8 * torch.cuda.mem_get_info(device)[0] - states
        fits = max(1, min(fits, int(free / (per_token * row_tokens))))
    return max(n for n in range(1, min(fits, sequences) + 1) if sequences % n == 0)


def describe(s, model, tokenizer, position):
    """What a checkpoint says about its run besides the states.

    Args:
        s: the settings.
        position: a dict that identifies the data: "tokenizer" (a fingerprint), "data" (a path) and "digest" (of what
            lies there) are compared when the run is resumed.
    """
    return {
        "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": s.as_dict()},
        "tokenizer": tokenizer.to_dict(),
        "data_position": {"seed": s.SEED, **position},
    }


def set_aside(folder):
    """Rename what an earlier run left in a folder to ``*.old``, so that nobody takes it for the new one's."""
    found = [name for name in FILES if (Path(folder) / name).exists()]
    for name in found:
        os.replace(Path(folder) / name, Path(folder) / f"{name}.old")
    if found:
        print(f"{folder}: renamed {', '.join(found)} of an earlier run to *.old", flush=True)


def begin(run, step, about):
    """
    Continue the run in OUT_DIR, or clear the place for a new one

    PAPER: arXiv:2204.02311 (PaLM), section 5, on determinism.
    PAPER CONTEXT: restarted from any checkpoint, a run gives the very results of the one that was not interrupted.
    INTUITION: a bookmark is of use only in the book it was laid into: is it the same, and what was changed in it?
    IMPLEMENTATION: ``last.pt``, or ``previous.pt`` where that is missing (killed between two renames, or deleted since
        it is bad), fills `step`. Data and randomness are functions of the step, so nothing else must be restored.
    WHY: whatever happened, the same command goes on; and what cannot go on says so before it destroys anything.

    Args:
        run: its settings OUT_DIR and RESUME decide.
        step: its model and optimizer are filled.
        about: what `describe` returned for this run; each difference to what the file says is printed.

    Returns:
        A `Start`.

    Raises:
        CheckpointError: the file is damaged or incomplete, or belongs to another model or tokenizer.
    """
    folder = Path(run.settings.OUT_DIR)
    found = [folder / name for name in ("last.pt", "previous.pt") if (folder / name).exists()]
    if not found or not run.settings.RESUME:
        if run.is_main:
            set_aside(folder)
        return Start()
    path = found[0]
    saved = checkpoint.load(path)
    try:
        refuse_another(path, saved, about)
        changes = list(differences(saved, about))
        step.load_weights(saved["model_state_dict"])
        step.load_state_dict(saved["optimizer_state_dict"])
        start = Start(int(saved["iter"]), float(saved.get("best_val_loss", saved["val_loss"])), saved.get("ema"))
        if start.average is not None and start.average.keys() != dict(step.model.named_parameters()).keys():
            raise ValueError("its average of the weights (EMA) is of others than these")
    except CheckpointError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} cannot be continued ({reason}): {_elsewhere()}") from error
    for change in changes:
        run.print(f"note: {change}: the run is no longer the same")
    run.print(f"resuming {path} after step {start.step}")
    return start


def _elsewhere():
    return "use another --out_dir, or --no_resume to start anew (what lies there is then renamed to *.old)"


def _shape(about):
    """What a model's weights depend on: all of its configuration but the dropout."""
    return {name: value for name, value in about["config"]["model"].items() if name != "dropout"}


def refuse_another(path, saved, about):
    """Raise CheckpointError for a checkpoint of another model, tokenizer or reference."""
    if _shape(saved) != _shape(about):
        raise CheckpointError(f"{path} holds a model of another shape, {saved['config']['model']}: {_elsewhere()}")
    theirs, ours = saved["data_position"], about["data_position"]
    if theirs["tokenizer"] != ours["tokenizer"]:
        raise CheckpointError(f"{path} was trained with another tokenizer than {ours['data']}: {_elsewhere()}")
    if theirs.get("reference") != ours.get("reference"):  # of preference optimization
        raise CheckpointError(f"{path} was trained against another reference than {ours['data']}: {_elsewhere()}")


def differences(saved, about):
    """What a run would do otherwise than the one that wrote a checkpoint, one text for each setting."""
    theirs, ours = saved["config"]["settings"], about["config"]["settings"]
    for name in sorted((theirs.keys() & ours.keys()) - _HARMLESS):
        if theirs[name] != ours[name]:
            yield f"{name} was {theirs[name]} and is now {ours[name]}"
    before, now = saved["data_position"], about["data_position"]
    if before.get("digest", now.get("digest")) != now.get("digest"):
        yield f"the data were {before['data']} (digest {before['digest']}) and are now {now['data']} ({now['digest']})"


def build_hooks(run, model, about, start, measure, write):
    """What usually happens around the steps: stop, average, evaluation, progress, samples, checkpoints.

    Args:
        model: the one that is trained.
        about: what `describe` returned.
        start: what `begin` returned.
        measure: ``measure() -> float``, the validation loss, or a dict of figures with "val_loss" among them.
        write: ``write() -> str``, a sample.

    With EMA, both see the averaged weights, and ``best.pt`` holds them.
    """
    s = run.settings
    metrics = Path(s.OUT_DIR) / "metrics.jsonl"
    if run.is_main:
        Path(s.OUT_DIR).mkdir(parents=True, exist_ok=True)
        rewind_metrics(metrics, start.step)
    run.metrics(metrics)
    average = ExponentialAverage(model, s.EMA, start.average) if s.EMA else None
    averaged = average.applied if average else contextlib.nullcontext

    def judged(function):
        def call():
            with averaged():
                return function()

        return call

    return [
        StopOnRequest(run),
        *([average] if average else []),
        Evaluate(judged(measure), s.EVAL_EVERY, run),
        Progress(run, s.MAX_STEPS, start.step, block_size=s.BLOCK_SIZE, peak_lr=s.LEARNING_RATE),
        Sample(judged(write), s.SAMPLE_EVERY, run),
        Checkpoint(s.OUT_DIR, lambda: about, s.SAVE_EVERY, start.best, start.step, averaged),
    ]


def train(run, model, objective, train_set, about, measure, write):
    """
    A training run from begin to end: every training script builds its model and data, and calls this

    PAPER: arXiv:2204.02311 (PaLM), section 5.
    PAPER CONTEXT: the paper lists what makes up its training setup: optimizer, schedule, batches, loss, restarts.
    INTUITION: the stages of a model's schooling differ in books and in marks, not in how a school day goes.
    IMPLEMENTATION: step and schedule by the settings; go on where an earlier run stopped; compile; choose the micro
        batch; `fit` with the usual hooks.
    WHY: pre-training, fine-tuning and alignment share one loop and one way to be interrupted.

    Args:
        model: on its device, changed as its transforms say, not compiled.
        objective: as `Step` takes it.
        train_set: has ``batches(seed, batch_size, micro_batch_size, rank, world_size)``, and `block_size`, the length
            of its rows.
        about: what `describe` returned.
        measure, write: as for `build_hooks`.

    Returns:
        The final `TrainState`, or None where the run in OUT_DIR was finished already.
    """
    s = run.settings
    step = build_step(s, model, objective)
    start = begin(run, step, about)
    if start.step >= s.MAX_STEPS:
        run.print(f"the run in {s.OUT_DIR} has finished its {start.step} steps: "
                  f"give a larger --max_steps, or --no_resume")  # fmt: skip
        return None
    if s.COMPILE:
        model.compile()
    sequences = s.BATCH_TOKENS // s.BLOCK_SIZE
    micro = s.MICRO_BATCH or choose_micro_batch(model, sequences // run.world_size, run.device, train_set.block_size)
    run.print(f"batch of {sequences} x {train_set.block_size} tokens, {micro} sequences a forward")
    batches = train_set.batches(s.SEED, sequences, micro, run.rank, run.world_size)
    state = fit(step, batches, build_schedule(s), build_hooks(run, model, about, start, measure, write), start.step,
                s.SEED)  # fmt: skip
    if state.iter < state.total:
        say_how_to_continue(run, state)
    return state


def say_how_to_continue(run, state):
    """After a stop: where the run stands, and how to go on."""
    s = run.settings
    flags = "the same flags" if s.RESUME else "the same flags, but --resume in place of --no_resume,"
    last = Path(s.OUT_DIR) / "last.pt"
    run.print(f"stopped after step {state.iter} of {state.total}, saved in {last}: run again with {flags} to continue")


def write_plain(model, tokenizer, path):
    """Write a checkpoint of a model that no run will continue."""
    checkpoint.save(path, {
        "iter": 0,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": {},
        "train_loss": math.nan,
        "val_loss": math.nan,
        "config": {"kind": "transformer", "model": model.config.to_dict(), "settings": {}},
        "tokenizer": tokenizer and tokenizer.to_dict(),
        "recipe": model.recipe,
    })  # fmt: skip


def files_of(folder):
    """The names of those of a run's files that exist.

    >>> files_of("nowhere")
    []
    """
    return [name for name in FILES if (Path(folder) / name).exists()]
