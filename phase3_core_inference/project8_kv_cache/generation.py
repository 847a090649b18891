"""
Generation

This file implements text from prompts, through a cache, following:
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - prefill once, then one decode step a token
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - sampling

Each component is explained with paper references for educational purposes.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from phase3_core_inference.project8_kv_cache.kv_cache import KVCache
from phase3_core_inference.project8_kv_cache.machine import Machine, Prompt, plain
from phase3_core_inference.project8_kv_cache.sampling import Logprobs, Sampler
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase3_core_inference.project8_kv_cache.texts import Generation, Piece, TextRequest, append
from phase3_core_inference.project8_kv_cache.work import Work

__all__ = [
    "Generation",
    "Piece",
    "Prompt",
    "SamplingParams",
    "Writer",
    "append",
    "as_lists",
    "generate",
    "is_one",
    "prepare",
    "stream",
]


class Prefixes(Protocol):
    """What remembers the beginnings of texts between requests; first in project 10."""

    def restore(self, cache: KVCache, row: int, tokens: Sequence[int]) -> int:
        """Put what is known of the beginning of a text into an empty row: so many tokens, but never all of them."""
        ...

    def keep(self, cache: KVCache, row: int, tokens: Sequence[int]) -> None:
        """Remember a text, whose keys and values are in this row."""
        ...


class Writer(Machine):
    """A model with a cache, ready to continue prompts; what was compiled or recorded serves all calls.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: prefill runs over the prompt in parallel; decoding appends token by token, each time reading weights
        and cache.
    INTUITION: read the question once; then speak word by word from the notes.
    IMPLEMENTATION: rows of the cache are given to prompts, chunks of prompts to steps of at most `chunk` tokens; then
        all rows take a decode step at a time until each has ended. Ragged rows need no padding.
    WHY: the one loop behind `generate`, `stream`, the chat and the scripts.

    One stream at a time: raises ValueError when another is begun before it has ended or was closed.

    Args:
        chunk: the most tokens of a prefill step; others: as of `Machine`.
        prefixes: what remembers texts, so that a prompt that begins like one of them is not read again.
    """

    def __init__(
        self,
        model,
        tokenizer,
        n_rows: int = 1,
        capacity: int | None = None,
        cache: str | Callable[..., KVCache] = "contiguous",
        chunk: int = 512,
        compiled: bool = False,
        graphs: bool = False,
        prefixes: Prefixes | None = None,
    ):
        super().__init__(model, tokenizer, n_rows, capacity, cache, compiled, graphs)
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1: the most tokens of a prefill step")
        self.chunk, self.prefixes = chunk, prefixes
        self._held: set[int] = set()  # rows of texts that have not ended

    def stream(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Iterator[Piece]:
        """Continue prompts, and yield what every token adds as soon as it is known, all prompts in turn."""
        encoded, n_rows = [self.encode(prompt) for prompt in prompts], len(self.cache.lengths)
        for each in params:
            each.check(self.vocab_size())
        requests = [TextRequest(i, p, q, self.tokenizer, self.room) for i, (p, q) in enumerate(zip(encoded, params))]
        return self._run([requests[i : i + n_rows] for i in range(0, len(requests), n_rows)])

    def _run(self, batches: list[list[TextRequest]]) -> Iterator[Piece]:
        training = self.model.training
        self.model.eval()
        try:
            for batch in batches:
                yield from self._batch(batch)
        finally:
            self.model.train(training)

    def _batch(self, requests: list[TextRequest]) -> Iterator[Piece]:
        """One request a row; whatever happens, the rows are free afterwards."""
        if self._held:
            raise ValueError("another stream of this Writer is not finished: close it, or use a second Writer")
        self._held = held = set(range(len(requests)))
        try:
            for row, request in enumerate(requests if self.prefixes else ()):
                request.fed = self.prefixes.restore(self.cache, row, request.tokens)
            yield from self.steps(requests, held)
        finally:
            for row in held:
                self.free(row)
            held.clear()

    def steps(self, requests: list[TextRequest], held: set[int]) -> Iterator[Piece]:
        """From prefill to the last request's end, request i in row i; `held` are the rows that are not yet free."""
        sampler = self.sampler(requests)
        while rows := [row for row, request in enumerate(requests) if request.finish_reason is None]:
            work, tokens = self.next_work(rows, requests)
            logits = self.decoder.step(work, tokens)
            yield from self.draw_all(logits, work, requests, sampler, held)

    def sampler(self, requests: list[TextRequest]) -> Sampler:
        """What draws for these requests."""
        params, prompts = [request.params for request in requests], [request.tokens for request in requests]
        seeds = [random.getrandbits(62) if p.seed is None else p.seed for p in params]
        sampler = Sampler.of(params, seeds, prompts, self.vocab_size(), self.device, self.among)
        sampler.constraints = [request.constraint for request in requests]
        return sampler

    def draw_all(self, logits, work: Work, requests: list[TextRequest], sampler: Sampler, held) -> Iterator[Piece]:
        """A token for every row whose logits were wanted."""
        rows = [row for row, _, n_wanted in work if n_wanted]
        if not rows:
            return
        drawn = sampler.draw(logits, rows, [len(requests[row].tokens) for row in rows])
        for row, token, logprobs in zip(rows, drawn.tokens, drawn.logprobs):
            yield self.take(row, requests[row], token, logprobs, held)

    def take(self, row: int, request: TextRequest, token: int, logprobs: Logprobs | None, held: set[int]) -> Piece:
        """Add a token to a text; where it ends, its row is free."""
        piece = request.accept(token, logprobs)
        if piece.finish_reason:
            if self.prefixes:
                self.prefixes.keep(self.cache, row, request.tokens[: self.cache.lengths[row]])
            self.free(row)
            held.remove(row)
        return piece

    def free(self, row: int) -> None:
        """Forget a row."""
        self.cache.free(row)

    def next_work(self, rows: list[int], requests: list[TextRequest]) -> tuple[Work, list[int]]:
        """Chunks of prompts as long as there are any, then one token of each row."""
        reading = [row for row in rows if requests[row].reading]
        work, tokens, budget = [], [], self.chunk if reading else len(rows)
        for row in reading or rows:
            request = requests[row]
            n = min(len(request.tokens) - request.fed, budget, self.cache.step_limit)
            if n:
                work.append((row, n, int(request.fed + n == len(request.tokens))))
                tokens += request.tokens[request.fed : request.fed + n]
                request.fed, budget = request.fed + n, budget - n
        return work, tokens


