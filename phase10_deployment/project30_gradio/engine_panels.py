"""
Panels of the engine

This file implements what the panels of the playground do that show an engine at work, following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - blocks of the
  running batch
- "SGLang: Efficient Execution of Structured Language Model Programs" (Zheng et al., 2023) - known beginnings
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - guesses kept and refused

Each component is explained with paper references for educational purposes.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple

from phase10_deployment.project30_gradio.backend import Backend, with_adapter
from phase10_deployment.project30_gradio.blocks_now import Snapshot, shown_blocks, snapshot
from phase10_deployment.project30_gradio.guessing import Guess, guess
from phase10_deployment.project30_gradio.memory_pictures import blocks_picture, guess_picture, prefix_picture
from phase10_deployment.project30_gradio.pictures import notice
from phase10_deployment.project30_gradio.stops import until
from phase10_deployment.project30_gradio.talking import ServerError, Token

BLOCKS, GUESSES = "blocks", "guesses"  # what may be stopped
MOST_SNAPSHOTS = 400
MOST_SENT = 6  # prompts that the panel of beginnings remembers
EVERY = 0.15  # seconds between two pictures on the way


class Film(NamedTuple):
    """What the panel of blocks has seen: all moments so far, and a picture of one of them."""

    moments: list[Snapshot]
    place: int  # of the moment in the picture: the newest, and when all is over the fullest
    picture: str
    over: bool = False


def film_of(moments: list[Snapshot], over: bool = False) -> Film:
    """The film so far, or the whole film."""
    fullest = max(range(len(moments)), key=lambda i: (len(moments[i].owners), i))
    place = fullest if over else len(moments) - 1
    return Film(moments, place, show_moment(moments, place), over)


async def run_batch(
    backend: Backend, session: str, text: str, model: str | None, n: int, n_tokens: int, apart: bool
) -> AsyncIterator[Film]:
    """Let some texts be written from one beginning, and watch the blocks until they end or the session says stop.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180, 4.4.
    PAPER CONTEXT: parallel samples of one prompt share its blocks, and have their own from where they part.
    INTUITION: a film of the cloakroom while a party comes in together and leaves one by one.
    IMPLEMENTATION: the texts come through the API like everybody's. Beside them the engine is asked for a snapshot
        after another; each waits for the end of a step, so no step is seen half done.
    WHY: sharing, growth and release follow each other in a second: the moments are kept, to be looked at in rest.

    apart: number the texts in front, so that they have no beginning in common. Raises ServerError.
    """
    prompts = [f"{i + 1}. {text}" if apart else text for i in range(n)]
    body = {"model": model, "prompt": prompts, "max_tokens": n_tokens, "temperature": 1.0, "ignore_eos": True}
    moments = [await backend.look(snapshot)]
    with backend.stops.begin(session, BLOCKS) as stop:
        failed: list[ServerError] = []

        async def write() -> None:
            try:
                async for _ in until(stop, backend.api.stream("/completions", body)):
                    pass
            except ServerError as error:
                failed.append(error)

        writing = asyncio.ensure_future(write())
        try:
            shown_at = 0.0
            while not writing.done() and len(moments) < MOST_SNAPSHOTS:
                moment = await backend.look(snapshot)
                if moment != moments[-1]:
                    moments.append(moment)
                now = asyncio.get_running_loop().time()
                if now - shown_at > EVERY:
                    shown_at = now
                    yield film_of(moments)
                await asyncio.sleep(0.005)
        finally:
            stop.set()
            await asyncio.gather(writing, return_exceptions=True)
    if failed:
        raise failed[0]
    moments.append(await backend.look(snapshot))
    yield film_of(moments, over=True)


def show_moment(moments: Sequence[Snapshot], place: int) -> str:
    """One picture of a film; `place` counts from 0."""
    if not moments:
        return notice("Let a few texts be written, and watch where their keys and values lie.")
    moment = moments[min(max(int(place), 0), len(moments) - 1)]
    return blocks_picture(moment, shown_blocks(moments))


async def send_prompt(
    backend: Backend, text: str, model: str | None, sent: Sequence[tuple[list[Token], int]]
) -> tuple[list[tuple[list[Token], int]], str]:
    """Let a prompt be read; returns the prompts so far, the newest first, and their picture.

    PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
    PAPER CONTEXT: before a request is read, the tree is asked for the longest beginning that it knows.
    INTUITION: ask twice, and see what the second time is free.
    IMPLEMENTATION: one token is written behind the prompt, and the server's own count is believed.
    WHY: it works against any server that counts cached tokens as OpenAI does, this one or another.

    Raises ServerError.
    """
    tokens = await backend.api.tokenize(prompt=text, model=model)
    if not tokens:
        raise ServerError("write a text first: one that is longer than a block has something to be found")
    cost = await backend.api.cost([token.id for token in tokens], model)
    sent = [(tokens, cost.cached), *sent][:MOST_SENT]
    return sent, prefix_picture(sent)


async def speculate(
    backend: Backend, session: str, text: str, model: str | None, k: int, n_tokens: int, temperature: float
) -> AsyncIterator[str]:
    """Continue a text by guesses and checks, and draw each step; raises ServerError.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, algorithm 1, figure 1.
    PAPER CONTEXT: each run of the model yields between one token and one more than were guessed.
    INTUITION: watch the apprentice write ahead, and the master strike out.
    IMPLEMENTATION: one call of the engine for each step, so that others are served in between.
    WHY: a rate of acceptance is a number; which words were guessed and which not tells what it depends on.
    """
    prompt = await backend.api.tokenize(prompt=text, model=model)
    if not prompt:
        raise ServerError("write the beginning of a text first")
    tokens, guesses, texts = [token.id for token in prompt], [], {token.id: token.text for token in prompt}
    room = (await backend.shape()).block_size
    if len(tokens) > room - 2:
        raise ServerError(f"the text has {len(tokens)} tokens, and the model reads {room}: leave out some")
    decode = backend.client.card.tokenizer.decode
    with backend.stops.begin(session, GUESSES) as stop:
        while sum(len(each.gained) for each in guesses) < n_tokens and not stop.is_set():
            step: Guess | None = await backend.look(with_adapter, model, guess, tokens, k, temperature)
            if step is None:
                break
            guesses.append(step)
            tokens += step.gained
            texts |= {token: decode([token]) for token in (*step.draft, step.own)}
            yield guess_picture(prompt, guesses, texts)
