"""
Timeline

This file implements a picture of who was in the batch when, following:
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - the figures of its
  section 2 and 3: requests that end early, and requests that join
- "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (Agrawal et al., 2024) - steps that mix
  chunks of prompts with decodes

Each component is explained with paper references for educational purposes.
"""

import string
from collections.abc import Mapping
from dataclasses import dataclass

from phase4_advanced_inference.project12_dynamic_batching.scheduler import Step

LETTERS = string.ascii_lowercase
EMPTY = "·"


@dataclass(frozen=True)
class Share:
    """What one request got of one step."""

    step: int
    row: int
    owner: int  # the request's number
    n_tokens: int
    reads: bool  # a chunk of its prompt, or of what it must read again; else it writes


class Timeline:
    """Who had which row in which step.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), sections 2
        and 3.1; "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", arXiv:2403.02310, section 3.
    PAPER CONTEXT: both argue with pictures of this kind: holes behind requests that ended early, and decodes that stall
        while a prompt is read.
    INTUITION: the table plan of a restaurant over an evening: one line a table, one colour a guest.
    IMPLEMENTATION: a step's work, noted after the step; as text one character a step and row, as a plot merged spans.
    WHY: a policy is understood at a glance, and so is what is wrong with it.
    """

    def __init__(self, n_rows: int):
        self.n_rows = n_rows
        self.shares: list[Share] = []
        self.times: list[tuple[float, float]] = []  # of each step: when it began and ended

    @property
    def n_steps(self) -> int:
        """How many steps were noted."""
        return len(self.times)

    @property
    def occupancy(self) -> float:
        """Rows that had work, of all rows in all steps."""
        return len(self.shares) / max(1, self.n_rows * self.n_steps)

    def note(self, step: Step | None, owners: Mapping[int, int], began: float = 0.0, ended: float = 0.0) -> None:
        """Note a step that was just taken; owners: what to call requests, by their index."""
        if step is None:
            return
        for (row, n_new, _), request in zip(step.work, step.requests):
            # a last token to be read alone looks like a decode, unless it is one of the prompt
            reads = n_new > 1 or request.fed <= request.n_prompt
            self.shares.append(Share(self.n_steps, row, owners[request.index], n_new, reads))
        self.times.append((began, ended))

    def text(self, width: int = 100, first: int = 0, last: int | None = None) -> str:
        """A character a step and row: a letter a request, in capitals while it reads, a dot where nobody is.

        >>> timeline = Timeline(2)
        >>> timeline.shares = [Share(0, 0, 0, 9, True), Share(1, 0, 0, 1, False), Share(1, 1, 1, 4, True)]
        >>> timeline.times = [(0, 1), (1, 2), (2, 3)]
        >>> print(timeline.text())
        row 0 │Aa·
        row 1 │·B·
              └0
        """
        last = self.n_steps if last is None else min(last, self.n_steps)
        rows = [[EMPTY] * (last - first) for _ in range(self.n_rows)]
        for share in self.shares:
            if first <= share.step < last:
                letter = LETTERS[share.owner % len(LETTERS)]
                rows[share.row][share.step - first] = letter.upper() if share.reads else letter
        digits, lines = len(str(self.n_rows - 1)), []
        for start in range(0, last - first, width):
            for number, row in enumerate(rows):
                lines.append(f"row {number:>{digits}} │{''.join(row[start : start + width])}")
            lines.append(" " * (digits + 5) + "└" + _ticks(first + start, min(width, last - first - start)))
        return "\n".join(lines)

    def spans(self) -> list[tuple[int, float, float, int, bool]]:
        """(row, first step, step behind the last, request, reads) of what belongs together, for `common.plots`."""
        spans: list[tuple[int, float, float, int, bool]] = []
        for share in sorted(self.shares, key=lambda s: (s.row, s.step)):
            row, start, stop, *kind = spans[-1] if spans else (None,) * 5
            if (row, stop, kind) == (share.row, share.step, [share.owner, share.reads]):
                spans[-1] = (row, start, share.step + 1, *kind)
            else:
                spans.append((share.row, share.step, share.step + 1, share.owner, share.reads))
        return spans


def _ticks(first: int, n: int, every: int = 20) -> str:
    """Numbers of steps below the first and each `every`th of n characters.

    >>> _ticks(0, 45)
    '0                   20                  40'
    """
    line = ""
    for place in range(0, n, every):
        number = str(first + place)
        if place + len(number) <= n or not place:
            line = line.ljust(place) + number
    return line
