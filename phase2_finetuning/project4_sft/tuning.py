"""
Fine-tuning

This file implements what all scripts that train on conversations do, from the model to the last report, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - stages of fine-tuning

Each component is explained with paper references for educational purposes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from common import CHECKPOINTS, DATA, catalog, stages
from common.progress import track
from phase1_foundation.project3_pretrain import running
from phase1_foundation.project3_pretrain.data import TokenDataset
from phase1_foundation.project3_pretrain.evaluation import perplexity, validation_loss
from phase1_foundation.project3_pretrain.hooks import plot_metrics
from phase1_foundation.project3_pretrain.loading import load, newest_checkpoint
from phase1_foundation.project3_pretrain.token_file import fingerprint_of
from phase1_foundation.project3_pretrain.trainer import NextToken
from phase2_finetuning.project4_sft.answering import answer
from phase2_finetuning.project4_sft.conversations import read_conversations, split
from phase2_finetuning.project4_sft.packing import ConversationDataset, apart, render_within
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import grow_vocabulary, with_chat_tokens

PRETRAINED = ("project3", "speedrun/pretrain")  # folders of checkpoints/ in which a model to fine-tune is looked for
SAMPLE = DATA / "sft_sample.jsonl.xz"

# adapt(model, added) -> model: what a technique does to a model before it is trained (adapters, say); `added` are the
# ids of the tokens that the template has just added, whose rows nobody has trained yet
Adapt = Callable[[nn.Module, list[int]], nn.Module]


class Base(NamedTuple):
    """What a run starts from: where it lies, a hash of its weights, and its tokenizer's fingerprint."""

    source: str
    digest: str
    tokenizer: str


def fine_tune(run, adapt: Adapt | None = None, folders: Sequence[str] = PRETRAINED, title="Supervised fine-tuning"):
    """
    Train on conversations as the settings say

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.5.
    PAPER CONTEXT: GPT-3 is fine-tuned on demonstrations, for several epochs, and the model is chosen on held-out ones.
    INTUITION: the same school day as in pre-training; only the book, and what is marked, are others.
    IMPLEMENTATION: a base, packed conversations and a loss on the answers, then project 3's `running.train`; `adapt`
        and the folders are all that techniques differ in.
    WHY: training all weights and training adapters are compared fairly only if nothing else differs.

    Args:
        run: the script's `Run`, with the settings of this project's config.
        adapt, folders: as in `load_base`.
        title: of the plot.

    Returns:
        The final `TrainState`, or None where the run in OUT_DIR was finished already.
    """
    s = run.settings
    running.set_determinism(s)
    model, template, base = load_base(run, folders, adapt)
    path = find_text(run, SAMPLE)
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
    unconcluded = not (Path(s.OUT_DIR) / "curves.png").exists()  # a finished run that was killed while it concluded
    if run.is_main and (state.iter == state.total if state else unconcluded):
        conclude(run, val_set, objective.plan, before, base, title)
    return state


def load_base(run, folders: Sequence[str] = PRETRAINED, adapt: Adapt | None = None, grow: bool = True):
    """The model to fine-tune, in float32, as the settings want it: (model, template, base).

    Args:
        run: its settings CHECKPOINT, BLOCK_SIZE, DROPOUT and USE decide.
        folders: without a CHECKPOINT, the newest of the first of these folders of checkpoints/ that holds one.
        adapt: changes the model, whose embedding has its final size by then; before the transforms of USE.
        grow: add the template's tokens; False: the model must have been trained on them.

    Raises ValueError where there is no model, or one that cannot chat or is too short.
    """
    s = run.settings
    source = s.CHECKPOINT or find_checkpoint(folders, grow)
    model, tokenizer = load(source, dtype=torch.float32)
    if tokenizer is None:
        raise ValueError(f"CHECKPOINT={source} has no tokenizer: use a model that was saved with its own")
    if model.config.block_size < s.BLOCK_SIZE:
        raise ValueError(
            f"BLOCK_SIZE={s.BLOCK_SIZE} exceeds the block_size={model.config.block_size} of {source}: "
            f"use --block_size {model.config.block_size}"
        )
    base = Base(str(source), digest_of(model), fingerprint_of(tokenizer))
    extended = with_chat_tokens(tokenizer) if grow else tokenizer
    template = ChatTemplate(extended)  # without `grow` it refuses a tokenizer that lacks its tokens
    added = list(range(tokenizer.vocab_size, extended.vocab_size))
    grow_vocabulary(model, tokenizer.vocab_size, extended.vocab_size)
    running.set_dropout(model, s.DROPOUT)
    count = sum(p.numel() for p in model.parameters())
    run.print(f"{source}: {count / 1e6:.2f}M parameters, {len(added)} tokens added for the template")
    if adapt:
        model = adapt(model, added)
    model = catalog.apply(model, s.USE)
    if added and not model.embed.tokens.weight.requires_grad:
        ids = json.dumps(added, separators=(",", ":"))
        run.print(f"note: the model is frozen, and so are the rows of the {len(added)} new tokens: "
                  f"train_lora.py trains them, or --use 'lora:tokens={ids}'")  # fmt: skip
    return model.to(run.device), template, base


