"""
Stopping

This file implements text out of tokens, piece by piece, up to where it ends following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2015) - tokens are pieces of words

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable, Sequence


def held_back(text: str, stops: Sequence[str]) -> int:
    r"""How many characters at the end of a text may yet become a stop text.

    >>> held_back("Yes.\nUs", ["\nUser:", "!"]), held_back("Yes.", ["\nUser:"])
    (3, 0)
    """
    longest = max((len(stop) for stop in stops), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)


class TextStream:
    """Tokens in, text out, as early as it is certain.

    PAPER: "Neural Machine Translation of Rare Words with Subword Units", arXiv:1508.07909, section 3.2; tokens here are
        bytes, so a character may be cut in two.
    PAPER CONTEXT: words are written as sequences of subword units, joined again afterwards.
    INTUITION: an interpreter who waits for the end of a syllable, and does not say what may have to be taken back.
    IMPLEMENTATION: the new text is what decoding the last tokens adds to decoding those before them; it waits while it
        ends in half a character (U+FFFD). What may be the beginning of a stop text waits, too.
    WHY: users see text at once, never half a letter, and never a part of what ends it. Costs do not grow with the text
        (but while bytes that are no text last, all of these are decoded again).

    Args:
        decode: token ids -> text; stops: texts that end it.

    >>> stream = TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"), ["END"])
    >>> [stream.push(byte) for byte in "é EN".encode()], stream.push(ord("D")), stream.stopped
    (['', 'é', ' ', '', ''], '', True)
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()):
        self.decode, self.stops, self.stopped = decode, stops, False
        self._ids, self._start, self._shown = [], 0, 0  # text up to _shown is known; _start is where it has context
        self._waiting = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that can be shown now. After `stopped` nothing more must come."""
        self._ids.append(token)
        return self._release(self._new_text(final=False))

    def finish(self) -> str:
        """No token comes any more: returns the rest."""
        text = self._release(self._new_text(final=True)) if not self.stopped else ""
        rest, self._waiting = ("", "") if self.stopped else (self._waiting, "")
        return text + rest

    def _new_text(self, final: bool) -> str:
        known = self.decode(self._ids[self._start : self._shown])
        text = self.decode(self._ids[self._start :])
        if text.endswith("\ufffd") and not final:
            return ""  # half a character, or bytes that are none: what follows will tell
        self._start, self._shown = self._shown, len(self._ids)
        return text[len(known) :]

    def _release(self, text: str) -> str:
        if not self.stops:
            return text
        text = self._waiting + text
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.stopped, self._waiting = True, ""
            return text[: min(found)]
        held = held_back(text, self.stops)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]
