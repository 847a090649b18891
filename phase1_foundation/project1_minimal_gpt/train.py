"""Train a character-level GPT on tiny Shakespeare.

    uv run python phase1_foundation/project1_minimal_gpt/train.py
    uv run python phase1_foundation/project1_minimal_gpt/train.py --n_layer 2 --max_iters 500
    uv run python phase1_foundation/project1_minimal_gpt/train.py --resume

Writes best.pt (lowest validation loss), last.pt, metrics.jsonl and curves.png to checkpoints/project1. Ctrl-C saves;
`--resume` continues from there, bit-exactly on a CPU.
"""

import dataclasses
import json
import math
import time
from contextlib import suppress
from pathlib import Path

import torch

from common import checkpoint, plots
from common.progress import Reporter
from common.run import Run
from phase1_foundation.project1_minimal_gpt import config
from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project1_minimal_gpt.data import batch, fingerprint, read_text, split, windows
from phase1_foundation.project1_minimal_gpt.loading import TRAIN_COMMAND, load_model
from phase1_foundation.project1_minimal_gpt.model import GPT, GPTConfig
from phase1_foundation.project1_minimal_gpt.optimization import build_optimizer, learning_rate_at, training_step
from phase1_foundation.project1_minimal_gpt.sampling import stream


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("System", "Model", "Training", "Sampling", "Data"), description=__doc__) as run:
        train(run)


def train(run):
    """Train as the settings say; returns the validation loss of the best checkpoint, or None when interrupted."""
    s, began = run.settings, time.perf_counter()
    text = read_text(s.TRAIN_DATA_PATH)
    tokenizer = CharTokenizer.from_text(text)
    train_tokens, val_tokens = (part.to(run.device) for part in split(text, tokenizer, s.VAL_FRACTION, s.BLOCK_SIZE))
    model = GPT(model_config(s, tokenizer.vocab_size)).to(run.device)
    optimizer = build_optimizer(model, s.LEARNING_RATE, s.WEIGHT_DECAY, (s.BETA1, s.BETA2))
    run.print(
        f"{model.n_parameters():,} parameters; {len(train_tokens):,} characters to train on, {len(val_tokens):,} held "
        f"out; {tokenizer.vocab_size} different ones; {s.BATCH_SIZE * s.BLOCK_SIZE:,} characters a step"
    )
    about = {
        "config": {"kind": "minimal_gpt", "model": dataclasses.asdict(model.config), "settings": s.as_dict()},
        "tokenizer": tokenizer.to_dict(),
        "text": fingerprint(text),
    }
    start, best = resume(run, model, optimizer, about) if s.RESUME else (0, math.inf)
    open_metrics(run, start)
    finished = optimise(run, model, optimizer, train_tokens, val_tokens, about, start, best)
    if not finished:
        run.print(f"Stopped; continue with `{TRAIN_COMMAND} --resume` and the same flags")
        return None
    return conclude(run, val_tokens, began)


def model_config(s, vocab_size):
    """Translate settings into the shape of the model."""
    names = [field.name for field in dataclasses.fields(GPTConfig) if field.name != "vocab_size"]
    return GPTConfig(vocab_size=vocab_size, **{name: getattr(s, name.upper()) for name in names})


