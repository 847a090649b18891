"""
Decoder

This file implements running a model over a cache, step by step, following:
- "Efficiently Scaling Transformer Inference" (Pope et al., 2022) - prefill and decode steps

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from common.graphs import capture
from phase3_core_inference.project8_kv_cache.kv_cache import KVCache
from phase3_core_inference.project8_kv_cache.work import Work

SHAPES = 64  # of decode steps, for each of which code may be compiled


class Decoder:
    """A model and a cache that take steps together.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: prefill works on all tokens in parallel, decode on one a sequence; at small batches the time to load
        the weights dominates.
    INTUITION: the model is given work and tokens, and answers with logits; the cache remembers the rest.
    IMPLEMENTATION: the cache plans, the model runs. Everything is eager, whatever the shapes.
    WHY: generation, speculation and serving all are loops around this step.

    Args:
        model: in eval mode; cache: built from its specs.
    """

    def __init__(self, model, cache: KVCache):
        self.model, self.cache = model, cache

    def step(self, work: Work, tokens: Sequence[int] | Tensor) -> Tensor:
        """Take one step with these tokens, in the order of the work: logits (n_wanted, V).

        Tokens may be a tensor on the device (N,), which nobody waits for. The logits may lie in a buffer that the next
        step overwrites.
        """
        if isinstance(tokens, Tensor):
            if tokens.shape != (sum(n for _, n, _ in work),):
                raise ValueError(f"tokens of shape {tuple(tokens.shape)} were given for this work: {work}")
            plan = self.cache.plan(work)
            plan.tokens[: plan.n_tokens].copy_(tokens)
        else:
            plan = self.cache.plan(work, tokens)
        return self.run(plan, plan.tokens)[: plan.n_wanted]

    @torch.no_grad()
    def run(self, plan, tokens: Tensor) -> Tensor:
        """One forward of this plan: logits, padded as it is."""
        return self.model.forward(tokens, plan)


class FastDecoder(Decoder):
    """A decoder whose short steps are compiled, or recorded and replayed.

    PAPER: "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
    PAPER CONTEXT: at small batches the time to load the weights dominates. That the host's launches can take longer
        still is no matter of the paper, whose TPUs run a compiled program, but of eager code on a GPU.
    INTUITION: a decode step is so short that giving orders takes longer than carrying them out: write them down once.
    IMPLEMENTATION: plans of one shape are one object with buffers at fixed addresses. At first sight its forward is
        compiled and/or recorded into a CUDA graph, afterwards only replayed. Plans say what `returns` and `compiles`;
        prefill runs eagerly, but for project 13's, which fills it up to few sizes.
    WHY: the hundred launches of a small model's step become one.

    Args:
        model: in eval mode; cache: built from its specs with `padded=True`.
        compiled: through torch.compile; graphs: through CUDA graphs (elsewhere without effect).

    A recorded graph reads the weights where they lay when it was recorded. Values changed in place are seen; parameters
    that are replaced afterwards (merging adapters, `to(dtype)`) are not: make a new decoder then.
    """

    def __init__(self, model, cache: KVCache, compiled: bool = False, graphs: bool = True):
        super().__init__(model, cache)
        self._forward = torch.compile(model.forward, fullgraph=True, dynamic=False) if compiled else model.forward
        self._record = capture if graphs else lambda function, *example: function
        self._steps: dict = {}  # plan -> what runs it

    @torch.no_grad()
    def run(self, plan, tokens: Tensor) -> Tensor:
        """One forward of this plan, compiled or replayed if its shape will return: logits, padded as it is."""
        if not plan.returns:
            return super().run(plan, tokens)
        if plan not in self._steps:
            self._steps = {old: run for old, run in self._steps.items() if self.cache.keeps(old)}
            self._steps[plan] = self._first(plan, tokens)
        return self._steps[plan](tokens)

    def _first(self, plan, tokens: Tensor) -> Callable[[Tensor], Tensor]:
        """What runs steps of this plan from now on."""
        forward = self._forward if plan.compiles else self.model.forward
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            forward(tokens, plan)  # compiled here, if at all: later calls find the code
        return self._record(lambda tokens: forward(tokens, plan), tokens)
