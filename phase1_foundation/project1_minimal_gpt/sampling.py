"""
Sampling

This file implements autoregressive generation following:
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - nucleus (top-p) sampling
- "Hierarchical Neural Story Generation" (Fan et al., 2018) - top-k sampling

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Collection, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for values that make no distribution."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or none to keep all tokens")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or none to keep all tokens")


def next_token_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Turn logits (B, V) into the distribution (B, V) that the next token is drawn from.

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3.1 (top-p) and 3.3 (temperature);
        "Hierarchical Neural Story Generation", arXiv:1805.04833 (top-k).
    PAPER CONTEXT: the unreliable tail of the distribution derails a text; nucleus sampling keeps the smallest set of
        tokens whose probability reaches p, and so adapts to how sure the model is; top-k keeps a fixed number.
    INTUITION: temperature bends the odds, top-k says "one of the k best", top-p "of those that share 90% of the odds".
    IMPLEMENTATION: divide by the temperature, drop all below the k-th logit, then the tail beyond p; renormalise.
        Temperature 0 gives all probability to the largest logit. Tokens that tie with the k-th are kept.
    WHY: pure sampling rambles, pure argmax repeats itself; truncated sampling sits between.

    >>> logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    >>> next_token_probabilities(logits, top_p=0.6).tolist()
    [[0.625, 0.375, 0.0, 0.0]]
    >>> next_token_probabilities(logits, temperature=0.0).tolist()
    [[1.0, 0.0, 0.0, 0.0]]
    """
    check_sampling(temperature, top_k, top_p)
    logits = logits.float()
    if temperature == 0.0:
        return F.one_hot(logits.argmax(-1), logits.size(-1)).float()
    # The largest logit becomes 0 first: a tiny temperature then cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.size(-1):
        kth = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None and top_p < 1.0:
        probabilities, order = F.softmax(logits, dim=-1).sort(descending=True, stable=True)
        # A token stays while those before it do not yet reach p; the first one always does.
        in_tail = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(in_tail.scatter(-1, order, in_tail), float("-inf"))
    return F.softmax(logits, dim=-1)


@torch.no_grad()
def steps(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield one new token per row, again and again: tokens (B, T) -> each time (B,).

    PAPER: "Improving Language Understanding by Generative Pre-Training" (GPT-1), section 3.1, equation 1.
    PAPER CONTEXT: P(text) is the product of P(u_i | what came before); sampling draws its factors one by one.
    INTUITION: ask for the next character, append it, ask again.
    IMPLEMENTATION: the last `block_size` tokens go through the model; its last position's logits make the next token.
    WHY: every token costs a whole forward pass of the context; project 8's cache removes that.

    The model must be in eval mode and map tokens (B, T) to logits (B, T, V), with `model.config.block_size`.
    """
    check_sampling(temperature, top_k, top_p)
    if tokens.dim() != 2 or tokens.size(1) == 0:
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} cannot be continued: give (B, T) with T of at least 1")
    block_size = model.config.block_size
    for _ in range(max_new_tokens):
        logits = model(tokens[:, -block_size:])[:, -1]  # (B, V)
        probabilities = next_token_probabilities(logits, temperature, top_k, top_p)
        new = draw(probabilities, generator)  # (B,)
        tokens = torch.cat([tokens[:, -block_size:], new[:, None]], dim=1)
        yield new


def draw(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token per row of probabilities (B, V), on the generator's device: a seed means the same everywhere."""
    device = probabilities.device
    if generator is not None:
        probabilities = probabilities.to(generator.device)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(device)


def generate(
    model: nn.Module,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    stop: Collection[int] | None = None,
) -> Tensor:
    """Continue tokens (B, T) by up to `max_new_tokens`: returns (B, T + new), prompt included.

    With `stop`, a row is finished by any of these tokens and repeats it until all rows are; then generation ends.
    """
    finished = torch.zeros(tokens.size(0), dtype=torch.bool, device=tokens.device)
    stops = torch.tensor(sorted(stop or ()), dtype=tokens.dtype, device=tokens.device)
    columns = [tokens]
    for new in steps(model, tokens, max_new_tokens, temperature, top_k, top_p, generator):
        # A finished row keeps its stop token, whatever the model would go on to say.
        new = torch.where(finished, columns[-1][:, -1], new)
        columns.append(new[:, None])
        finished |= torch.isin(new, stops)
        if finished.all():
            break
    return torch.cat(columns, dim=1)


def stream(model: nn.Module, tokens: list[int], max_new_tokens: int, stop: Collection[int] | None = None, **sampling):
    """Continue one sequence and yield each new token as an int the moment it is drawn; `sampling` as in `generate`."""
    device = next(model.parameters()).device
    prompt = torch.tensor([tokens], dtype=torch.long, device=device)
    for new in steps(model, prompt, max_new_tokens, **sampling):
        yield new.item()
        if stop and new.item() in stop:
            return
