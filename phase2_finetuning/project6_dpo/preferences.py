"""
Preferences

This file implements what a preference is, and reading many of them, following:
- "Training a Helpful and Harmless Assistant with Reinforcement Learning from Human Feedback" (Bai et al., 2022) - two
  answers to one conversation, and which of them a person prefers
- "Direct Preference Optimization: Your Language Model is Secretly a Reward Model" (Rafailov et al., 2023) - pairs are
  all that is needed: no reward model, no sampling

Each component is explained with paper references for educational purposes.
"""

from pathlib import Path
from typing import NamedTuple

from phase2_finetuning.project4_sft.conversations import Message, check_messages, read_lines


class Preference(NamedTuple):
    """A conversation that waits for an answer, the answer that was preferred, and the other one."""

    messages: list[Message]
    chosen: str
    rejected: str


def check_preference(entry: dict) -> Preference:
    """
    The preference in a JSON object; refuses what is none

    PAPER: arXiv:2204.05862 (HH-RLHF), section 2.
    PAPER CONTEXT: crowdworkers talk to two models at once and pick, at each turn, the better of two answers.
    INTUITION: not "this is right" but "rather this than that".
    IMPLEMENTATION: {"prompt_messages": [...], "chosen": text, "rejected": text}; the prompt ends with the user. Equal
        answers are refused: there is nothing to prefer, and their pull on the model would cancel out.
    WHY: a pair that is silently no pair costs nothing but the quality that it should have brought.

    Raises ValueError that says what is missing or wrong.

    >>> asked = [{"role": "user", "content": "Hi"}]
    >>> check_preference({"prompt_messages": asked, "chosen": "Hello.", "rejected": "No."})
    Preference(messages=[{'role': 'user', 'content': 'Hi'}], chosen='Hello.', rejected='No.')
    """
    fields = ("prompt_messages", "chosen", "rejected")
    missing = [name for name in fields if not isinstance(entry, dict) or name not in entry]
    if missing:
        raise ValueError(f"no object with {', '.join(missing)}")
    for name in ("chosen", "rejected"):
        if not isinstance(entry[name], str):
            raise ValueError(f"{name} is {entry[name]!r:.60}, not the text of an answer")
    check_messages(entry["prompt_messages"], answered=False)
    if entry["chosen"] == entry["rejected"]:
        raise ValueError(f"chosen and rejected are the same answer, {entry['chosen']!r:.60}: leave such pairs out")
    return Preference(entry["prompt_messages"], entry["chosen"], entry["rejected"])


def read_preferences(path: str | Path) -> list[Preference]:
    """Read JSON Lines as `check_preference` takes them (also .gz, .xz, .zst).

    Raises FileNotFoundError, or ValueError that names the file and the line.
    """
    return read_lines(
        path, check_preference, "preference: each line is to be an object with prompt_messages, chosen and rejected"
    )
