"""
Runner

This file implements the core of an engine: scheduled steps over a paged, shared cache, following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - the whole
  system: scheduler, block manager, workers
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - one iteration at
  a time
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - steps that check a draft

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from phase3_core_inference.project8_kv_cache.buffers import on_device
from phase3_core_inference.project8_kv_cache.decoder import FastDecoder
from phase3_core_inference.project8_kv_cache.sampling import told
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token
from phase3_core_inference.project8_kv_cache.texts import Piece
from phase4_advanced_inference.project11_speculative_decoding.proposals import Proposal
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation
from phase4_advanced_inference.project12_dynamic_batching.batcher import Batcher
from phase4_advanced_inference.project12_dynamic_batching.request import Request
from phase4_advanced_inference.project12_dynamic_batching.scheduler import Step
from phase4_advanced_inference.project13_paged_attention.block_capacity import Blocks
from phase4_advanced_inference.project13_paged_attention.paged_cache import RECORDED, PagedCache, mixed_sizes


@dataclass
class Flight:
    """A step that the device may not have finished yet."""

    requests: list[Request]  # for whom it draws
    tokens: Tensor  # on the host, once it is over
    measured: list[Tensor] | None  # log-probabilities, likewise
    over: "torch.cuda.Event | None"


class Runner(Batcher):
    """A `Batcher` over blocks: the core of an engine.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, 4.
    PAPER CONTEXT: a scheduler decides, a block manager allocates, the worker runs the model over the blocks; requests
        are preempted when memory is short.
    INTUITION: all floors of this phase in one lift: queue, drafts, blocks, and beginnings that are read once.
    IMPLEMENTATION: project 12's loop with `Blocks` for slots. On a GPU the host runs one step ahead: it plans the next
        step while the device runs this one, and reads each token a step late. With a `Speculation` it does not: drafts
        need to know the text.
    WHY: the reference stays project 12's `Batcher`, which writes the same texts a step at a time.

    Args:
        memory: bytes for keys and values; None: enough for all rows to be full. page: tokens of a block.
        share: let texts share what they have in common; swap_bytes: of the host, for preempted texts.
        speculation: how drafts are made and judged (project 11); ahead: None: on a GPU.
        others: as of `Batcher` and `Machine`.
    """

    def __init__(
        self,
        model,
        tokenizer,
        n_rows: int = 32,
        capacity: int | None = None,
        memory: int | None = None,
        page: int = 16,
        share: bool = True,
        swap_bytes: int = 0,
        speculation: Speculation | None = None,
        ahead: bool | None = None,
        **options,
    ):
        super().__init__(
            model, tokenizer, n_rows, capacity, cache=paged(memory, page),
            slots=lambda cache, prefixes: Blocks(cache, share, swap_bytes), **options,
        )  # fmt: skip
        self.room = min(self.room, self.cache.capacity)  # a text alone must fit
        self.blocks: Blocks = self.scheduler.capacity
        self.speculation = speculation
        if speculation is not None:
            speculation.prepare(n_rows, self.room, self.vocab_size(), self.cache.step_limit)
        self.ahead = (self.device.type == "cuda" if ahead is None else ahead) and speculation is None
        self.newest = torch.zeros(n_rows, dtype=torch.long, device=self.device)  # the last token drawn in each row
        self._flight: Flight | None = None

    def advance(self) -> list[Piece]:
        """One step; what it returns may have been drawn in the step before."""
        if self.speculation is not None:
            return self._speculate()
        if not self.ahead:
            return super().advance()
        self.last = step = self.scheduler.next_step()
        landing, self._flight = self._flight, self._launch(step) if step else None
        return self._land(landing) if landing else []

    # -- one step ahead

    def _launch(self, step: Step) -> Flight:
        """Give the device a step without waiting for it.

        PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section
            4.2; that planning overlaps with running is practice.
        PAPER CONTEXT: the scheduler and the engine alternate, iteration by iteration.
        INTUITION: lay the next table while the guests are still eating.
        IMPLEMENTATION: a token that is drawn in the step under way is -1 to the host; here the device puts in what it
            drew last in that row. Lengths, blocks, positions and noise do not depend on which token it is.
        WHY: planning takes a few milliseconds, as long as a step; in turn, each would wait for the other.
        """
        self.seat(step)
        plan = self.cache.plan(step.work, step.tokens)
        tokens = plan.tokens
        if min(step.tokens) < 0:
            tokens = torch.where(tokens < 0, self.newest[plan.rows], tokens)
        logits = self.decoder.run(plan, tokens)[: plan.n_wanted]
        return self._draw(logits, step.drawing)

    @torch.no_grad()
    def _draw(self, logits: Tensor, drawing: list[Request]) -> Flight:
        """Draw for these requests on the device, and send the tokens off to the host."""
        rows = [request.row for request in drawing]
        places = [len(request.tokens) + request.pending for request in drawing]
        sampler, wanted = self.sampler, [request.params.logprobs for request in drawing]
        if not drawing:
            return Flight([], self.newest[:0].cpu(), None, None)
        known = sampler.known(logits)
        drawn = sampler.launch(sampler.penalized(known, rows), rows, places)
        sampler.remember(rows, drawn)
        self.newest.index_copy_(0, on_device(rows, self.device), drawn.clamp(min=0))
        measured = sampler.measure(known, drawn, wanted)
        for request in drawing:
            request.pending += 1
        on_gpu = self.device.type == "cuda"
        tokens, *measured = (x.to("cpu", non_blocking=on_gpu) for x in (drawn, *(measured or ())))
        over = torch.cuda.Event() if on_gpu else None
        if over is not None:
            over.record()
        return Flight(drawing, tokens, measured or None, over)

    def _land(self, flight: Flight) -> list[Piece]:
        """Take in what a step drew, once it is over."""
        if flight.over is not None:
            flight.over.synchronize()
        pieces, wanted = [], [request.params.logprobs for request in flight.requests]
        for request, token, logprobs in zip(flight.requests, flight.tokens.tolist(), told(flight.measured, wanted)):
            if request.finish_reason:
                continue  # it ended, or was called off, while this was drawn
            if request.stale:
                request.stale -= 1
                continue
            request.pending -= 1
            if token < 0:
                self._draw_again(request)
            else:
                pieces.append(self.take(request, token, logprobs))
        return pieces

    def _draw_again(self, request: Request) -> None:
        """Candidates were not enough for a token: go back by one, and draw from all from now on."""
        request.whole, request.stale, request.pending = True, request.stale + request.pending, 0
        request.fed = min(request.fed, len(request.tokens) - 1)  # so that its logits come once more
        if request.row is not None:
            self.cache.truncate(request.row, request.fed)
            # Anew, as the penalty must forget what was drawn behind the missing token.
            self.sampler.put(request.row, request.params, request.seed, *request.parts, request.constraint)
            self.sampler.draw_from_all([request.row])

    # -- several tokens a step

    def _speculate(self) -> list[Piece]:
        """One step in which the newest token of each text is read together with a draft."""
        rule = self.speculation.rule(self.sampler)
        ready = [request for request in self.scheduler.running if not request.reading]
        proposal = Proposal.of([[]])
        if ready:
            proposal = self.speculation.propose([(request.row, request) for request in ready], rule)
        for request, draft in zip(ready, proposal.tokens):
            request.draft = draft
        self.last = step = self.scheduler.next_step()
        if step is None:
            return []
        self.seat(step)
        logits = self.forward(step)
        seated = [(request.row, request) for request in step.drawing]
        for request in ready:  # also of those that were left out of the step
            request.draft = []
        if not seated:
            return []
        # Who had no draft gets any row, of which nothing is read.
        places = {id(request): place for place, request in enumerate(ready)}
        counts = [n_wanted - 1 for _, _, n_wanted in step.work if n_wanted]
        judged = proposal.pick([places.get(id(request), 0) for request in step.drawing], counts)
        bursts = self.speculation.settle(rule, logits, seated, judged)
        for (row, request), burst in zip(seated, bursts):
            request.fed = len(request.tokens) - 1 + len(burst)
            self.cache.truncate(row, request.fed)  # forget what was rejected
        pieces = []
        for (_, request), burst in zip(seated, bursts):
            for token, logprobs in burst:
                pieces.append(self.take(request, token, logprobs))
                if request.finish_reason:  # what was kept behind the end is no part of the text
                    break
        return pieces

    def seat_one(self, request: Request) -> None:
        """Tell the sampler, and the draft, who has a row from now on."""
        super().seat_one(request)
        if self.speculation is not None:
            self.speculation.draft.free(request.row)

    # -- everything else

    def fork(self, request: Request, params: SamplingParams | None = None) -> Request:
        """Another continuation of what a request's text is now: its blocks are shared, not read again.

        One that waits, still reads, or is a step ahead of the host is queued with the same text instead. Raises
        ValueError where the text leaves no room to go on.
        """
        whose = request.priority, request.user, request.space
        other = self.make_request(self.encode(request.tokens), params or request.params, *whose)
        for token in request.parts[1] if other.constraint is not None else ():
            other.constraint.accept(token)
        at_rest = request.row is not None and not request.reading and not request.pending and not request.finish_reason
        if at_rest and self.blocks.fork(request, other):
            self.scheduler.running.append(other)
            self.seat_one(other)
        else:
            self.scheduler.add(other)
        return other

    def reset(self) -> None:
        """Call all requests off, and forget beginnings: a step that failed may not have written them."""
        self._flight = None
        super().reset()
        self.blocks.clear()

    def warm_up(self) -> None:
        """Compile and record all steps whose shapes return, before the first request comes; where none are, nothing.

        Raises ValueError while a request is served.
        """
        if self.busy:
            raise ValueError("requests are being served: warm up before the first of them")
        sizes = {self.cache.rows_of(n): n for n in range(1, self.n_rows + 1)}
        works = [[(row, 1, 1) for row in range(n)] for n in sizes.values()]
        works += [self._mixed_work(n) for n in mixed_sizes(min(self.scheduler.max_tokens, RECORDED))]
        for work in works if isinstance(self.decoder, FastDecoder) else ():
            if sum(self.cache.missing(row, n) for row, n, _ in work) <= self.cache.allocator.n_free:
                plan = self.cache.plan(work, [0] * sum(n for _, n, _ in work))
                self.decoder.run(plan, plan.tokens)
                for row, _, _ in work:
                    self.cache.free(row)

    def _mixed_work(self, n: int) -> list[tuple[int, int, int]]:
        """So many tokens of prompts, as many as a row takes in each."""
        most = self.cache.capacity
        parts = [most] * (n // most) + [n % most] * (n % most > 0)
        return [(row, part, 1) for row, part in enumerate(parts[: self.n_rows])]


def paged(memory: int | None, page: int) -> Callable[..., PagedCache]:
    """What builds a paged cache of so many bytes."""

    def build(specs, n_rows, capacity, dtype, **options) -> PagedCache:
        block = bytes_per_token(specs, dtype) * page
        if memory is not None and memory < block:
            raise ValueError(f"memory={memory} must hold at least one block of {page} tokens, {block} bytes")
        n_blocks = None if memory is None else memory // block
        return PagedCache(specs, n_rows, capacity, dtype, n_blocks=n_blocks, page=page, **options)

    return build
