"""
Engine

This file implements a model that serves many users, and how one is put together, following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - an engine:
  one scheduler and one block manager behind a frontend
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - requests join and
  leave at every step

Each component is explained with paper references for educational purposes.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from common import catalog
from common.device import check_device
from phase1_foundation.project3_pretrain.loading import default_source, load
from phase2_finetuning.project4_sft.answering import Template, prompt_within
from phase2_finetuning.project4_sft.conversations import Message
from phase2_finetuning.project4_sft.other_templates import template_for
from phase3_core_inference.project8_kv_cache.adjusting import bytes_of_adjustments
from phase3_core_inference.project8_kv_cache.machine import Prompt
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token
from phase3_core_inference.project8_kv_cache.texts import Piece
from phase3_core_inference.project8_kv_cache.work import octaves
from phase4_advanced_inference.project11_speculative_decoding.choosing import draft_of
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation
from phase4_advanced_inference.project12_dynamic_batching.request import Request
from phase4_advanced_inference.project13_paged_attention.runner import Runner
from phase10_deployment.project28_serving.adapters import AdapterRows
from phase10_deployment.project28_serving.grammar import Grammars

GPU_SHARE = 0.85  # of the memory that is free once the weights are there, for keys and values
HOST_BYTES = 2**30  # at most for them elsewhere, if nobody says how much


class Gauges(NamedTuple):
    """What a dashboard wants to know of an engine at one moment."""

    running: int = 0  # requests that have a row
    waiting: int = 0  # requests in the queue
    usage: float = 0.0  # part of the blocks that rows use, 0 to 1
    preempted: int = 0  # times that a request had to leave, since the beginning, as all that follow
    asked: int = 0  # tokens of prompts that were looked up in the tree
    found: int = 0  # of these, tokens that were there
    drafted: int = 0  # tokens that were guessed
    kept: int = 0  # of these, tokens that stayed


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is made of, as plain values that can be sent to another process."""

    checkpoint: str | None = None  # what `load` takes; None: the bundled model, or the newest of checkpoints/
    device: str = "cpu"
    dtype: str = "float32"
    use: tuple[str, ...] = ()  # transforms of the catalog, such as "fp8_weights"
    adapters: Mapping[str, str] | None = None  # name -> PEFT folder
    max_running: int = 64  # rows: texts that run at a time
    context: int | None = None  # tokens of a text; None: as many as the model knows positions for
    kv_cache_memory: int | None = None  # bytes for keys and values; None: see `memory_for`
    page: int = 16  # tokens of a block
    max_batch_tokens: int = 512  # of a step
    share: bool = True  # texts that begin alike share blocks
    swap_bytes: int = 0  # of the host, for texts that must leave
    graphs: bool = False  # record steps into CUDA graphs
    compiled: bool = False  # compile steps
    draft: str = "ngram"  # who guesses, see project 11's `draft_of`
    draft_tokens: int = 0  # tokens guessed for a step; 0: no speculation
    rule: str = "coupled"  # how guesses are judged


