"""
Talking

This file implements asking a server for texts, and for what it knows of them, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - a conversation with a
  model, in which each answer depends on all that was said before

Each component is explained with paper references for educational purposes.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx

HEALTH_SECONDS = 3.0  # after which a server that says nothing is taken to be down
MOST_TOP = 20  # likeliest tokens that the API tells


class ServerError(Exception):
    """The server cannot do what it was asked; the message says why, and what to do."""


class Health(NamedTuple):
    """How a server is."""

    status: str  # ready, or why it is not: down, loading, restarting, draining, broken
    running: int = 0
    waiting: int = 0
    usage: float = 0.0  # part of the blocks that texts use


class Token(NamedTuple):
    """A token as it is shown."""

    id: int
    text: str


class News(NamedTuple):
    """What a stream brings: a piece of text, why it ended, what it cost."""

    text: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None

    @property
    def cached(self) -> int:
        """Tokens of the prompt that lay in the cache."""
        return ((self.usage or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or 0


class Api:
    """A server with OpenAI's interface, as this page needs it.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.5.
    PAPER CONTEXT: what the model reads is the whole conversation, in the form of its demonstrations.
    INTUITION: a telephone: dial, say everything again from the beginning, listen, hang up in the middle of a word.
    IMPLEMENTATION: plain HTTP. Leaving a stream closes its connection; by that the server knows that nobody listens,
        calls the text off, and its blocks are free before the next step.
    WHY: the same page serves a model in this very process, one in the next container, and one of somebody else.

    Args:
        url: the base URL, with /v1 as OpenAI's clients have it; key: None: none is asked for.

    Methods raise ServerError.
    """

    def __init__(self, url: str, key: str | None = None):
        self.url = url.rstrip("/")
        self.root = self.url.removesuffix("/v1")  # of the routes that OpenAI does not have
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def _client(self, seconds: float | None) -> httpx.AsyncClient:
        # A proxy of the environment must not come between this page and a server beside it.
        return httpx.AsyncClient(headers=self.headers, timeout=httpx.Timeout(seconds, connect=HEALTH_SECONDS),
                                 trust_env=False)  # fmt: skip

    @contextlib.asynccontextmanager
    async def _explained(self):
        """Turn what may go wrong on the way into words."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerError(f"no server answers at {self.url}: start one with `uv run python phase10_deployment/"
                              f"project28_serving/serve.py`, or check --api_url") from error  # fmt: skip
        except httpx.TimeoutException as error:
            raise ServerError(f"the server at {self.url} is too slow: it may be busy, try again") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error) or type(error).__name__
            raise ServerError(f"the connection to {self.url} broke ({why}): try again") from error
        except (ValueError, KeyError, TypeError) as error:  # of what was read from the answer
            raise ServerError(f"the server at {self.url} answers in a form that this page does not know: is it one of "
                              f"OpenAI's interface?") from error  # fmt: skip

    async def ask(self, method: str, url: str, body: Mapping | None = None, seconds: float | None = 60.0) -> Any:
        """One question, one answer, as JSON."""
        async with self._explained(), self._client(seconds) as client:
            response = await client.request(method, url, json=body)
        return checked(response)

    async def health(self) -> Health:
        """How the server is; never raises."""
        try:
            async with self._explained(), self._client(HEALTH_SECONDS) as client:
                response = await client.get(f"{self.root}/health")
            told = response.json()
            return Health(told["status"], told["running"], told["waiting"], told["kv_usage"])
        except ServerError:
            return Health("down")
        except (ValueError, KeyError, TypeError):  # a server of others
            return Health("ready" if response.status_code < 500 else "unavailable")

    async def models(self) -> list[str]:
        """The model and its adapters, by name."""
        return [each["id"] for each in (await self.ask("GET", f"{self.url}/models", seconds=10.0))["data"]]

    async def tokenize(self, **what) -> list[Token]:
        """The tokens of `prompt`, or of `messages` as the model reads them."""
        told = await self.ask("POST", f"{self.root}/tokenize", what)
        return [Token(*each) for each in zip(told["tokens"], told["token_strs"])]

    async def fitted(self, messages: Sequence[dict], wanted: int) -> tuple[list[dict], int]:
        """The newest of these messages that leave room for an answer, and how many were left out.

        A system message stays. Up to half of the room is kept free. A server that counts no tokens gets all of them.
        """
        told = [message for message in messages if message["role"] == "system"]
        said, n_out = [message for message in messages if message["role"] != "system"], 0
        while True:
            try:
                measured = await self.ask("POST", f"{self.root}/tokenize", {"messages": [*told, *said]})
                room = int(measured["max_model_len"])
            except (ServerError, KeyError, TypeError):
                return [*told, *said], n_out
            if measured["count"] <= room - min(wanted, room // 2) or len(said) < 2:
                return [*told, *said], n_out
            n = next((i for i in range(1, len(said)) if said[i]["role"] == "user"), len(said) - 1)
            said, n_out = said[n:], n_out + n

    async def likeliest(self, prompt: str | Sequence[int], model: str | None) -> list[tuple[str, float]]:
        """The likeliest next tokens with their log-probabilities, best first: as many as the API tells."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": MOST_TOP}
        told = (await self.ask("POST", f"{self.url}/completions", body))["choices"][0]["logprobs"]
        top = told["top_logprobs"][0] if told["top_logprobs"] else {}
        return sorted(top.items(), key=lambda each: -each[1])

    async def cost(self, prompt: str | Sequence[int], model: str | None) -> News:
        """Let a prompt be read, and say what lay in the cache."""
        body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        return News(usage=(await self.ask("POST", f"{self.url}/completions", body))["usage"])

    async def stream(self, path: str, body: Mapping) -> AsyncIterator[News]:
        """A text as it comes, of /chat/completions or /completions; whoever leaves early closes the connection."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        url = self.url + path
        async with self._explained(), self._client(None) as client, client.stream("POST", url, json=body) as response:
            if response.status_code != 200:
                await response.aread()
                checked(response)
            async for line in response.aiter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    for news in told_by(line):
                        yield news


def told_by(line: str) -> list[News]:
    """What an event of a stream tells; raises ServerError for one that tells of an error."""
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise ServerError(event["error"]["message"])
    found = [News(usage=event["usage"])] if event.get("usage") else []
    for choice in event["choices"]:
        text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        if text or choice.get("finish_reason"):
            found.append(News(text or "", choice.get("finish_reason")))
    return found


def checked(response: httpx.Response) -> Any:
    """The JSON of an answer; raises ServerError with what the server says, and what to do about it."""
    try:
        told = response.json()
    except ValueError:
        told = None
    if response.status_code == 200 and told is not None:
        return told
    if response.status_code == 401:
        raise ServerError("the server wants a key: start the page with --api_key KEY, one that the server knows")
    error = told.get("error") if isinstance(told, dict) else None
    words = error.get("message") if isinstance(error, dict) else None
    raise ServerError(words or f"the server at {response.url} answered {response.status_code}: is it one of OpenAI's "
                               f"interface, and does --api_url end with /v1?")  # fmt: skip
