"""
Asking

This file implements turning what a client wants into prompts and sampling parameters following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - a conversation is put to
  the model in the form it was taught
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - how a text is sampled

Each component is explained with paper references for educational purposes.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace

from phase2_finetuning.project4_sft.other_templates import template_for
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase10_deployment.project28_serving.choices import Words, sendable
from phase10_deployment.project28_serving.errors import ApiError, bad_request
from phase10_deployment.project28_serving.grammar import (
    bytes_of_tokens,
    check_grammar,
    json_object_grammar,
    json_schema_grammar,
)
from phase10_deployment.project28_serving.protocol import ChatRequest, CompletionRequest, Message, Sampling, Tool
from phase10_deployment.project28_serving.tools import plain_messages, tool_grammar
from phase10_deployment.project28_serving.worker import Ask, Card

LONG = 20_000  # characters, from which on texts are encoded in a thread, so that others need not wait


@dataclass(frozen=True)
class Limits:
    """How much one request may ask for."""

    choices: int = 16  # texts: n times the number of prompts
    inputs: int = 256  # texts to embed
    stops: int = 16  # stop texts
    stop_length: int = 256  # characters of one


class Asking:
    """Requests of clients, as the engine wants them.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.5.
    PAPER CONTEXT: prompts are written in the form of the demonstrations that the model was trained on.
    INTUITION: the waiter writes "2x soup, no salt", whatever the guest's own words were.
    IMPLEMENTATION: the template's tokens for a conversation, the tokenizer's for a text; what the client leaves open is
        filled in; what the model cannot do is refused with the field that asked for it.
    WHY: everything that can be refused is refused before it takes a place in the queue.

    Args:
        card: of the engine; name: of the model without adapter; limits: of a request.
    """

    def __init__(self, card: Card, name: str, limits: Limits | None = None):
        self.card, self.name, self.limits = card, name, limits or Limits()
        self.tokenizer = card.tokenizer
        self.template = template_for(card.tokenizer, card.source)
        self._words: Words | None = None

    @property
    def models(self) -> list[str]:
        """The names that a request may give: the model's, and its adapters'."""
        return [self.name, *self.card.adapters]

    async def words(self) -> Words:
        """What tokens mean; raises ApiError where this tokenizer does not say it."""
        if self._words is None:
            try:
                spelled, _ = await asyncio.to_thread(bytes_of_tokens, self.tokenizer)
            except ValueError as error:
                raise bad_request(f"logprobs: {error}", "logprobs", "invalid_value") from error
            self._words = Words(self.tokenizer.decode, spelled)
        return self._words

    def adapter(self, model: str | None) -> str | None:
        """The adapter that a model's name stands for; raises ApiError 404 for a name that is none."""
        if model is None or model == self.name:
            return None
        if model not in self.card.adapters:
            known = ", ".join(self.models)
            raise ApiError(
                404, f"the model {model!r:.80} does not exist: there are {known}", "model", "model_not_found"
            )
        return model

    # -- prompts

    def decode(self, tokens: list[int]) -> str:
        """The text of some tokens, as it can be sent."""
        return sendable(self.tokenizer.decode(tokens))

    async def encode(self, texts: Sequence[str], field: str) -> list[list[int]]:
        """The tokens of some texts; raises ApiError for one that this vocabulary cannot spell."""

        def encoded() -> list[list[int]]:
            return [list(self.tokenizer.encode(text)) for text in texts]

        try:
            return await asyncio.to_thread(encoded) if sum(map(len, texts)) > LONG else encoded()
        except (ValueError, TypeError) as error:
            raise bad_request(f"{field}: {error}", field, "invalid_value") from error

    async def conversation(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        """The tokens up to where the assistant begins to speak."""
        plain = [message.model_dump(exclude_none=True) for message in messages]
        described = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        try:
            told = plain_messages(plain, described)
            if sum(len(message["content"]) for message in told) > LONG:
                return list(await asyncio.to_thread(self.template.prompt, told))
            return list(self.template.prompt(told))
        except (ValueError, TypeError) as error:
            raise bad_request(f"messages: {error}", "messages", "invalid_value") from error

    async def prompts(self, given, field: str, most: int) -> list[list[int]]:
        """One text or list of tokens, or at most so many of either, as lists of tokens."""
        many = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if not given and isinstance(given, list):
            raise bad_request(f"{field} is an empty list: give a text, or token ids", field, "invalid_value")
        if len(many) > most:
            raise bad_request(f"{field} holds {len(many)} texts: at most {most} at a time", field, "too_many_texts")
        encoded = iter(await self.encode([each for each in many if isinstance(each, str)], field))
        return [self.checked(next(encoded) if isinstance(each, str) else each, field) for each in many]

    def checked(self, tokens: list[int], field: str) -> list[int]:
        """The same tokens, if the model can go on from there; an empty text begins a document."""
        tokens = self.known(tokens, field) or [getattr(self.tokenizer, "eot_id", None) or 0]
        if len(tokens) >= self.card.room:
            raise bad_request(f"{len(tokens)} tokens in {field}: this model's maximum context length is "
                              f"{self.card.room} tokens, the answer among them", field,
                              "context_length_exceeded")  # fmt: skip
        return tokens

    def known(self, tokens: list[int], field: str) -> list[int]:
        """The same tokens, if the vocabulary has them all."""
        if tokens and max(tokens) >= self.card.vocab_size:
            raise bad_request(f"{field} holds the token {max(tokens)}: ids go from 0 to {self.card.vocab_size - 1}",
                              field, "invalid_value")  # fmt: skip
        return tokens

    # -- parameters

    def params(self, request: Sampling) -> SamplingParams:
        """What all requests have in common, as sampling parameters; raises ApiError that names the field."""
        stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
        if len(stops) > self.limits.stops or any(len(stop) > self.limits.stop_length for stop in stops):
            raise bad_request(f"stop: at most {self.limits.stops} texts of at most {self.limits.stop_length} "
                              f"characters", "stop", "invalid_value")  # fmt: skip
        bias = {int(token): float(value) for token, value in (request.logit_bias or {}).items()}
        if bias and max(bias) >= self.card.vocab_size:
            raise bad_request(f"logit_bias names token {max(bias)}: ids go from 0 to {self.card.vocab_size - 1}",
                              "logit_bias", "invalid_value")  # fmt: skip
        top_k = request.top_k if request.top_k and request.top_k > 0 else None
        return SamplingParams(
            max_new_tokens=min(request.max_tokens or self.card.room, self.card.room),
            temperature=1.0 if request.temperature is None else request.temperature,
            top_k=top_k, top_p=_nucleus(request.top_p), min_p=request.min_p,
            repetition_penalty=request.repetition_penalty or 1.0, presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0, logit_bias=bias or None, stop=tuple(stops),
            stop_ids=frozenset() if request.ignore_eos else None, seed=request.seed,
        )  # fmt: skip

    def asks(self, request: Sampling, prompts: Sequence[list[int]], params, guest: str, grammar=None) -> list[Ask]:
        """n texts for each prompt, each with a seed of its own."""
        n, adapter = request.n or 1, self.adapter(request.model)
        if n * len(prompts) > self.limits.choices:
            raise bad_request(f"n={n} for {len(prompts)} prompts: at most {self.limits.choices} texts at a time", "n",
                              "too_many_texts")  # fmt: skip
        seeds = [None if params.seed is None else params.seed + i for i in range(n * len(prompts))]
        each = [replace(params, seed=seed) for seed in seeds]
        return [
            Ask(prompt, each[i * n + j], guest, adapter, grammar) for i, prompt in enumerate(prompts) for j in range(n)
        ]

    # -- whole requests

    async def chat(self, request: ChatRequest, guest: str = "") -> list[Ask]:
        """What a chat request asks of the engine; guest: whose it is, for fairness."""
        self.adapter(request.model)
        grammar = await self.grammar(request)
        prompt = self.checked(await self.conversation(request.messages, self.tools(request)), "messages")
        params, end = self.params(request), self.template.stop_text
        limit = request.max_completion_tokens or params.max_new_tokens
        params = replace(
            params, max_new_tokens=min(limit, self.card.room), stop=(*params.stop, *([end] if end else [])),
            # A text that is bound to a grammar ends where that does, whatever the client wants ignored.
            stop_ids=params.stop_ids if request.ignore_eos and grammar is None else self.template.stop_ids,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )  # fmt: skip
        return self.asks(request, [prompt], params, guest, grammar)

    async def completion(self, request: CompletionRequest, guest: str = "") -> list[Ask]:
        """What a completion request asks of the engine."""
        self.adapter(request.model)
        prompts = await self.prompts(request.prompt, "prompt", self.limits.choices)
        limit = min(request.max_tokens or 16, self.card.room)  # 16 is OpenAI's default for this route
        params = replace(self.params(request), max_new_tokens=limit, logprobs=request.logprobs)
        return self.asks(request, prompts, params, guest)

    def tools(self, request: ChatRequest) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if request.tool_choice == "none" else request.tools or []

    async def grammar(self, request: ChatRequest) -> str | None:
        """What the answer must look like, checked; raises ApiError that names the field."""
        form, choice = request.response_format, request.tool_choice or "auto"
        described = [tool.model_dump(exclude_none=True) for tool in self.tools(request)]
        bound = form is not None and form.type != "text"
        field = "response_format" if bound else "tools"
        if bound and described:
            raise bad_request("response_format and tools exclude each other: give one, or tool_choice none", field)
        try:
            if bound:
                grammar = json_object_grammar() if form.type == "json_object" else json_schema_grammar(
                    form.json_schema.definition)  # fmt: skip
            else:
                name = choice if isinstance(choice, str) else choice.function.name
                parallel = request.parallel_tool_calls is not False
                return await asyncio.to_thread(tool_grammar, described, name, parallel)  # checked by itself
            await asyncio.to_thread(check_grammar, grammar)
        except ValueError as error:
            raise bad_request(f"{field}: {error}", field, "invalid_schema") from error
        return grammar


def _nucleus(top_p: float | None) -> float | None:
    """0 asks for the likeliest token alone, which the smallest nucleus is."""
    return 1e-6 if top_p == 0 else top_p
