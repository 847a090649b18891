"""
Chatting

This file implements a conversation on a page: sent, streamed, stopped, tried again, and kept, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - an assistant that is
  told how to behave, and then asked
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - the controls of sampling

Each component is explained with paper references for educational purposes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from phase10_deployment.project30_gradio.backend import Backend
from phase10_deployment.project30_gradio.pictures import notice, refusal
from phase10_deployment.project30_gradio.stops import until
from phase10_deployment.project30_gradio.talking import ServerError
from phase10_deployment.project30_gradio.wishes import Wishes

MOST_KEPT = 20  # conversations that a browser keeps
TITLE_LENGTH = 48
ENDS = {
    "stop": "ended by itself", "length": "cut off: the limit of tokens, or of the model's context, was reached",
    "stopped": "stopped: the server has freed its place", None: "",
}  # fmt: skip
WAITING = "reading the conversation …"


class Turn(NamedTuple):
    """How a conversation stands while it goes on."""

    messages: list[dict]
    told: str  # HTML: what it took, or what went wrong
    over: bool = False
    failed: bool = False


async def answer(
    backend: Backend, stop: asyncio.Event, messages: Sequence[dict], model: str | None, system: str, wishes: Wishes
) -> AsyncIterator[Turn]:
    """The conversation with its answer, again and again while that grows; the last message is the user's.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.5.
    PAPER CONTEXT: the assistant answers a whole conversation, under instructions that stand before it.
    INTUITION: everybody talks to somebody who reads the whole letter again before each reply.
    IMPLEMENTATION: what gets too long loses its oldest messages. The stream ends when the model does, or when `stop` is
        set; then the connection is closed, and the part that was written stays.
    WHY: who sees the first word after a moment waits gladly, and who has seen enough frees the place for others.
    """
    messages, began, n_pieces, cost, reason = list(messages), time.monotonic(), 0, None, None
    reply = {"role": "assistant", "content": ""}
    try:
        yield Turn(messages, notice(WAITING))
        told = [{"role": "system", "content": system.strip()}] if system and system.strip() else []
        body = {"model": model or None, **wishes.body()}
        kept, n_out = await backend.api.fitted([*told, *messages], body["max_tokens"])
        async for news in until(stop, backend.api.stream("/chat/completions", {**body, "messages": kept})):
            reply["content"] += news.text
            cost, reason = news if news.usage else cost, news.finish_reason or reason
            if news.text:
                n_pieces += 1
                yield Turn([*messages, dict(reply)], notice("writing …"))
        reason = "stopped" if stop.is_set() else reason
    except ServerError as error:
        kept = [*messages, reply] if reply["content"] else messages
        yield Turn(kept, refusal(error), over=True, failed=not reply["content"])
        return
    yield Turn([*messages, reply], notice(summary(cost, n_pieces, time.monotonic() - began, reason, n_out)), over=True)


def summary(cost, n_pieces: int, seconds: float, reason: str | None, n_out: int) -> str:
    """What an answer took, in a line."""
    n = cost.usage["completion_tokens"] if cost else n_pieces
    parts = [f"<b>{n}</b> tokens in {seconds:.1f} s ({n / max(seconds, 1e-9):.0f} a second)"]
    if cost:
        parts.append(f"{cost.cached} of {cost.usage['prompt_tokens']} prompt tokens found in the cache")
    if n_out:
        parts.append(f"the oldest {n_out} messages are forgotten: the model's context is full")
    return " · ".join([*parts, *filter(None, [ENDS.get(reason, reason)])])


def keep(saved: Sequence[dict], number: str, messages: Sequence[dict]) -> list[dict]:
    """The kept conversations with this one in front, under its own number; an empty one is not kept.

    >>> keep([{"id": "a", "messages": []}], "b", [{"role": "user", "content": "Hi"}])[0]["id"]
    'b'
    """
    others = [each for each in saved or [] if each["id"] != number]
    return ([{"id": number, "messages": list(messages)}] * bool(messages) + others)[:MOST_KEPT]


def titles(saved: Sequence[dict]) -> list[tuple[str, str]]:
    """What a list of conversations shows: (title, id)."""
    found = []
    for each in saved or []:
        title = " ".join(each["messages"][0]["content"].split())
        found.append((title[:TITLE_LENGTH] + "…" * (len(title) > TITLE_LENGTH) or "…", each["id"]))
    return found


def before_last_question(messages: Sequence[dict]) -> tuple[list[dict], str]:
    """A conversation without its last question and what followed, and that question.

    >>> before_last_question([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
    ([], 'Hi')
    """
    places = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        return list(messages), ""
    return list(messages[: places[-1]]), messages[places[-1]]["content"]
