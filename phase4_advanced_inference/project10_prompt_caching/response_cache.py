"""
Response caches

This file implements caches of whole answers, to be compared with caches of keys and values, following:
- "Prompt Cache: Modular Attention Reuse for Low-Latency Inference" (Gim et al., 2023) - reuse inside the model, which
  changes no answer; what is here stands before the model, and may

Each component is explained with paper references for educational purposes.
"""

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Callable


class ExactCache:
    """Answers by the very text of the question.

    PAPER: beside "Prompt Cache: Modular Attention Reuse for Low-Latency Inference", arXiv:2311.04934; practice.
    PAPER CONTEXT: there, a hit saves the reading of a prompt; here, the model is not asked at all.
    INTUITION: the clerk who answers the same letter with the same letter.
    IMPLEMENTATION: a dictionary of at most `size` entries, the least recently used goes. The key must hold all that the
        answer depends on: prompt, parameters, model.
    WHY: right if the answer may be the same each time: not for sampled text, not where the world changes meanwhile.
    """

    def __init__(self, size: int = 1024):
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        self.size, self._answers = size, OrderedDict()

    def get(self, question: str) -> str | None:
        """The answer to this question, if it was given before."""
        if question in self._answers:
            self._answers.move_to_end(question)
        return self._answers.get(question)

    def put(self, question: str, answer: str) -> None:
        """Remember an answer."""
        self._answers[question] = answer
        self._answers.move_to_end(question)
        if len(self._answers) > self.size:
            self._answers.popitem(last=False)


def letters_of(text: str, n: int = 3) -> dict[str, float]:
    """A text as a vector of length 1: how often each n letters in a row occur in it.

    >>> sorted(letters_of("to be"))
    [' be', ' to', 'be ', 'o b', 'to ']
    """
    text = f" {' '.join(text.lower().split())} "
    counts = Counter(text[i : i + n] for i in range(len(text) - n + 1))
    length = math.sqrt(sum(count * count for count in counts.values()))
    return {gram: count / length for gram, count in counts.items()}


def likeness(a: dict[str, float], b: dict[str, float]) -> float:
    """The cosine of two vectors of length 1."""
    return sum(value * b.get(key, 0.0) for key, value in a.items())


class SemanticCache:
    """Answers by a question that is like enough.

    PAPER: beside "Prompt Cache: Modular Attention Reuse for Low-Latency Inference", arXiv:2311.04934; practice.
    PAPER CONTEXT: reuse there needs the same tokens; here likeness takes the place of equality.
    INTUITION: the clerk who no longer reads letters to their end.
    IMPLEMENTATION: the question with the largest cosine, if that reaches `threshold`; vectors as dictionaries, by
        default of three letters in a row, or by whatever `embed` gives.
    WHY: to see the risk: "is it safe" and "is it unsafe" are more alike than two ways to ask the same. There is no
        threshold without wrong answers; the benchmark counts them.
    """

    def __init__(self, threshold: float, embed: Callable[[str], dict[str, float]] = letters_of):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold} must lie above 0 and not above 1, where only equal vectors match")
        self.threshold, self.embed, self._entries = threshold, embed, {}

    def get(self, question: str) -> str | None:
        """The answer to the most similar question, if it is similar enough."""
        vector = self.embed(question)
        best = max(self._entries.values(), key=lambda entry: likeness(vector, entry[0]), default=None)
        return best[1] if best and likeness(vector, best[0]) >= self.threshold else None

    def put(self, question: str, answer: str) -> None:
        """Remember an answer."""
        self._entries[hashlib.sha256(question.encode()).digest()] = (self.embed(question), answer)
