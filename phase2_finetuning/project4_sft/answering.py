"""
Answering

This file implements asking a fine-tuned model, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - a model that answers
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - sampling from the nucleus

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import torch

from phase1_foundation.project1_minimal_gpt.sampling import stream
from phase1_foundation.project3_pretrain.writing import KnownTokens
from phase2_finetuning.project4_sft.conversations import Message
from phase2_finetuning.project4_sft.packing import SHORTEST


class Template(Protocol):
    """How a model is spoken to: `ChatTemplate`, and those in other_templates.py."""

    tokenizer: Any  # encodes, decodes, knows its `vocab_size`
    stop_ids: frozenset[int]  # tokens that end an answer
    stop_text: str | None  # text that ends it, for models that have no such token

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to where the assistant begins to speak."""
        ...

    def cut(self, tokens: list[int], limit: int) -> list[int]:
        """A prompt of at most `limit` tokens out of one that is too long."""
        ...


def prompt_within(template: Template, messages: Sequence[Message], limit: int) -> list[int]:
    """The tokens that wait for an answer, at most `limit`: the oldest exchanges are forgotten first.

    Where the last question alone is left, the system message goes, too, and the question keeps its end.
    """
    messages, limit = list(messages), max(limit, SHORTEST)
    first = 1 if messages[0]["role"] == "system" else 0
    tokens = template.prompt(messages)
    while len(tokens) > limit and len(messages) > 1:
        messages = messages[:first] + messages[first + 2 :] if len(messages) > first + 1 else messages[first:]
        tokens = template.prompt(messages)
    return tokens if len(tokens) <= limit else template.cut(tokens, limit)


def sayable(text: str, stop_text: str | None) -> str:
    r"""What may be shown of a text that goes on: no half character, nothing that may yet become the stop text.

    >>> sayable("Yes.\nUs", "\nUser:"), sayable("Yes.\nUse it.", "\nUser:")
    ('Yes.', 'Yes.\nUse it.')
    """
    text = text.rstrip("\ufffd")
    for length in range(min(len(text), len(stop_text or "")), 0, -1):
        if text.endswith(stop_text[:length]):
            return text[:-length]
    return text


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
    """
    What the assistant says next, piece by piece

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.1.
    PAPER CONTEXT: after supervised fine-tuning the model continues a prompt with an answer to it.
    INTUITION: the play's text stops after "ASSISTANT:", and the model writes the line.
    IMPLEMENTATION: project 1's `stream`, uncached, until the template's end; text is passed on as soon as its bytes are
        whole characters. Up to half of the context is kept free for the answer, which ends with the context: beyond it
        the question would slide out of sight.
    WHY: chat in the terminal, samples during training and the evaluation of answers are this one loop.

    The model is put into eval mode for the time of the answer. The generator returns whether the answer is whole (the
    model ended it itself).
    """
    block_size = model.config.block_size
    prompt = prompt_within(template, messages, block_size - min(max_new_tokens, block_size // 2))
    room = max(1, min(max_new_tokens, block_size - len(prompt)))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    known = KnownTokens(model, template.tokenizer.vocab_size)
    decode, stop_text = template.tokenizer.decode, template.stop_text
    ids, said, whole, training = [], "", False, model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
            for token in stream(known, prompt, room, stop=template.stop_ids, **sampling):
                if whole := token in template.stop_ids:
                    break
                ids.append(token)
                if whole := bool(stop_text) and stop_text in decode(ids):
                    break
                shown = sayable(decode(ids), stop_text)
                if len(shown) > len(said):
                    yield shown[len(said) :]
                    said = shown
        text = decode(ids).split(stop_text)[0] if stop_text else decode(ids)
        if len(text) > len(said):
            yield text[len(said) :]
        return whole
    finally:
        model.train(training)
