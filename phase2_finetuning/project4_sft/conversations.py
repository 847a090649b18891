"""
Conversations

This file implements what a conversation is, and reading many of them, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - prompts and answers
- "LIMA: Less Is More for Alignment" (Zhou et al., 2023) - few, varied and well-written ones suffice

Each component is explained with paper references for educational purposes.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from common.download import damage_of, open_text

ROLES = ("system", "user", "assistant")

# {"role": "user", "content": "Hello"}: the form of every chat API
Message = dict[str, str]


def check_messages(messages: Sequence[Message], answered: bool = True) -> None:
    """Refuse what is no conversation.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.1.
    PAPER CONTEXT: in the first step labelers demonstrate, for each prompt, the answer that is wanted.
    INTUITION: first perhaps a note for the actor, then question, answer, question, answer.
    IMPLEMENTATION: an optional system message, then user and assistant in turn, beginning with the user. `answered`:
        the last word is the assistant's (training); else it is the user's (the model is to speak next).
    WHY: a role out of order would teach the model to answer itself, or to write the user's lines.

    Raises ValueError that names the message.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"a conversation is a list of at least one message, not {messages!r:.60}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f'message {i} is {message!r:.60}, not {{"role": ..., "content": text}}')
        if message.get("role") not in ROLES:
            raise ValueError(f"message {i} has the role {message.get('role')!r}: use one of {', '.join(ROLES)}")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            where = i + len(messages) - len(turns)
            raise ValueError(f"message {where} is the {message['role']}'s, where it is the {expected}'s turn")
    if not turns or (turns[-1]["role"] == "assistant") != answered:
        who = "assistant" if answered else "user"
        raise ValueError(f"the last message must be the {who}'s, not the {(turns or messages)[-1]['role']}'s")


def read_conversations(path: str | Path) -> list[list[Message]]:
    """Read JSON Lines of ``{"messages": [...]}`` (also .gz, .xz, .zst); each conversation ends with an answer.

    Raises FileNotFoundError, or ValueError that names the file and the line.
    """
    return read_lines(path, _parse, "conversation: each line is to be an object with messages")


def read_lines(path: str | Path, parse: Callable, wanted: str) -> list:
    """``parse(object)`` of every line of JSON Lines; `wanted` says what a file without any should hold.

    Raises as `read_conversations`.
    """
    found, number = [], 0
    damaged = damage_of(path)
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - the messages below tell it
                if line.strip():
                    found.append(parse(json.loads(line)))
    except damaged as error:
        raise ValueError(f"{path} is damaged behind line {number} ({error}): fetch it again") from None
    except (ValueError, RecursionError) as error:  # also what json raises
        raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path} holds no {wanted}")
    return found


def _parse(entry) -> list[Message]:
    """The conversation in a JSON object."""
    if not isinstance(entry, dict) or "messages" not in entry:
        raise ValueError('no object with "messages"')
    check_messages(entry["messages"])
    return entry["messages"]


def split(conversations: Sequence[list[Message]], fraction: float) -> tuple[list, list]:
    """(training, held out): by a hash of the first user message, so that the same question is never on both sides.

    >>> one = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    >>> [len(part) for part in split([one, one], 0.5)] in ([2, 0], [0, 2])
    True
    """
    parts = [], []
    for messages in conversations:
        question = next(message["content"] for message in messages if message["role"] == "user")
        number = int.from_bytes(hashlib.sha256(question.encode("utf-8", "surrogatepass")).digest()[:8], "big")
        parts[number < fraction * 2**64].append(messages)
    return parts
