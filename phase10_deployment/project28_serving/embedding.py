"""
Embedding

This file implements vectors that stand for texts following:
- "Attention Is All You Need" (Vaswani et al., 2017) - what the last layer knows of each token

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from phase1_foundation.project3_pretrain.plans import Causal
from phase10_deployment.project28_serving.engine import Engine


@torch.no_grad()
def embed(engine: Engine, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """One vector for each text.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3; that the mean of its output stands for a text is
        practice.
    PAPER CONTEXT: the decoder's last layer gives a vector for each position, from which the next word is read.
    INTUITION: what somebody is about to say, averaged over a whole speech, tells what the speech was about.
    IMPLEMENTATION: a forward without cache and without head for each text, the mean over its tokens, length 1.
    WHY: clients ask for embeddings. A model trained to write is none that was trained to compare: texts with the same
        words lie close, and no more is claimed.

    texts: token ids, none of them empty or longer than the model's block_size; returns lists of n_embd numbers.
    """
    model, vectors = engine.model, []
    for text in texts:
        tokens = torch.tensor([text], device=engine.device)  # (1, T)
        plan = Causal(tokens, model.specs, model.kernel)
        x = model.embed(tokens, plan.positions)
        for i, block in enumerate(model.blocks):
            x = block(x, plan, i)
        vectors.append(F.normalize(model.norm(x).float().mean(dim=1).squeeze(0), dim=0).tolist())
    return vectors
