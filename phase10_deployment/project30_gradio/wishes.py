"""
Wishes

This file implements what a user may turn to change a text, following:
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - temperature and nucleus sampling
- "Hierarchical Neural Story Generation" (Fan et al., 2018) - top-k sampling

Each component is explained with paper references for educational purposes.
"""

from typing import Any, NamedTuple

from phase10_deployment.project30_gradio.talking import ServerError


class Wishes(NamedTuple):
    """How a text is wanted, as the page's controls have it.

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3; "Hierarchical Neural Story
        Generation", arXiv:1805.04833 (top-k). Penalties, bias and grammar are practice.
    PAPER CONTEXT: the same model writes loops or nonsense, depending on how it is decoded.
    INTUITION: an order with ticks: what is not ticked is not said.
    IMPLEMENTATION: a field for each control, in their order; what changes nothing is left out of the request.
    WHY: a server of others may not know min-p, and need not, as long as nobody asks for it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: float = 0  # 0: off
    min_p: float = 0.0
    max_tokens: float = 256
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: float | None = None
    stop: str = ""  # one on each line; \\n stands for the end of a line
    logit_bias: str = ""  # id=number on each line
    json: bool = False  # the answer must be a JSON object

    def body(self) -> dict[str, Any]:
        """The fields of a request; raises ServerError for what cannot be read.

        >>> Wishes(top_k=5, stop="END\\n\\\\n\\\\n", logit_bias="7=-100").body() | {"temperature": 0}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'temperature': 0, 'max_tokens': 256, 'top_k': 5, 'stop': ['END', '\\n\\n'], 'logit_bias': {'7': -100.0}}
        """
        body: dict[str, Any] = {"temperature": float(self.temperature), "max_tokens": int(self.max_tokens or 256)}
        if self.top_k and self.top_k > 0:
            body["top_k"] = int(self.top_k)
        for name, off in (("top_p", 1.0), ("min_p", 0.0), ("repetition_penalty", 1.0), ("presence_penalty", 0.0),
                          ("frequency_penalty", 0.0)):  # fmt: skip
            if getattr(self, name) is not None and getattr(self, name) != off:
                body[name] = float(getattr(self, name))
        if self.seed is not None and self.seed != "":
            body["seed"] = int(self.seed)
        if stops := [line.replace("\\n", "\n") for line in self.stop.splitlines() if line]:
            body["stop"] = stops
        if bias := dict(_bias(line) for line in self.logit_bias.splitlines() if line.strip()):
            body["logit_bias"] = bias
        if self.json:
            body["response_format"] = {"type": "json_object"}
        return body


def _bias(line: str) -> tuple[str, float]:
    token, _, number = line.partition("=")
    try:
        return str(int(token)), float(number)
    except ValueError as error:
        raise ServerError(f"logit bias {line!r:.40}: write a token's id and a number, such as 42=-100") from error
