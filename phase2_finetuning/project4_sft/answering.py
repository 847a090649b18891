"""
Answering

This file implements asking a fine-tuned model, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - a model that answers
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - sampling from the nucleus

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Generator, Sequence

import torch

from phase1_foundation.project1_minimal_gpt.sampling import stream
from phase1_foundation.project3_pretrain.writing import KnownTokens
from phase2_finetuning.project4_sft.conversations import Message
from phase2_finetuning.project4_sft.packing import SHORTEST
from phase2_finetuning.project4_sft.template import ChatTemplate


def prompt_within(template: ChatTemplate, messages: Sequence[Message], limit: int) -> list[int]:
    """The tokens that wait for an answer, at most `limit`: the oldest exchanges are forgotten first.

    Where the last question alone is left, the system message goes, too, and the question keeps its end.
    """
    messages, limit = list(messages), max(limit, SHORTEST)
    first = 1 if messages[0]["role"] == "system" else 0
    tokens = template.prompt(messages)
    while len(tokens) > limit and len(messages) > 1:
        messages = messages[:first] + messages[first + 2 :] if len(messages) > first + 1 else messages[first:]
        tokens = template.prompt(messages)
    return tokens if len(tokens) <= limit else [*tokens[:2], *tokens[len(tokens) - (limit - 2) :]]


def answer(
    model: torch.nn.Module,
    template: ChatTemplate,
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
    IMPLEMENTATION: project 1's `stream`, uncached, until <|end|>; text is passed on as soon as its bytes are whole
        characters. Up to half of the context is kept free for the answer, which ends with the context: beyond it the
        question would slide out of sight.
    WHY: chat in the terminal, samples during training and the evaluation of answers are this one loop.

    The model is put into eval mode for the time of the answer. The generator returns whether the answer is whole (the
    model ended it itself).
    """
    block_size = model.config.block_size
    prompt = prompt_within(template, messages, block_size - min(max_new_tokens, block_size // 2))
    room = max(1, min(max_new_tokens, block_size - len(prompt)))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    known = KnownTokens(model, template.tokenizer.vocab_size)
    ids, said, whole, training = [], "", False, model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
            for token in stream(known, prompt, room, stop=template.stop_ids, **sampling):
                if whole := token in template.stop_ids:
                    break
                ids.append(token)
                text = template.tokenizer.decode(ids)
                if not text.endswith("\ufffd"):  # half a character waits for its other half
                    yield text[len(said) :]
                    said = text
        if rest := template.tokenizer.decode(ids)[len(said) :]:
            yield rest
        return whole
    finally:
        model.train(training)