def is_one(prompts) -> bool:
    """Whether this is one prompt, not several."""
    return isinstance(prompts, str) or (len(prompts) > 0 and isinstance(plain(prompts[0]), int))


def as_lists(prompts, params) -> tuple[list[Prompt], list[SamplingParams]]:
    """What `generate` and `stream` are given, as lists of equal length; raises ValueError where they are not."""
    prompts = [prompts] if is_one(prompts) else list(prompts)
    params = params or SamplingParams()
    params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if not prompts or len(params) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(params)} sampling parameters: give at least one prompt, and "
                         f"one SamplingParams for all, or one for each")  # fmt: skip
    return prompts, params


def prepare(kind, model, tokenizer, prompts, params, options) -> tuple[Writer, list[Prompt], list[SamplingParams]]:
    """A writer of this kind with room for these prompts, and `as_lists`."""
    prompts, params = as_lists(prompts, params)
    if tokenizer is not None and "capacity" not in options:
        lengths = [len(tokenizer.encode(p)) if isinstance(p, str) else len(p) for p in prompts]
        options = options | {"capacity": max(max(n, 1) + p.max_new_tokens for n, p in zip(lengths, params))}
    return kind(model, tokenizer, **({"n_rows": min(len(prompts), 64)} | options)), prompts, params


def stream(model, tokenizer, prompts: Prompt | Sequence[Prompt], params=None, **options) -> Iterator[Piece]:
    """Continue prompts and yield what every token adds, as soon as it is known; arguments as of `generate`."""
    writer, prompts, params = prepare(Writer, model, tokenizer, prompts, params, options)
    return writer.stream(prompts, params)


def generate(
    model,
    tokenizer,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    **options,
) -> Generation | list[Generation]:
    """Continue one prompt, or many at once.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: prefill computes keys and values of the prompt in one pass, decoding adds a token at a time.
    INTUITION: the whole machine behind one call.
    IMPLEMENTATION: a `Writer` with as much room as is needed; the pieces of each prompt are put together.
    WHY: what most callers want; who wants to see text as it comes calls `stream`, who calls often keeps a `Writer`.

    Args:
        prompts: a text, or token ids (list, tensor, array), or a list of these; params: one for all, or one for each.
        options: of `Writer`: cache, chunk, compiled, graphs, n_rows, capacity.

    Returns a Generation, or for a list a list of them.
    """
    writer, many, params = prepare(Writer, model, tokenizer, prompts, params, options)
    texts = [Generation(len(writer.encode(prompt))) for prompt in many]
    for piece in writer.stream(many, params):
        append(texts[piece.index], piece)
    return texts[0] if is_one(prompts) else texts