def autocast(s, device):
    """Give the context in which matrix products run in DTYPE (it changes nothing for float32)."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=s.DTYPE == "bfloat16")


def optimise(run, model, optimizer, train_tokens, val_tokens, about, step, best):
    """Take the steps that remain; returns False when Ctrl-C ended them early.

    The loss is looked at every LOG_EVERY steps only: fetching it makes a GPU wait. Nothing is saved unseen.
    """
    s = run.settings
    step_model = torch.compile(model) if s.COMPILE else model
    reporter = Reporter(s.MAX_ITERS, start=step, unit="char")
    total, count, val_loss, first = torch.zeros((), device=run.device), 0, math.inf, step + 1
    while step < s.MAX_ITERS:
        rate = learning_rate_at(step, s.LEARNING_RATE, s.MIN_LEARNING_RATE, s.WARMUP_ITERS, s.MAX_ITERS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = batch(train_tokens, step, s.SEED, s.BATCH_SIZE, s.BLOCK_SIZE)
        total += training_step(step_model, optimizer, inputs, targets, s.CLIP, autocast(s, run.device))
        step, count = step + 1, count + 1
        evaluates = step % s.EVAL_EVERY == 0 or step == s.MAX_ITERS
        if step % s.LOG_EVERY == 0 or step == first or evaluates or run.stopping:
            train_loss = total.item() / count
            check_finite(run, "training", train_loss, step)
            run.log(step=step, train_loss=train_loss, learning_rate=rate)
            reporter.report(step, units=count * inputs.numel(), loss=train_loss, lr=rate)
            total, count = torch.zeros_like(total), 0
        if evaluates:
            val_loss = evaluate(model, val_tokens, s, run.device, limit=s.EVAL_WINDOWS)
            check_finite(run, "validation", val_loss, step)
            run.log(step=step, val_loss=val_loss)
            run.print(f"step {step}: validation loss {val_loss:.4f}" + "  (best so far)" * (val_loss < best))
        if evaluates or run.stopping:
            is_best, best = val_loss < best, min(best, val_loss)
            state = snapshot(model, optimizer, step, train_loss, val_loss, best, about)
            checkpoint.save(Path(s.OUT_DIR, "last.pt"), state)
            if is_best or best == math.inf:  # stopped before the first validation: better this model than none
                checkpoint.save(Path(s.OUT_DIR, "best.pt"), state)
        if run.stopping:
            return step == s.MAX_ITERS
    return True


def check_finite(run, which, loss, step):
    """Stop the run when a loss is no number any more, before anything is overwritten."""
    if not math.isfinite(loss):
        s, best = run.settings, Path(run.settings.OUT_DIR, "best.pt")
        kept = f"; the checkpoint {best} is kept" if best.exists() else ""
        raise ValueError(
            f"the {which} loss became {loss} at step {step}{kept}: "
            f"try a lower LEARNING_RATE={s.LEARNING_RATE:g} or a longer WARMUP_ITERS={s.WARMUP_ITERS}"
        )


@torch.no_grad()
def evaluate(model, tokens, s, device, limit=None):
    """Measure the mean loss in nats per character, in windows that do not overlap; all of them without `limit`."""
    model.eval()
    total = count = 0
    for inputs, targets in windows(tokens, s.BLOCK_SIZE, 64, limit):
        with autocast(s, device):
            total += model(inputs, targets) * inputs.numel()
        count += inputs.numel()
    model.train()
    return (total / count).item()


def snapshot(model, optimizer, step, train_loss, val_loss, best, about):
    """Collect all that `resume` and `load_model` need: plain values and tensors."""
    rng_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng_state["cuda"] = torch.cuda.get_rng_state()
    return {
        "iter": step,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "train_loss": train_loss,
        "val_loss": val_loss,
        "best_val_loss": best,
        "config": about["config"],
        "tokenizer": about["tokenizer"],
        "data_position": {"step": step, "text": about["text"]},  # batches are a function of (seed, step)
        "rng_state": rng_state,  # of dropout
        "recipe": [],
    }


def resume(run, model, optimizer, about):
    """Restore last.pt into model and optimizer; returns (steps done, best validation loss so far)."""
    path = Path(run.settings.OUT_DIR, "last.pt")
    if not path.is_file():
        raise FileNotFoundError(f"there is nothing to resume at {path}: leave out --resume")
    _, tokenizer, saved = load_model(path)
    ours, theirs = about["config"]["model"], saved["config"]["model"]
    shape = [f"{name}={theirs.get(name)} there, {ours[name]} here" for name in ours if theirs.get(name) != ours[name]]
    if shape:
        raise ValueError(f"{path} has another model ({'; '.join(shape)}): give the same flags, or leave out --resume")
    if tokenizer.to_dict() != about["tokenizer"] or saved["data_position"]["text"] != about["text"]:
        raise ValueError(f"{path} was trained on another text: give the same --train_data_path, or leave out --resume")
    before, now = saved["config"]["settings"], about["config"]["settings"]
    for name in sorted(now.keys() - {"RESUME", "DEVICE", "OUT_DIR"}):
        if before.get(name) != now[name]:
            run.print(f"note: {name} was {before.get(name)} and is now {now[name]}: the run is no longer the same")
    model.load_state_dict(saved["model_state_dict"])
    optimizer.load_state_dict(saved["optimizer_state_dict"])
    torch.set_rng_state(saved["rng_state"]["cpu"])
    if run.device.type == "cuda" and "cuda" in saved["rng_state"]:
        torch.cuda.set_rng_state(saved["rng_state"]["cuda"])
    run.print(f"Resuming {path} after step {saved['iter']}")
    return saved["iter"], saved["best_val_loss"]


def open_metrics(run, start):
    """Begin metrics.jsonl anew, or after a resume drop what was logged beyond the checkpoint."""
    path = Path(run.settings.OUT_DIR, "metrics.jsonl")
    kept = [line for line in read_metrics(path) if line.get("step", math.inf) <= start] if start else []
    checkpoint.atomic_write(path, "".join(json.dumps(line) + "\n" for line in kept))
    run.metrics(path)


def read_metrics(path):
    """Read the lines of a metrics.jsonl as dicts; a half-written last line is ignored."""
    lines = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


def conclude(run, val_tokens, began):
    """Measure the best checkpoint on the whole validation split, draw the curves, show a sample."""
    s, out = run.settings, Path(run.settings.OUT_DIR)
    model, tokenizer, saved = load_model(out / "best.pt", run.device)
    loss = evaluate(model, val_tokens, s, run.device)
    seconds = time.perf_counter() - began
    run.log(final_val_loss=loss, best_step=saved["iter"], seconds=seconds)
    run.print(
        f"\nbest checkpoint (step {saved['iter']}): validation loss {loss:.4f} nats a character "
        f"({loss / math.log(2):.3f} bits, perplexity {math.exp(loss):.2f})\n"
        f"measured on the whole held-out text in windows of {s.BLOCK_SIZE}; {seconds:.0f} seconds "
        f"{'since it was resumed' if s.RESUME else 'in all'}"
    )
    draw_curves(out / "metrics.jsonl", out / "curves.png", f"Project 1: {model.n_parameters():,} parameters")
    run.print(f"wrote {out}: best.pt, last.pt, metrics.jsonl, curves.png\n\na sample:")
    generator = torch.Generator().manual_seed(s.SEED)
    prompt = s.PROMPT if s.PROMPT and set(s.PROMPT) <= set(tokenizer.chars) else tokenizer.chars[0]
    model.eval()
    run.print(prompt, end="")
    sampling = {"temperature": s.TEMPERATURE, "top_k": s.TOP_K, "top_p": s.TOP_P, "generator": generator}
    for token in stream(model, tokenizer.encode(prompt), s.MAX_NEW_TOKENS, **sampling):
        run.print(tokenizer.decode([token]), end="")
    run.print("")
    return loss


def draw_curves(metrics, path, title):
    """Draw training and validation loss over the steps."""
    lines = read_metrics(metrics)
    series = {
        name: ([line["step"] for line in lines if key in line], [line[key] for line in lines if key in line])
        for name, key in (("training", "train_loss"), ("validation", "val_loss"))
    }
    plots.curves(path, series, "step", "loss, nats per character", title)


if __name__ == "__main__":
    main()
