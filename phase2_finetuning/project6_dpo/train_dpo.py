"""Teach a model that chats which of two answers people prefer.

    uv run python phase2_finetuning/project6_dpo/train_dpo.py
    uv run python phase2_finetuning/project6_dpo/train_dpo.py --loss simpo --out_dir checkpoints/simpo
    uv run python phase2_finetuning/project6_dpo/train_dpo.py --use "lora:rank=8" --reference adapters_off
    uv run python phase2_finetuning/project6_dpo/train_dpo.py --train_data_path mine.jsonl --beta 0.3

Starts from the newest model of project 4 (or the speedrun's, or --checkpoint), which is also the reference: what it
says of all answers is noted before the first step. Trains on TRAIN_DATA_PATH (the bundled polite pairs if there is
none) and leaves best.pt, last.pt, metrics.jsonl and curves.png in checkpoints/project6. Stop it with Ctrl-C, or kill
it: the same command continues. Then talk to it:

    uv run python chat.py --checkpoint checkpoints/project6/best.pt
"""

import contextlib
import functools
from pathlib import Path

from common import DATA, stages
from common.plots import curves
from common.progress import track
from common.run import Run
from phase1_foundation.project3_pretrain import running
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.token_file import fingerprint_of
from phase2_finetuning.project4_sft.conversations import split
from phase2_finetuning.project4_sft.tuning import find_text, load_base, sample
from phase2_finetuning.project6_dpo import config
from phase2_finetuning.project6_dpo.dpo import LOSSES, PreferenceObjective
from phase2_finetuning.project6_dpo.judging import Distance, answers_to, judge, mean_length, remember_reference
from phase2_finetuning.project6_dpo.pairing import PreferenceDataset, render_pair
from phase2_finetuning.project6_dpo.preferences import read_preferences

CHATTING = ("project4", "speedrun/sft")  # folders of checkpoints/ in which a model that chats is looked for
BUNDLED, BUNDLED_TEST = DATA / "polite_train.jsonl.xz", DATA / "polite_test.jsonl.xz"
SHOWN = 3  # prompts whose answers before and after are printed


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__) as run:
        train(run)


