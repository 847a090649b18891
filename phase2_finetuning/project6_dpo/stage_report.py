"""
Stage report

This file implements judging the stages of one model's education on the same held-out text, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - what alignment costs:
  its stages side by side, and how much of pre-training each of them loses
- "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (Rafailov et al., 2023) - accuracy of
  the implicit reward

Each component is explained with paper references for educational purposes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from common.plots import bars
from phase1_foundation.project3_pretrain.data import TokenDataset
from phase1_foundation.project3_pretrain.evaluation import perplexity, validation_loss
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.token_file import fingerprint_of, read_header
from phase2_finetuning.project4_sft.conversations import Message
from phase2_finetuning.project4_sft.other_templates import template_for
from phase2_finetuning.project4_sft.packing import ConversationDataset, apart, render_within
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.vocabulary import without_chat_tokens
from phase2_finetuning.project6_dpo.judging import Judgement, answers_to, judge, mean_length
from phase2_finetuning.project6_dpo.pairing import PreferenceDataset, render_pair
from phase2_finetuning.project6_dpo.preferences import Preference

PROMPTS = ("What is the capital of France?", "Name three colors.", "What is a noun?")


@dataclass(frozen=True)
class HeldOut:
    """What stages are judged on; whatever is left out is not measured."""

    pretrain_data: str | Path | None = None  # a val.bin of pre-training: perplexity
    conversations: Sequence[list[Message]] = ()  # held-out conversations: nats a token of the answers
    preferences: Sequence[Preference] = ()  # held-out pairs: which answer the model prefers
    prompts: Sequence[str] = PROMPTS  # answered by every stage, in a transcript where it knows no template
    max_tokens: int | None = None  # of each set: only so many tokens, evenly spread


@dataclass(frozen=True)
class Stage:
    """What is known of one stage; None where it could not be measured, with the reason in `missing`."""

    name: str
    parameters: int
    tokenizer: str = ""  # its fingerprint
    perplexity: float | None = None  # on text of pre-training
    answer_loss: float | None = None  # nats a token of held-out answers
    judgement: Judgement | None = None  # of held-out pairs, against the first stage that can be asked
    answers: Sequence[str] = ()  # to the prompts
    answer_length: float | None = None  # tokens of these answers, on average
    missing: Mapping[str, str] = field(default_factory=dict)  # measure -> why it is missing


def evaluate_stages(paths: Mapping[str, str | Path], held_out: HeldOut, device="cpu", dtype=None) -> list[Stage]:
    """
    Judge checkpoints on the same held-out sets, one model in memory at a time

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 4.2.
    PAPER CONTEXT: RLHF makes a model better liked and, on public language tasks, worse: the "alignment tax".
    INTUITION: the same exam after every year of school shows what was learned, and what was forgotten for it.
    IMPLEMENTATION: the first stage that knows the chat template is the reference of the implicit rewards (its own
        accuracy is a tie, 50%). A vocabulary that has grown by the template's tokens still reads pre-training's text.
    WHY: a stage that looks good on its own measure may have paid for it elsewhere.

    Args:
        paths: name -> whatever `load` takes, in the order of the stages.
        dtype: autocast's type, or None.
    """
    stages, first = [], None  # the first one that can be asked
    for name, path in paths.items():
        stage = evaluate_stage(name, path, held_out, device, dtype)
        if stage.judgement is not None:
            first = first or stage
            stage = _against(first, stage)
        stages.append(stage)
    return stages


def _against(first: Stage, stage: Stage) -> Stage:
    """A stage with its judgement against that of the first one, if both judged the same tokens in the same order."""
    same_tokens = stage.judgement.lengths.equal(first.judgement.lengths)
    if stage.tokenizer == first.tokenizer and same_tokens:
        judgement = dataclasses.replace(stage.judgement, reference=first.judgement.sums)
        return dataclasses.replace(stage, judgement=judgement)
    missing = {**stage.missing, "judgement": f"its tokenizer or its context is another than that of {first.name}"}
    return dataclasses.replace(stage, judgement=None, missing=missing)


def evaluate_stage(name: str, path: str | Path, held_out: HeldOut, device="cpu", dtype=None) -> Stage:
    """All that can be measured of one checkpoint; its judgement is its own reference."""
    model, tokenizer = load(path, device, torch.float32)
    found, missing = {}, {}
    measures = {"perplexity": _perplexity, "answer_loss": _answer_loss, "judgement": _judgement}
    for measure, function in measures.items():
        try:
            found[measure] = function(model, tokenizer, held_out, dtype)
        except ValueError as error:  # none of the template's tokens, another tokenizer than the data's, too short ...
            missing[measure] = str(error)
    try:
        template = template_for(tokenizer, path)
        found["answers"] = answers_to(model, template, [[{"role": "user", "content": p}] for p in held_out.prompts])
        found["answer_length"] = mean_length(template, found["answers"])
    except ValueError as error:
        missing["answers"] = str(error)
    return Stage(
        name,
        sum(p.numel() for p in model.parameters()),
        tokenizer="" if tokenizer is None else fingerprint_of(tokenizer),
        missing=missing,
        **found,
    )


def _perplexity(model, tokenizer, held_out, dtype):
    """On the text of pre-training, whose tokens are those of the tokenizer before it grew."""
    if held_out.pretrain_data is None:
        return None
    if tokenizer is None:
        raise ValueError("it was saved without a tokenizer")
    made_with = read_header(held_out.pretrain_data)["tokenizer"]
    known = (fingerprint_of(tokenizer), fingerprint_of(without_chat_tokens(tokenizer)))
    block = min(model.config.block_size, 1024)
    data = TokenDataset(held_out.pretrain_data, block, None if made_with in known else known[0])  # raises for others
    return perplexity(model, data, held_out.max_tokens, dtype=dtype)


def _answer_loss(model, tokenizer, held_out, dtype):
    """Nats a token of held-out answers."""
    template = ChatTemplate(tokenizer)
    if not held_out.conversations:
        return None
    block = min(model.config.block_size, 1024)
    samples = [render_within(template, messages, block + 1) for messages in held_out.conversations]
    data = ConversationDataset(samples, block, template.start_id)
    return validation_loss(model, data, held_out.max_tokens, dtype=dtype, plan=apart(template.start_id))


def _judgement(model, tokenizer, held_out, dtype):
    """What the model says of the held-out pairs."""
    template = ChatTemplate(tokenizer)
    if not held_out.preferences:
        return None
    block = min(model.config.block_size, 1024)
    pairs = [render_pair(template, preference, block) for preference in held_out.preferences]
    data = PreferenceDataset(pairs, block, template.start_id)
    found = judge(model, data, held_out.max_tokens, dtype)
    return dataclasses.replace(found, reference=found.sums)


# column -> (figure of a stage or None, its format, the measure that would tell why it is missing)
COLUMNS = {
    "parameters": (lambda stage: stage.parameters / 1e6, "{:.2f}M", ""),
    "perplexity (pre-training)": (lambda stage: stage.perplexity, "{:.2f}", "perplexity"),
    "nats/token (answers)": (lambda stage: stage.answer_loss, "{:.4f}", "answer_loss"),
    "reward accuracy": (lambda stage: stage.judgement and stage.judgement.accuracy, "{:.1%}", "judgement"),
    "margin (nats)": (lambda stage: stage.judgement and stage.judgement.margin, "{:.2f}", "judgement"),
    "chosen likelier per token": (lambda stage: stage.judgement and stage.judgement.likelier_per_token, "{:.1%}",
                                  "judgement"),
    "tokens an answer": (lambda stage: stage.answer_length, "{:.1f}", "answers"),
}  # fmt: skip


def cells(stages: Sequence[Stage]) -> list[list[str]]:
    """The table of stages: its heading and a row for each; columns that no stage has are left out."""
    figures = {name: [figure(stage) for stage in stages] for name, (figure, *_) in COLUMNS.items()}
    shown = [name for name in COLUMNS if any(value is not None for value in figures[name])]
    rows = [["stage", *shown]]
    for i, stage in enumerate(stages):
        values = ((figures[name][i], COLUMNS[name][1]) for name in shown)
        rows.append([stage.name, *("-" if value is None else form.format(value) for value, form in values)])
    return rows


def reasons(stages: Sequence[Stage]) -> list[str]:
    """Why there is a dash in the table, one line for each stage and reason."""
    found = []
    for stage in stages:
        names = {}  # reason -> columns
        for column, (_, _, measure) in COLUMNS.items():
            if measure in stage.missing:
                names.setdefault(stage.missing[measure], []).append(column)
        found += [f"{stage.name}: no {', '.join(columns)}, as {reason}" for reason, columns in names.items()]
    return found


def markdown(stages: Sequence[Stage], prompts: Sequence[str] = PROMPTS) -> str:
    """The table, the reasons for its gaps, and the answers side by side, as Markdown."""
    head, *rows = cells(stages)
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    lines += ["", *(f"- {reason}" for reason in reasons(stages)), ""]
    answered = [stage for stage in stages if stage.answers]
    if answered:
        table = [["prompt", *(stage.name for stage in answered)], ["---"] * (1 + len(answered))]
        table += [[prompt, *(stage.answers[i] for stage in answered)] for i, prompt in enumerate(prompts)]
        lines += ["| " + " | ".join(_cell(text) for text in row) + " |" for row in table]
    return "\n".join(lines).strip() + "\n"


def _cell(text: str) -> str:
    """A text that stays within a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|") or "(nothing)"


def plain(stages: Sequence[Stage], prompts: Sequence[str] = PROMPTS) -> str:
    """The same for the terminal."""
    rows = cells(stages)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += reasons(stages)
    width = max(len(stage.name) for stage in stages)
    for i, prompt in enumerate(prompts):
        lines += ["", f"user: {prompt}"]
        lines += [f"{stage.name:>{width}}: {' '.join(stage.answers[i].split())}" for stage in stages if stage.answers]
    return "\n".join(lines)


def draw(path: str | Path, stages: Sequence[Stage]) -> Path | None:
    """Bars of what the stages gained and lost, each measure relative to the first stage that has it."""
    measures = {
        "perplexity, text of pre-training": [stage.perplexity for stage in stages],
        "loss on held-out answers": [stage.answer_loss for stage in stages],
        "reward accuracy on held-out pairs": [stage.judgement and stage.judgement.accuracy for stage in stages],
    }
    groups = {}
    for name, values in measures.items():
        first = next((value for value in values if value is not None), None)
        if first is not None:
            groups[name] = [None if value is None else value / first for value in values]
    labels = [stage.name for stage in stages]
    return bars(path, labels, groups, "relative to the first stage that has it", "Stages") if groups else None
