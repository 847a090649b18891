"""
Batcher

This file implements the loop that serves many requests at once, step by step, following:
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - iteration-level
  scheduling and selective batching

Each component is explained with paper references for educational purposes.
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from phase3_core_inference.project8_kv_cache.generation import Prefixes, as_lists, is_one
from phase3_core_inference.project8_kv_cache.machine import Machine, Prompt
from phase3_core_inference.project8_kv_cache.sampling import Logprobs, Sampler
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase3_core_inference.project8_kv_cache.texts import Generation, Piece, append
from phase4_advanced_inference.project12_dynamic_batching.capacity import Capacity, Slots
from phase4_advanced_inference.project12_dynamic_batching.request import Request
from phase4_advanced_inference.project12_dynamic_batching.scheduler import Scheduler, Step
from phase4_advanced_inference.project12_dynamic_batching.selective import selective_step


class Batcher(Machine):
    """A machine that requests may join and leave between any two steps.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 3.
    PAPER CONTEXT: after each iteration the engine returns to the scheduler; linear layers run over the tokens of all
        requests together, attention over each request's own keys ("selective batching").
    INTUITION: one kitchen, many tables; what is ready goes out, and a new order is taken at once.
    IMPLEMENTATION: `add` queues, `step` asks the scheduler for work, runs it, draws, and says what each token adds.
        Tokens lie one after the other in one ragged row, attention is grouped by their number (selective.py).
    WHY: the reference of project 13's Runner, which does the same over blocks, and one step ahead of the host.

    The model is put into eval mode. If a step fails, all requests are called off, and the error is raised.

    Args:
        max_tokens: of a step, at least n_rows; patience: see `Scheduler`; prefixes: see `Slots`.
        slots: what makes the capacity from (cache, prefixes); others: as of `Machine`.
    """

    def __init__(
        self,
        model,
        tokenizer,
        n_rows: int = 8,
        capacity: int | None = None,
        max_tokens: int = 512,
        patience: int | None = 256,
        prefixes: Prefixes | None = None,
        slots=Slots,
        **options,
    ):
        super().__init__(model.eval(), tokenizer, n_rows, capacity, **options)
        if max_tokens < n_rows:
            raise ValueError(f"max_tokens={max_tokens} must be at least n_rows={n_rows}: each row decodes one a step")
        self.n_rows = n_rows
        self.scheduler = Scheduler(self.make_capacity(slots, prefixes), max_tokens, patience)
        self.sampler = Sampler(n_rows, self.vocab_size(), self.device, self.among)
        self.last: Step | None = None  # what the last step did
        self._numbers = itertools.count()

    def make_capacity(self, slots, prefixes: Prefixes | None) -> Capacity:
        """Where requests have their keys and values."""
        return slots(self.cache, prefixes)

    def add(
        self, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0, user: str = "", space: int = 0
    ) -> Request:  # fmt: skip
        """Let a request queue up; raises ValueError for one that cannot be served."""
        request = self.make_request(self.encode(prompt), params or SamplingParams(), priority, user, space)
        self.scheduler.add(request)
        return request

    def make_request(
        self, tokens: list[int], params: SamplingParams, priority: int = 0, user: str = "", space: int = 0
    ) -> Request:  # fmt: skip
        """A request with the next number; raises ValueError for parameters that this vocabulary does not allow."""
        params.check(self.vocab_size())
        return Request(next(self._numbers), tokens, params, self.tokenizer, self.room, priority, user, space)

    def abort(self, request: Request) -> None:
        """Call a request off; its memory is free at once, and nothing more is said of it."""
        self.scheduler.abort(request)

    @property
    def busy(self) -> bool:
        """Whether there is a request that has not ended."""
        return bool(self.scheduler.running or self.scheduler.n_waiting)

    def step(self) -> list[Piece]:
        """Take one step, and return what it adds to the texts."""
        try:
            return self.advance()
        except BaseException:
            self.reset()
            raise

    def advance(self) -> list[Piece]:
        """One step: schedule, run, draw, take."""
        self.last = step = self.scheduler.next_step()
        if step is None:
            return []
        self.seat(step)
        logits = self.forward(step)
        drawing = step.drawing
        if not drawing:
            return []
        rows, places = [r.row for r in drawing], [len(r.tokens) for r in drawing]
        drawn = self.sampler.draw(logits, rows, places)
        return [self.take(*each) for each in zip(drawing, drawn.tokens, drawn.logprobs)]

    def forward(self, step: Step) -> Tensor:
        """The model's part of a step: logits (n_wanted, V)."""
        return selective_step(self.decoder, step.work, step.tokens)

    def seat(self, step: Step) -> None:
        """Tell whoever must know who sits where."""
        for request in step.admitted:
            if request.row is not None:  # not preempted again in the same step
                self.seat_one(request)

    def seat_one(self, request: Request) -> None:
        """Tell the sampler who has a row from now on."""
        self.sampler.put(request.row, request.params, request.seed, *request.parts, request.constraint)
        if request.whole:
            self.sampler.draw_from_all([request.row])

    def take(self, request: Request, token: int, logprobs: Logprobs | None) -> Piece:
        """Add a token to a text; where it ends, its memory is free."""
        piece = request.accept(token, logprobs)
        if piece.finish_reason:
            self.scheduler.finish(request)
        return piece

    def reset(self) -> None:
        """Call all requests off."""
        for request in list(self.scheduler.everyone()):
            self.scheduler.abort(request)

    def stream(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Iterator[Piece]:
        """Continue prompts and yield what every token adds; `index` is then the place of the prompt.

        Raises ValueError while other requests are served: their pieces would get lost.
        """
        if self.busy:
            raise ValueError("requests are being served: take their steps first, or use add and step for all")
        requests: list[Request] = []
        encoded = [self.encode(prompt) for prompt in prompts]
        try:
            for prompt, each in zip(encoded, params):
                requests.append(self.add(prompt, each))
            places = {request.index: place for place, request in enumerate(requests)}
            while self.busy:
                for piece in self.step():
                    yield Piece(places[piece.index], piece.text, piece.token, piece.finish_reason, piece.logprobs)
        finally:  # whatever happened, also if a later one was refused, nobody stays behind
            for request in requests:
                self.abort(request)

    @torch.no_grad()
    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Generation | list[Generation]:
        """Continue one prompt, or many: project 8's `generate`, with rows that are used again at once."""
        many, each = as_lists(prompts, params)
        texts = [Generation(len(self.encode(prompt))) for prompt in many]
        for piece in self.stream(many, each):
            append(texts[piece.index], piece)
        return texts[0] if is_one(prompts) else texts