def find_checkpoint(folders: Sequence[str], grow: bool = True) -> Path:
    """The newest checkpoint of the first of `folders` below checkpoints/ that holds one."""
    for folder in folders:
        if found := newest_checkpoint(CHECKPOINTS / folder):
            return found
    kind, script = (
        ("pre-trained", "speedrun.py") if grow else ("fine-tuned", "phase2_finetuning/project4_sft/train_sft.py")
    )
    raise ValueError(
        f"there is no {kind} model yet: make one with `uv run python {script}`, or name one by --checkpoint"
    )


def digest_of(model) -> str:
    """A short hash of a model's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def find_text(run, bundled: str | Path = SAMPLE) -> Path:
    """TRAIN_DATA_PATH, or the bundled sample where nothing was downloaded and no path was given."""
    path = Path(run.settings.TRAIN_DATA_PATH)
    if path.is_file() or "TRAIN_DATA_PATH" in run.settings.overrides:
        return path
    run.print(f"{path} is not there: taking the bundled sample; download_data.py gets more")
    return Path(bundled)


def load_conversations(run, path: str | Path, template: ChatTemplate):
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


def remembered(run, model, base: Base) -> float | None:
    """Perplexity on FORGETTING_DATA (tokens of pre-training), or None where it is not given."""
    s = run.settings
    if s.FORGETTING_DATA is None:
        return None
    held_out = TokenDataset(s.FORGETTING_DATA, s.BLOCK_SIZE, base.tokenizer)
    return perplexity(model, held_out, s.EVAL_TOKENS, dtype=running.autocast_dtype(s))


def sample(model, template: ChatTemplate, s) -> str:
    """The model's answer to PROMPT."""
    messages = [{"role": "user", "content": s.PROMPT}]
    return f"user: {s.PROMPT}\nassistant: {''.join(answer(model, template, messages, s.SAMPLE_TOKENS, seed=s.SEED))}"


def conclude(run, val_set, plan, before, base: Base, title: str) -> None:
    """Say what the best model gained and forgot, draw the curves, show an answer."""
    s, out = run.settings, Path(run.settings.OUT_DIR)
    model, tokenizer = load(out / "best.pt", run.device)
    loss = validation_loss(model, val_set, s.EVAL_TOKENS, dtype=running.autocast_dtype(s), plan=plan)
    run.print(f"answers held out: {before[0]:.4f} -> {loss:.4f} nats a token")
    if before[1] is not None:
        run.print(f"perplexity on {s.FORGETTING_DATA}: {before[1]:.2f} -> {remembered(run, model, base):.2f}")
    plot_metrics(out / "metrics.jsonl", out / "curves.png", title)
    run.print(f"--- sample\n{sample(model, ChatTemplate(tokenizer), s)}\n---")
    run.print(f"wrote {', '.join(running.files_of(out))} in {out}; talk to it with "
              f"`uv run python chat.py --checkpoint {out / 'best.pt'}`")  # fmt: skip