def train(run):
    """Train as the settings say; returns the final `TrainState`."""
    s = run.settings
    running.set_determinism(s)
    model, template, base = load_base(run, CHATTING, grow=s.LOSS == "orpo")  # ORPO fine-tunes, too
    train_pairs, held_out, position = load_preferences(run, base)
    train_set, val_set = (pack_pairs(pairs, template, s) for pairs in (train_pairs, held_out))
    run.print(f"{train_set.n_pairs:,} pairs in {train_set.epoch_size:,} rows of {2 * s.BLOCK_SIZE} tokens "
              f"({train_set.fill:.1%} full); {val_set.n_pairs:,} pairs held out")  # fmt: skip
    s.MAX_STEPS = s.MAX_STEPS or max(2, round(s.EPOCHS * train_set.epoch_size * s.BLOCK_SIZE / s.BATCH_TOKENS))
    s.WARMUP_STEPS = min(s.WARMUP_STEPS, s.MAX_STEPS // 2)
    objective, distance = ask_reference(model, template, train_set, val_set, s)
    about = running.describe(s, model, template.tokenizer, {"tokenizer": fingerprint_of(template.tokenizer)} | position)
    dtype = running.autocast_dtype(s)

    def measure():
        found = judge(model, val_set, s.EVAL_TOKENS, dtype)
        return {"val_loss": loss_of(objective, found), **found.figures, "kl": distance(model)}

    def examine(some_model):
        answers = answers_to(some_model, template, asked, s.SAMPLE_TOKENS, s.SEED)
        return judge(some_model, val_set, dtype=dtype), distance(some_model), answers

    asked = [pair.messages for pair in held_out[:: max(1, len(held_out) // max(1, s.ANSWERS))]][: s.ANSWERS]
    before, start = examine(model), judge(model, val_set, s.EVAL_TOKENS, dtype)
    state = running.train(run, model, objective, train_set, about, measure, lambda: sample(model, template, s))
    unconcluded = not (Path(s.OUT_DIR) / "curves.png").exists()  # a finished run that was killed while it concluded
    if run.is_main and (state.iter == state.total if state else unconcluded):
        after = examine(load(Path(s.OUT_DIR) / "best.pt", run.device)[0])
        draw(Path(s.OUT_DIR), start)
        conclude(run, template, objective, asked, before, after)
    return state


def ask_reference(model, template, train_set, val_set, s):
    """Note what the reference says, before a checkpoint is continued: it is the model that the run began with.

    Returns the objective and the distance to the reference.
    """
    without = adapters_off(model) if s.REFERENCE == "adapters_off" else None
    objective = PreferenceObjective(functools.partial(LOSSES[s.LOSS], s), template.start_id, without)
    dtype = running.autocast_dtype(s)
    with without(model) if without else contextlib.nullcontext():
        for data in (val_set,) if without else (val_set, train_set):
            remember_reference(model, data, dtype)
        return objective, Distance(model, val_set, s.KL_TOKENS, dtype)


def adapters_off(model):
    """What turns a model with adapters into its reference; refuses one that has none."""
    from phase2_finetuning.project5_lora.layers import LoRALinear
    from phase2_finetuning.project5_lora.lora import without_adapters

    try:
        with without_adapters(model):
            pass
    except ValueError as error:
        raise ValueError(f'REFERENCE=adapters_off: {error}; here by --use "lora:rank=8"') from None
    if any(bool(module.B.any()) for module in model.modules() if isinstance(module, LoRALinear)):
        raise ValueError(
            "REFERENCE=adapters_off: these adapters are trained already, so without them the model is not the one that "
            "this run begins with: merge them first (project 5's merge.py), or use --reference precomputed"
        )
    return without_adapters


def load_preferences(run, base):
    """(training pairs, held-out pairs, what identifies them for a resume)."""
    s = run.settings
    path = find_text(run, BUNDLED)
    held_path = s.VAL_DATA_PATH or (BUNDLED_TEST if path.resolve() == BUNDLED.resolve() else None)
    if held_path:
        parts = read_preferences(path), read_preferences(held_path)
    else:
        parts = [], []
        for pair in read_preferences(path):
            parts[len(split([pair.messages], s.VAL_FRACTION)[1])].append(pair)
    asked = {str(pair.messages) for pair in parts[1]}
    pairs = [pair for pair in parts[0] if str(pair.messages) not in asked]
    if len(pairs) < len(parts[0]):
        run.print(f"{len(parts[0]) - len(pairs)} training pairs left out: their prompts are held out")
    if not pairs or not parts[1]:
        raise ValueError(f"{path} leaves nothing for one part at VAL_FRACTION={s.VAL_FRACTION}: give more pairs")
    held = f"{held_path} {stages.digest(held_path)}" if held_path else s.VAL_FRACTION
    return pairs, parts[1], {
        "data": f"{path} after {base.source}", "digest": f"{stages.digest(path)} {held}",
        "reference": base.digest,
    }  # fmt: skip


def pack_pairs(pairs, template, s):
    """The dataset of some preferences."""
    pairs = track(pairs, label="rendering", unit="pairs")
    return PreferenceDataset([render_pair(template, pair, s.BLOCK_SIZE) for pair in pairs], s.BLOCK_SIZE,
                             template.start_id)  # fmt: skip


def loss_of(objective, judgement):
    """The mean loss of the judged pairs."""
    return float(objective.loss(judgement.sums, judgement.reference, judgement.lengths).mean())


def conclude(run, template, objective, asked, before, after):
    """Say what the best model prefers now and what that cost, draw the curves, show answers side by side."""
    out = Path(run.settings.OUT_DIR)
    (was, was_kl, said), (found, kl, says) = before, after
    rows = [
        ("loss", loss_of(objective, was), loss_of(objective, found)),
        ("reward accuracy", was.accuracy, found.accuracy),
        ("margin of log-ratios, nats", was.margin, found.margin),
        ("log-probability of chosen answers", was.chosen, found.chosen),
        ("log-probability of rejected answers", was.rejected, found.rejected),
        ("KL to the reference, nats a token", was_kl, kl),
        ("chosen answer likelier", was.likelier, found.likelier),
        ("chosen answer likelier per token", was.likelier_per_token, found.likelier_per_token),
    ]  # fmt: skip
    if asked:
        rows.append(("tokens of a sampled answer", mean_length(template, said), mean_length(template, says)))
    run.print(f"{'':36}  {'before':>9}  {'after':>9}")
    for name, *values in rows:
        run.print(f"{name:36}  " + "  ".join(f"{value:>9.4f}" for value in values))
    names = "likelier_per_token", "longer_preferred"
    run.log(step=run.settings.MAX_STEPS,
            best=found.figures | {"kl": kl} | {name: getattr(found, name) for name in names})  # fmt: skip
    run.print(f"longer answer: {was.longer_chosen:.1%} of the pairs prefer it; the model's reward now does so in "
              f"{found.longer_preferred:.1%} of those of unequal length")  # fmt: skip
    for messages, *texts in list(zip(asked, said, says))[:SHOWN]:
        run.print("--- user: " + messages[-1]["content"])
        for name, text in zip(("before", "after"), texts):
            run.print(f"{name:>6}: {text}")
    run.print(f"wrote {', '.join(running.files_of(out))} in {out}; talk to it with "
              f"`uv run python chat.py --checkpoint {out / 'best.pt'}`")  # fmt: skip


def draw(out, before):
    """What training did to the log-probabilities of held-out answers: both may fall, as long as one falls further."""
    found = [entry for entry in read_metrics(out / "metrics.jsonl") if "chosen" in entry]
    steps = [0, *(entry["step"] for entry in found)]
    series = {
        f"{side} answers": (steps, [0.0, *(entry[side] - getattr(before, side) for entry in found)])
        for side in ("chosen", "rejected")
    }
    curves(out / "curves.png", series, "step", "mean log-probability, against the reference (nats)",
           "Held-out answers during preference optimization")  # fmt: skip


if __name__ == "__main__":
    main()