class Engine(Runner):
    """Project 13's runner, with everything that a user of a server may ask of it.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
        sections 4 and 5.
    PAPER CONTEXT: the engine takes requests with sampling parameters of their own, runs iterations, and hands out
        tokens as they come; a frontend with the OpenAI interface stands before it.
    INTUITION: the kitchen gets a pass: orders come in, plates go out, and the guests never see a stove.
    IMPLEMENTATION: `add` takes an adapter and a grammar besides prompt and parameters; `step`, `abort` and `stream` are
        the runner's. A grammar becomes a constraint that can fail for its own text alone; an adapter a number in a
        table, and a space of its own in the tree of prefixes.
    WHY: everything above deals in requests and pieces of text, everything below in rows and blocks.

    Args:
        template: how the model is spoken to; None: `add` alone, no `answer`.
        adapters: name -> PEFT folder; others: as of `Runner`. For threads: all calls must come from one of them.
    """

    def __init__(
        self,
        model,
        tokenizer,
        template: Template | None = None,
        n_rows: int = 64,
        adapters: Mapping[str, str] | None = None,
        **options,
    ):
        self.template, self.source = template, "a model"
        self.adapters = AdapterRows(model, adapters, n_rows) if adapters else None
        super().__init__(model, tokenizer, n_rows, **options)
        self._grammars: Grammars | ValueError | None = None

    @property
    def adapter_names(self) -> list[str]:
        """The adapters that a request may ask for."""
        return list(self.adapters.names) if self.adapters else []

    @property
    def grammars(self) -> Grammars:
        """What makes constraints; raises ValueError where the library is missing, or the tokens spell no JSON."""
        if isinstance(self._grammars, ValueError):
            raise self._grammars
        if self._grammars is None:
            own = {getattr(self.tokenizer, "eot_id", None)} - {None}
            ends = frozenset(self.template.stop_ids) if self.template else frozenset()
            try:
                self._grammars = Grammars(self.tokenizer, ends | own, self.vocab_size())
            except ValueError as error:
                self._grammars = error  # it would take as long to find out again
                raise
        return self._grammars

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
        user: str = "",
        adapter: str | None = None,
        grammar: str | None = None,
    ) -> Request:
        """Let a request queue up; raises ValueError for one that cannot be served.

        adapter: one of `adapter_names`; grammar: as of grammar.py, which its text will follow.
        """
        params = params or SamplingParams()
        if grammar is not None:
            params = replace(params, constraint=lambda: self.grammars.constraint(grammar))
        space = 0
        if adapter is not None:
            if self.adapters is None:
                raise ValueError(f"there is no adapter {adapter!r}: this engine was given none")
            space = 1 + self.adapters.index(adapter)
        return super().add(prompt, params, priority, user, space)

    def seat_one(self, request: Request) -> None:
        """Tell sampler, draft and adapters who sits in a row."""
        super().seat_one(request)
        if self.adapters is not None:
            self.adapters.put(request.row, self.adapters.names[request.space - 1] if request.space else None)

    def gauges(self) -> Gauges:
        """How things stand."""
        tree, tally = self.blocks.tree, self.speculation.tally if self.speculation else None
        n_blocks = self.cache.allocator.n_blocks
        return Gauges(
            len(self.scheduler.running), self.scheduler.n_waiting, 1 - self.blocks.available / n_blocks,
            self.scheduler.n_preempted, *((tree.statistics.asked, tree.statistics.found) if tree else (0, 0)),
            *((tally.drafted, tally.kept) if tally else (0, 0)),
        )  # fmt: skip

    def answer(self, messages: Sequence[Message], params: SamplingParams) -> Iterator[Piece]:
        """What the assistant says next, piece by piece; what was said first is forgotten where it gets too much.

        Up to half of the room is kept free for the answer. Closing the iterator calls the request off.
        """
        kept = min(params.max_new_tokens, self.room // 2)
        prompt = prompt_within(self.template, messages, self.room - kept)
        stop = (*params.stop, *([self.template.stop_text] if self.template.stop_text else []))
        return self.stream([prompt], [replace(params, stop=stop, stop_ids=self.template.stop_ids)])


def build_engine(options: EngineOptions) -> Engine:
    """Load a model and make an engine of it.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, 4.
    PAPER CONTEXT: the weights take their part of a GPU's memory first; nearly all of the rest holds keys and values.
    INTUITION: furniture first, then as many shelves as the room still takes.
    IMPLEMENTATION: `load`, the catalog's transforms, a draft if one is wanted; then memory for the blocks from what is
        left. What is recorded or compiled is so before the first request.
    WHY: every option of every project below is switched here and nowhere else.

    Raises what `load` raises, and ValueError for options that do not fit the model.
    """
    dtype, device = getattr(torch, options.dtype), check_device(options.device)
    source = options.checkpoint or default_source()
    model, tokenizer = load(source, device, dtype)
    model = catalog.apply(model, options.use)
    speculation = None
    if options.draft_tokens:
        draft = draft_of(options.draft, tokenizer, device, dtype, options.graphs)
        speculation = Speculation(draft, options.draft_tokens, options.rule, options.graphs)
    room = min(options.context or model.config.block_size, model.config.block_size)
    memory = options.kv_cache_memory or memory_for(model, options, room)
    engine = Engine(
        model, tokenizer, template_for(tokenizer, source), options.max_running, options.adapters, capacity=room,
        memory=memory, page=options.page, share=options.share, swap_bytes=options.swap_bytes, speculation=speculation,
        max_tokens=options.max_batch_tokens, graphs=options.graphs, compiled=options.compiled,
    )  # fmt: skip
    engine.source = str(source)
    with contextlib.suppress(ValueError):  # a request that needs it will say what is missing
        _ = engine.grammars  # now, as it takes seconds for a large vocabulary
    engine.warm_up()
    return engine


def memory_for(model, options: EngineOptions, room: int) -> int:
    """Bytes for keys and values, if nobody says how many: all rows full, unless that is more than there is."""
    weight = next(model.parameters())
    full = options.max_running * octaves(room) * bytes_per_token(model.specs, weight.dtype)
    if weight.device.type != "cuda":
        return min(full, HOST_BYTES)
    free, _ = torch.cuda.mem_get_info(weight.device)
    return max(0, min(full, int(free * GPU_SHARE) - bytes_of_adjustments(options.max_running, model.config.vocab_size)))
