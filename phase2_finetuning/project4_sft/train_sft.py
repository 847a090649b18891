"""Fine-tune a language model on conversations, so that it answers.

    uv run python phase2_finetuning/project4_sft/train_sft.py
    uv run python phase2_finetuning/project4_sft/train_sft.py --checkpoint HuggingFaceTB/SmolLM-135M --block_size 1024
    uv run python phase2_finetuning/project4_sft/train_sft.py --train_data_path mine.jsonl --epochs 5

Starts from the newest model of project 3 (or --checkpoint), adds the template's tokens to its tokenizer, packs the
conversations of TRAIN_DATA_PATH (the bundled sample if there are none), and leaves best.pt, last.pt, metrics.jsonl and
curves.png in checkpoints/project4. Stop it with Ctrl-C, or kill it: the same command continues. Then talk to it:

    uv run python chat.py
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from common import CHECKPOINTS, DATA, catalog, stages
from common.progress import track
from common.run import Run
from phase1_foundation.project3_pretrain import running
from phase1_foundation.project3_pretrain.data import TokenDataset
from phase1_foundation.project3_pretrain.evaluation import perplexity, validation_loss
from phase1_foundation.project3_pretrain.hooks import plot_metrics
from phase1_foundation.project3_pretrain.loading import load, newest_checkpoint
from phase1_foundation.project3_pretrain.token_file import fingerprint_of
from phase1_foundation.project3_pretrain.trainer import NextToken
from phase2_finetuning.project4_sft import config
from phase2_finetuning.project4_sft.answering import answer
from phase2_finetuning.project4_sft.conversations import read_conversations, split
from phase2_finetuning.project4_sft.packing import ConversationDataset, apart, render_within
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import grow_vocabulary, with_chat_tokens


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__) as run:
        train(run)


def train(run):
    """Fine-tune as the settings say; returns the final `TrainState`."""
    s = run.settings
    running.set_determinism(s)
    model, template, base = load_base(run)
    path = find_text(run)
    train_set, val_set = load_conversations(run, path, template)
    s.MAX_STEPS = s.MAX_STEPS or max(2, round(s.EPOCHS * train_set.epoch_size * s.BLOCK_SIZE / s.BATCH_TOKENS))
    s.WARMUP_STEPS = min(s.WARMUP_STEPS, s.MAX_STEPS // 2)
    position = {
        "tokenizer": fingerprint_of(template.tokenizer),
        "data": f"{path} after {base.source}",
        "digest": f"{stages.digest(path)} {s.VAL_FRACTION} {base.digest}",
    }
    about = running.describe(s, model, template.tokenizer, position)
    objective = NextToken(apart(template.start_id))
    dtype = running.autocast_dtype(s)

    def measure():
        return validation_loss(model, val_set, s.EVAL_TOKENS, dtype=dtype, plan=objective.plan)

    before = measure(), remembered(run, model, base)
    run.print(f"before: {before[0]:.4f} nats a token of the answers held out")
    state = running.train(run, model, objective, train_set, about, measure, lambda: sample(model, template, s))
    if state and state.iter == state.total and run.is_main:
        conclude(run, val_set, objective.plan, before, base)
    return state


class _Base(NamedTuple):
    """What a run starts from: where it lies, a hash of its weights, and its tokenizer's fingerprint."""

    source: str
    digest: str
    tokenizer: str


