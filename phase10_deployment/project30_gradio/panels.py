"""
Panels of texts

This file implements what the panels of the playground do that need no more than a text, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2015) - coloured tokens
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - the next token's odds, before and after cuts
- "Attention Is All You Need" (Vaswani et al., 2017) - maps of attention

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence
from typing import NamedTuple

from phase10_deployment.project30_gradio import looking
from phase10_deployment.project30_gradio.backend import Backend, with_adapter
from phase10_deployment.project30_gradio.pictures import (
    attention_picture,
    figures,
    heads_picture,
    notice,
    odds_picture,
    tokens_picture,
)
from phase10_deployment.project30_gradio.talking import ServerError, Token

HABITS = ("on the first token", "on the token before", "on itself")


class Odds(NamedTuple):
    """What is known of the next token."""

    names: list[str]
    logprobs: list[float]
    whole: bool  # the vocabulary, and not only the likeliest tokens


class Maps(NamedTuple):
    """Attention of one layer."""

    tokens: list[Token]
    heads: list[list[list[float]]]  # (H, T, T)


async def show_tokens(backend: Backend, text: str, model: str | None, as_chat: bool, ids: bool) -> str:
    """A text in its tokens; as_chat: as the model reads it when somebody says it. Raises ServerError."""
    if not text:
        return notice("Write something above.")
    what = {"messages": [{"role": "user", "content": text}]} if as_chat else {"prompt": text}
    return tokens_picture(await backend.api.tokenize(model=model, **what), ids)


async def next_odds(backend: Backend, text: str, model: str | None) -> Odds:
    """What may come behind a text, best first: from the engine all of it, from an API what it tells.

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3.
    PAPER CONTEXT: P(x | what came before), from which decoding draws.
    INTUITION: the bets before anybody has changed the rules of the game.
    IMPLEMENTATION: asked once for a text; the sliders work on the answer, so they cost the model nothing.
    WHY: temperature and cuts are a formula over these numbers, and have no part in the model.

    Raises ServerError.
    """
    tokens = [token.id for token in await backend.api.tokenize(prompt=text, model=model)]
    if backend.client is None or not tokens:
        top = await backend.api.likeliest(text, model)
        return Odds([name for name, _ in top], [logprob for _, logprob in top], False)
    logprobs = await backend.look(with_adapter, model, looking.next_logprobs, tokens)
    order = sorted(range(len(logprobs)), key=lambda i: -logprobs[i])
    tokenizer = backend.client.card.tokenizer
    named = [tokenizer.decode([i]) for i in order[:50]] + [""] * max(len(order) - 50, 0)
    return Odds(named, [logprobs[i] for i in order], True)


def show_odds(odds: Odds | None, temperature: float, top_k: float, top_p: float, min_p: float) -> str:
    """The odds under these rules."""
    if odds is None or not odds.names:
        return notice("Write the beginning of a text, and ask what comes next.")
    before = looking.reshaped(odds.logprobs, 1.0, 0, 1.0, 0.0)
    if not odds.whole:
        before = [2.718281828459045**logprob for logprob in odds.logprobs]  # of all tokens, not of these alone
    after = looking.reshaped(odds.logprobs, temperature, int(top_k or 0), top_p, min_p)
    return odds_picture(odds.names, before, after, odds.whole)


async def attend(backend: Backend, text: str, model: str | None, layer: int) -> Maps:
    """The maps of one layer for the beginning of a text; raises ServerError.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, figures 3 to 5.
    PAPER CONTEXT: different heads of a layer look at different things.
    INTUITION: the same sentence under several lamps.
    IMPLEMENTATION: all heads of a layer come from one forward; which of them is shown large costs nothing more.
    WHY: one head alone says little; beside its neighbours it is seen what it does that they do not.
    """
    shape = await backend.shape()
    tokens = (await backend.api.tokenize(prompt=text, model=model))[: min(looking.LONGEST, shape.block_size)]
    if not tokens:
        raise ServerError("write a text first: a few words are enough")
    layer = min(max(int(layer), 0), shape.n_layer - 1)
    heads = await backend.look(with_adapter, model, looking.attention_maps, [token.id for token in tokens], layer)
    return Maps(tokens, heads)


def show_attention(maps: Maps | None, head: int) -> tuple[str, str]:
    """(the heads of a layer, one of them large)."""
    if maps is None:
        return "", notice("Write a sentence, and look.")
    head = min(max(int(head), 0), len(maps.heads) - 1)
    large = figures(habits(maps.heads[head])) + attention_picture(maps.tokens, maps.heads[head])
    return heads_picture(maps.heads, head), large


def habits(maps: Sequence[Sequence[float]]) -> list[tuple[str, str]]:
    """Where a head looks on average: at the first token, at the one before, at the token itself.

    >>> habits([[1.0, 0.0], [0.25, 0.75]])
    [('25%', 'on the first token'), ('25%', 'on the token before'), ('75%', 'on itself')]
    """
    rows, n = list(enumerate(maps))[1:], max(len(maps) - 1, 1)
    parts = (sum(row[0] for _, row in rows), sum(row[i - 1] for i, row in rows), sum(row[i] for i, row in rows))
    return [(f"{part / n:.0%}", name) for part, name in zip(parts, HABITS)]
