"""
Activation checkpointing

This file implements recomputing activations instead of storing them following:
- "Training Deep Nets with Sublinear Memory Cost" (Chen et al., 2016) - O(sqrt(n)) memory for one more forward pass

Each component is explained with paper references for educational purposes.
"""

import functools

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.modules import swap_modules
from phase1_foundation.project3_pretrain.layers import Block
from phase1_foundation.project3_pretrain.plans import Plan


class CheckpointedBlock(Block):
    """A block that keeps only its input, and computes the rest again when the backward pass asks for it.

    PAPER: "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174, section 4.
    PAPER CONTEXT: drop the results inside a segment, keep its input; O(sqrt(n)) memory for one extra forward pass.
    INTUITION: take notes of the chapter titles only, and reread a chapter when the exam gets to it.
    IMPLEMENTATION: adopts the modules of the block it replaces, so names, weights and later swaps stay as they were.
        A block with a forward of its own keeps it: `_recomputing` puts this class in front of the block's own.
    WHY: the activations of a block are about 30 times its input; batch and context can grow instead.
    """

    def __init__(self, block: Block):
        # No super().__init__(): the block's own state is taken over, not built anew.
        self.__dict__ = block.__dict__

    def forward(self, x: Tensor, plan: Plan, layer: int) -> Tensor:
        """Compute the same as the block."""
        return checkpoint(super().forward, x, plan, layer, use_reentrant=False)


@functools.cache  # one class for all blocks of a kind: a compiler that looks at the class compiles once
def _recomputing(kind: type) -> type:
    """The class of blocks that compute as `kind` does, and recompute."""
    return type(f"Checkpointed{kind.__name__}", (CheckpointedBlock, kind), {})


def checkpoint_activations(model, every: int = 1):
    """Recompute every `every`-th block of `model` in the backward pass; weights and results stay the same.

    PAPER: "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174, section 4.
    PAPER CONTEXT: which results are dropped trades memory for recomputation.
    INTUITION: `every=1` saves most, `every=2` half of it at half the price.
    IMPLEMENTATION: blocks are swapped in place; not recorded in the recipe, as it changes no result.
    WHY: about a third more work buys a batch or a context that would not fit.

    Raises ValueError if `every` is below 1 or the model has no blocks.
    """
    if every < 1:
        raise ValueError(f"every={every} must be at least 1: 1 recomputes every block, 2 every second one")
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    chosen = {id(block) for block in blocks[::every]}

    def make(name, block):
        return block if isinstance(block, CheckpointedBlock) else _recomputing(type(block))(block)

    swap_modules(model, make, lambda name, module: id(module) in chosen)
    return model