def load_base(run):
    """The model to fine-tune in float32, ready for the template's tokens, the template, and what it was before."""
    s = run.settings
    source = s.CHECKPOINT or newest_checkpoint(CHECKPOINTS / "project3") or newest_checkpoint(CHECKPOINTS / "speedrun")
    if source is None:
        raise ValueError(
            "there is no pre-trained model yet: make one with `uv run python speedrun.py`, or name one by --checkpoint"
        )
    model, tokenizer = load(source, dtype=torch.float32)
    if tokenizer is None:
        raise ValueError(f"CHECKPOINT={source} has no tokenizer: use a model that was saved with its own")
    if model.config.block_size < s.BLOCK_SIZE:
        raise ValueError(
            f"BLOCK_SIZE={s.BLOCK_SIZE} exceeds the block_size={model.config.block_size} of {source}: "
            f"use --block_size {model.config.block_size}"
        )
    base = _Base(str(source), digest_of(model), fingerprint_of(tokenizer))
    extended = with_chat_tokens(tokenizer)
    grow_vocabulary(model, tokenizer.vocab_size, extended.vocab_size)
    running.set_dropout(model, s.DROPOUT)
    count = sum(p.numel() for p in model.parameters())
    added = extended.vocab_size - tokenizer.vocab_size
    run.print(f"{source}: {count / 1e6:.2f}M parameters, {added} tokens added for the template")
    return catalog.apply(model, s.USE).to(run.device), ChatTemplate(extended), base


def digest_of(model):
    """A short hash of a model's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def find_text(run):
    """The conversations: TRAIN_DATA_PATH, or the bundled sample where nothing was downloaded."""
    path = Path(run.settings.TRAIN_DATA_PATH)
    if path.is_file() or "TRAIN_DATA_PATH" in run.settings.overrides:
        return path
    run.print(f"{path} is not there: taking the bundled sample; download_data.py gets more conversations")
    return DATA / "sft_sample.jsonl.xz"


def load_conversations(run, path, template):
    """(training set, held-out set), packed."""
    s = run.settings
    sets = []
    for part in split(read_conversations(path), s.VAL_FRACTION):
        talks = track(part, label="rendering", unit="conversations")
        samples = [render_within(template, messages, s.BLOCK_SIZE + 1) for messages in talks]
        if not samples:
            raise ValueError(f"{path} leaves nothing for one part at VAL_FRACTION={s.VAL_FRACTION}: give more text")
        sets.append(ConversationDataset(samples, s.BLOCK_SIZE, template.start_id))
    train_set, val_set = sets
    run.print(
        f"{train_set.n_samples:,} conversations in {train_set.epoch_size:,} rows of {s.BLOCK_SIZE} tokens "
        f"({train_set.fill:.1%} full), {train_set.n_targets:,} tokens to learn; {val_set.n_samples:,} held out"
    )
    return train_set, val_set


def remembered(run, model, base):
    """Perplexity on FORGETTING_DATA (tokens of pre-training), or None where it is not given."""
    s = run.settings
    if s.FORGETTING_DATA is None:
        return None
    held_out = TokenDataset(s.FORGETTING_DATA, s.BLOCK_SIZE, base.tokenizer)
    return perplexity(model, held_out, s.EVAL_TOKENS, dtype=running.autocast_dtype(s))


def sample(model, template, s):
    """The model's answer to PROMPT."""
    messages = [{"role": "user", "content": s.PROMPT}]
    return f"user: {s.PROMPT}\nassistant: {''.join(answer(model, template, messages, s.SAMPLE_TOKENS, seed=s.SEED))}"


def conclude(run, val_set, plan, before, base):
    """Say what the best model gained and forgot, draw the curves, show an answer."""
    s, out = run.settings, Path(run.settings.OUT_DIR)
    model, tokenizer = load(out / "best.pt", run.device)
    loss = validation_loss(model, val_set, s.EVAL_TOKENS, dtype=running.autocast_dtype(s), plan=plan)
    run.print(f"answers held out: {before[0]:.4f} -> {loss:.4f} nats a token")
    if before[1] is not None:
        run.print(f"perplexity on {s.FORGETTING_DATA}: {before[1]:.2f} -> {remembered(run, model, base):.2f}")
    plot_metrics(out / "metrics.jsonl", out / "curves.png", "Supervised fine-tuning")
    run.print(f"--- sample\n{sample(model, ChatTemplate(tokenizer), s)}\n---")
    run.print(f"wrote {', '.join(running.files_of(out))} in {out}; talk to it with `uv run python chat.py`")


if __name__ == "__main__":
    main()
