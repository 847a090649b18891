"""
Adapters of rows

This file implements texts of many adapters in one batch over a cache following:
- "LoRA: Low-Rank Adaptation of Large Language Models" (Hu et al., 2021) - one base for many tasks
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - linear layers run
  over the tokens of all requests together

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from phase2_finetuning.project5_lora.peft_format import Adapter
from phase2_finetuning.project5_lora.stacking import Choice, choice_of, stack_adapters
from phase4_advanced_inference.project12_dynamic_batching.selective import SelectivePlan


class AdapterRows:
    """Which adapter each row of a cache has; every token of a step takes that of its row.

    PAPER: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.2 (switching tasks).
    PAPER CONTEXT: tasks are switched by exchanging A and B. For inputs of several in one forward, the paper says, A and
        B must not be merged into the weights.
    INTUITION: the seat at table says who likes which spice: the waiter need not ask for every spoonful.
    IMPLEMENTATION: a table of the adapter of each row on the device. Before the first block a hook looks up the row of
        each token, which the plan has, and sets project 5's `Choice`. A recorded graph holds the look-up, too: it
        reads table and plan where they always lie, and goes on from what stands there by then.
    WHY: a step of any mix, decodes and chunks of prompts, is one forward, and knows nothing of requests.

    Args:
        model: plain, in any format; its layers are swapped in place. Before anything of it is compiled or recorded.
        adapters: name -> a PEFT folder, or what `read_adapter` returned; n_rows: of the cache.

    A forward over no cache takes what `choose` said, at first the base. Keys and values depend on the adapter: give
    each request the `space` 1 + index(name), so that texts share within their own alone. Raises ValueError for a model
    that has adapters, and what `stack_adapters` raises.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, str | Path | Adapter], n_rows: int):
        if choice_of(model) is not None:
            raise ValueError("this model has a stack of adapters: give all of them at once, with a plain model")
        if not adapters:
            raise ValueError("adapters={} names none: give one at least, or serve the model without a table")
        self._choice = stack_adapters(model, adapters)
        self._whole = Choice(self.names, self._choice.rows.device)  # of forwards over no cache
        self._choice.rows = self._whole.rows  # as every forward leaves it
        self._held = [-1] * n_rows  # what `of_row` holds, on the host
        self.of_row = torch.full((n_rows,), -1, device=self._choice.rows.device)
        self._last = len(model.blocks) - 1
        model.blocks[0].register_forward_pre_hook(self._look_up)
        model.blocks[-1].register_forward_hook(self._forget)

    @property
    def names(self) -> list[str]:
        """The adapters, in the order of their indices."""
        return self._choice.names

    def index(self, name: str | None) -> int:
        """The place of an adapter, -1 for the base; raises ValueError for an unknown name."""
        if name is not None and name not in self.names:
            raise ValueError(f"there is no adapter {name!r} here: there are {', '.join(self.names)}, or None")
        return -1 if name is None else self.names.index(name)

    def put(self, row: int, name: str | None) -> None:
        """Steps that begin from now on give this row an adapter, or the base alone."""
        index = self.index(name)
        if self._held[row] != index:  # most rows go from one text to the next of the same adapter
            self.of_row[row] = self._held[row] = index  # in place, behind the steps that were launched before

    def choose(self, rows: str | Sequence[str | None] | Tensor | None) -> None:
        """Set the adapters of forwards over no cache, as `Choice.choose` does."""
        self._whole.choose(rows)

    def _look_up(self, block: nn.Module, args: tuple) -> None:
        """Set the choice of this forward; `block` is called with (x, plan, layer)."""
        rows = rows_of(args[1])
        # A new tensor, and not `choose`, which would write into that of a step before: a graph may own it.
        self._choice.rows = self._whole.rows if rows is None else self.of_row.index_select(0, rows)

    def _forget(self, block: nn.Module, args: tuple, out: Tensor) -> None:
        """Behind the last layer all is as it was: compiled code would be made anew where it finds another shape."""
        if args[2] == self._last:  # a block may stand in several places
            self._choice.rows = self._whole.rows


def rows_of(plan) -> Tensor | None:
    """The row of the cache of each token of a step (N,), padding in any row; None for a plan over no cache."""
    if isinstance(plan, SelectivePlan):
        return torch.cat([part.rows for part in plan.parts])
    return getattr(plan, "rows", None)
