"""
Answering through a cache

This file implements the answers of a chat following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - a model that answers
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - each token costs a step, not a forward of the whole

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Generator, Sequence

import torch

from phase2_finetuning.project4_sft.answering import Template, prompt_within
from phase2_finetuning.project4_sft.conversations import Message
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, stream


def answer(
    model: torch.nn.Module,
    template: Template,
    messages: Sequence[Message],
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    seed: int | None = None,
) -> Generator[str, None, bool]:
    """What the assistant says next, piece by piece: project 4's `answer` with a cache.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.1.
    PAPER CONTEXT: after supervised fine-tuning the model continues a prompt with an answer to it.
    INTUITION: the same play, but the actor no longer reads the script from page one before every word.
    IMPLEMENTATION: `stream` up to the template's end tokens or end text; up to half of the context is kept free for the
        answer. The conversation is prefilled anew each turn: keeping it is project 10's work.
    WHY: an answer of T tokens costs T steps, not T forwards of everything said so far.

    The generator returns whether the answer is whole (the model ended it itself).
    """
    block_size = model.config.block_size
    prompt = prompt_within(template, messages, block_size - min(max_new_tokens, block_size // 2))
    params = SamplingParams(
        max(1, min(max_new_tokens, block_size - len(prompt))), temperature, top_k, top_p, seed=seed,
        stop=(template.stop_text,) if template.stop_text else (), stop_ids=template.stop_ids,
    )  # fmt: skip
    reason = None
    for piece in stream(model, template.tokenizer, prompt, params):
        reason = piece.finish_reason
        if piece.text:
            yield piece.text
    return reason == "stop"
