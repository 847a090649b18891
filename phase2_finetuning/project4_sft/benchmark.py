"""Measure project 4: how full packed rows are, and what that brings, against padding every batch to its longest.

    uv run python phase2_finetuning/project4_sft/benchmark.py

The peer pads as `transformers`' DataCollatorForSeq2Seq does, the usual way to fine-tune with that library; model,
optimizer and conversations are the same, and both are timed in turn.
"""

import itertools
import types

import torch

from common.benchmark import Report, measure
from common.plots import curves
from common.run import Run
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase1_foundation.project3_pretrain.optimizers import build_optimizer
from phase1_foundation.project3_pretrain.preparation import load_tokenizer
from phase1_foundation.project3_pretrain.trainer import NextToken, Step
from phase2_finetuning.project4_sft import benchmark_config
from phase2_finetuning.project4_sft.conversations import read_conversations
from phase2_finetuning.project4_sft.packing import ConversationDataset, apart, render_within
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import with_chat_tokens


def main(argv=None):
    """Run all parts and write the results."""
    with Run(benchmark_config, argv, description=__doc__) as run:
        s = run.settings
        report = Report("project4_sft", "Supervised fine-tuning", run.device)
        template = ChatTemplate(with_chat_tokens(small_tokenizer(s)))
        samples = [render_within(template, talk, s.BLOCK_SIZE + 1) for talk in read_conversations(s.CORPUS)]
        data = ConversationDataset(samples, s.BLOCK_SIZE, template.start_id)
        check_losses(report, samples[:8], template, s)
        packed = itertools.islice(map(data.batches(s.SEED, s.ROWS, s.ROWS).__getitem__, itertools.count()), s.STEPS)
        packed = [micros[0] for micros in packed]
        padded = pad(samples, template, s)
        compare_fill(report, data, padded, s)
        compare_speed(report, template, packed, padded[: s.STEPS], s, run.device)
        draw(report, template, s)
        report.finish()


def draw(report, template, s):
    """How full rows are, by their length: the longer the rows, the more a padded batch wastes."""
    talks, sizes = read_conversations(s.CORPUS), (64, 128, 256, 512)
    fills = {"packed": [], "padded to the longest of a batch": []}
    for size in sizes:
        settings = types.SimpleNamespace(ROWS=s.ROWS, BLOCK_SIZE=size)
        samples = [render_within(template, talk, size + 1) for talk in talks]
        fills["packed"].append(100 * ConversationDataset(samples, size, template.start_id).fill)
        fills["padded to the longest of a batch"].append(100 * fill_of(pad(samples, template, settings)))
    curves(report.folder / f"project4_sft.{report.slug}.png", {name: (sizes, ys) for name, ys in fills.items()},
           "tokens of a row", "places that hold a conversation (%)", "The bundled conversations, packed and padded",
           logx=True, ylim=(0, 105))  # fmt: skip


def small_tokenizer(s) -> BPETokenizer:
    """GPT-2's tokenizer on a GPU; on a CPU a vocabulary learned from the conversations themselves."""
    if s.PRESET == "gpt2":
        return load_tokenizer("gpt2")
    texts = [message["content"] for talk in read_conversations(s.CORPUS) for message in talk]
    return BPETokenizer.train(texts, 4000, ["<|endoftext|>"], rule="merges")


def pad(samples, template, s):
    """Batches of about as many places as a packed one, in the order of the file, padded by transformers' collator."""
    from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_empty_tokenizer(), pad_token="<pad>")
    collate = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    batches, members = [], []
    for tokens, mask in samples:
        longest = max([len(tokens), *(len(member["input_ids"]) for member in members)])
        if members and longest * (len(members) + 1) > s.ROWS * s.BLOCK_SIZE:
            batches.append(collate(members))
            members = []
        labels = [token if one else -100 for token, one in zip(tokens[1:], mask[1:])]
        members.append({"input_ids": tokens[:-1], "attention_mask": [1] * len(labels), "labels": labels})
    batches.append(collate(members))
    return [(batch["input_ids"], batch["labels"]) for batch in batches]


def _empty_tokenizer():
    """What a collator needs of a tokenizer: nothing but a padding token."""
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))


def check_losses(report, samples, template, s):
    """The summed loss of some conversations, packed and padded: the same, or the rest would prove nothing."""
    torch.manual_seed(s.SEED)
    model = Transformer(PRESETS["cpu-tiny"](vocab_size=-(-template.tokenizer.vocab_size // 64) * 64,
                                            block_size=s.BLOCK_SIZE)).eval()  # fmt: skip
    data = ConversationDataset(samples, s.BLOCK_SIZE, template.start_id)
    with torch.no_grad():
        packed = sum(float(NextToken(apart(template.start_id))(model, batch)) for batch in data.windows(4))
        padded = sum(float(NextToken()(model, batch)) for batch in pad(samples, template, s))
    report.check("packed and padded conversations cost the same", abs(packed - padded) < 1e-4 * padded,
                 f"{packed:.4f} and {padded:.4f} nats")  # fmt: skip


def compare_fill(report, data, padded, s):
    """How many of the places that the model computes belong to a conversation."""
    report.row("places that hold a conversation", 100 * data.fill, "%", peer=100 * fill_of(padded),
               peer_name="padded to the longest of a batch, transformers' collator", limit=100, limit_name="all",
               note=f"{data.n_samples:,} conversations, rows of {s.BLOCK_SIZE} tokens")  # fmt: skip


def fill_of(batches):
    """The part of all places that lie before the last target of their row."""
    used = sum(int((targets.shape[1] - (targets.flip(1) != -100).int().argmax(1)).sum()) for _, targets in batches)
    return used / sum(targets.numel() for _, targets in batches)


def compare_speed(report, template, packed, padded, s, device):
    """Learned tokens a second, forward, backward and update, packed against padded."""
    steps = {}
    for name, batches, plan in (("packed", packed, apart(template.start_id)), ("padded", padded, None)):
        torch.manual_seed(s.SEED)
        vocab_size = -(-template.tokenizer.vocab_size // 64) * 64
        model = Transformer(PRESETS[s.PRESET](vocab_size=vocab_size, block_size=s.BLOCK_SIZE)).to(device)
        dtype = torch.bfloat16 if device.type == "cuda" else None
        steps[name] = _Round(
            Step(model, NextToken(plan), build_optimizer(model, "adamw", 1e-4, 0.0), 1.0, dtype), batches
        )
    timings = measure(steps, s.REPEATS, 1, device)
    rate = timings["packed"].rate(steps["packed"].learned)
    report.row("learned tokens a second", rate[0], "tok/s", spread=rate[1:],
               peer=steps["padded"].learned / timings["padded"].median, peer_name="padded, same model and optimizer",
               note=f"{s.PRESET}, about {s.ROWS * s.BLOCK_SIZE:,} places a step; AdamW included")  # fmt: skip


class _Round:
    """A round of optimizer steps, one for each batch."""

    def __init__(self, step, batches):
        self.step, self.batches = step, batches
        self.learned = sum(step.objective.count(batch) for batch in batches)

    def __call__(self):
        """Take the steps."""
        for batch in self.batches:
            self.step.backward([batch], self.step.objective.count(batch))
            self.step.update(1.0)


if __name__ == "__main__":
    main()
