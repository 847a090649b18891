"""
Selective batching

This file implements one forward for texts that are at different places following:
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - selective batching

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from phase3_core_inference.project8_kv_cache.decoder import Decoder
from phase3_core_inference.project8_kv_cache.work import SHORT, Work, power_of_two


class SelectivePlan:
    """Several plans of one cache in one forward: all tokens together in linear layers, apart in attention.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 3.2.
    PAPER CONTEXT: requests in other phases cannot be one batch for attention, as their shapes differ; for all other
        layers they can, as those see tokens alone. So the batch is split before attention and merged after it.
    INTUITION: everybody takes the same bus, and has an office of his own.
    IMPLEMENTATION: project 8's plans work on a grid of rows by new tokens: one for decodes, one for chunks of about the
        same length. Their tokens lie behind each other; attention is cut where one plan ends and the next begins.
    WHY: on one grid a single chunk of 512 tokens would make 512 places of every row that only decodes.

    `wanted`: places of the tokens whose logits are wanted, in the order of the work.
    """

    def __init__(self, parts: Sequence, wanted: Tensor):
        self.parts, self.wanted = parts, wanted
        self.sizes = [len(part.tokens) for part in parts]
        self.tokens = torch.cat([part.tokens for part in parts])
        self.positions = torch.cat([part.positions for part in parts])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of each part over its own rows: q (N, H, D), k (N, Hkv, D), v (N, Hkv, Dv) -> (N, H, Dv)."""
        cut = zip(self.parts, *(x.split(self.sizes) for x in (q, k, v)))
        return torch.cat([part.attend(layer, *each) for part, *each in cut])

    def select(self, x: Tensor) -> Tensor:
        """The rows of x whose logits are wanted (W, C)."""
        return x.index_select(0, self.wanted)


def size_class(n_new: int) -> int:
    """Work of one class shares a grid: decodes, up to 16 tokens, then octaves.

    >>> [size_class(n) for n in (1, 2, 16, 17, 100, 129)]
    [1, 16, 16, 32, 128, 256]
    """
    return n_new if n_new == 1 else max(SHORT, power_of_two(n_new))


@torch.no_grad()
def selective_step(decoder: Decoder, work: Work, tokens: Sequence[int]) -> Tensor:
    """`Decoder.step` for work of any mix: logits (n_wanted, V), in the order of the work.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), section 3.2.
    PAPER CONTEXT: see `SelectivePlan`.
    INTUITION: sort the mail by size before it goes into pigeonholes.
    IMPLEMENTATION: work of one class, and any work of a cache that needs no grid (project 13's), is left to the
        decoder, which may replay a recorded graph. Else one plan a class: two classes never have the same shape.
    WHY: decode steps, the bulk, stay as fast as they were; mixed ones cost what their tokens cost.
    """
    classes = [size_class(n_new) for _, n_new, _ in work]
    kinds = sorted(set(classes))
    if len(kinds) == 1 or decoder.cache.ragged:
        return decoder.step(work, tokens)
    ends = np.cumsum([n_new for _, n_new, _ in work])
    parts, wanted, offset = [], {}, 0
    for kind in kinds:
        some = [i for i, each in enumerate(classes) if each == kind]
        own = [token for i in some for token in tokens[ends[i] - work[i][1] : ends[i]]]
        parts.append(decoder.cache.plan([work[i] for i in some], own))
        place = offset
        for i in some:
            _, n_new, n_wanted = work[i]
            place += n_new
            wanted[i] = range(place - n_wanted, place)
        offset += len(parts[-1].tokens)  # what pads a part stands at its end
    places = torch.tensor([place for i in range(len(work)) for place in wanted[i]], dtype=torch.long)
    plan = SelectivePlan(parts, places.to(parts[0].tokens.device))
    return decoder.model.forward(plan.tokens, plan)
