"""
Drafts

This file implements who guesses the next tokens following:
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - a smaller model as the draft
- "Prompt Lookup Decoding" (Saxena, 2023) - the text itself as the draft

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from common import catalog
from phase3_core_inference.project8_kv_cache.buffers import on_device
from phase3_core_inference.project8_kv_cache.decoder import Decoder, FastDecoder
from phase3_core_inference.project8_kv_cache.kv_cache import KVCache
from phase3_core_inference.project8_kv_cache.work import octaves, quarter_octaves
from phase4_advanced_inference.project11_speculative_decoding.proposals import Ask, Draft, Draw, Proposal

__all__ = ["Draft", "ModelDraft", "NGramDraft"]


class NGramDraft:
    """Looks up where the last tokens occurred before, and proposes what came then.

    PAPER: "Prompt Lookup Decoding" (Saxena, 2023).
    PAPER CONTEXT: where output repeats input (summaries, code edits, multi-turn chat), a string match in the prompt is
        a draft that costs nothing.
    INTUITION: who begins to quote will probably go on quoting.
    IMPLEMENTATION: an index from n-gram to the place behind its last occurrence grows with the text; longer n-grams
        are tried first. Unlike the original, the newest match counts, and in generated text, too; a copy that reaches
        the end of the text goes on into itself, so a loop is proposed in full.
    WHY: no model, no memory to speak of, no training; and where nothing repeats, it proposes nothing and costs nothing.

    Args:
        n: the longest n-gram that is looked up; shortest: the shortest.

    >>> draft = NGramDraft(n=2)
    >>> draft.prepare(n_rows=1, capacity=64, vocab_size=100)
    >>> draft.propose([Ask(0, [5, 6, 7, 8, 5, 6], most=3)], draw=None).tokens     # 5 6 was followed by 7 8 5
    [[7, 8, 5]]
    """

    def __init__(self, n: int = 3, shortest: int = 1):
        if not 1 <= shortest <= n:
            raise ValueError(f"n={n} and shortest={shortest}: n-grams have at least one token, and n is the longest")
        self.sizes = range(n, shortest - 1, -1)
        self._known: dict[int, list[int]] = {}  # row -> the tokens whose continuations are in its index
        self._index: dict[int, dict[tuple[int, ...], int]] = {}

    def prepare(self, n_rows: int, capacity: int, vocab_size: int) -> None:
        """Forget everything."""
        self._known, self._index = {}, {}

    def propose(self, asks: Sequence[Ask], draw: Draw) -> Proposal:
        """What followed the last n-gram of each text, or nothing."""
        return Proposal.of([self._look_up(ask) for ask in asks])

    def _look_up(self, ask: Ask) -> list[int]:
        index = self._learn(ask.row, ask.tokens)
        tokens = list(ask.tokens)
        for n in self.sizes:
            place = index.get(tuple(tokens[-n:])) if len(tokens) >= n else None
            if place is not None:
                for j in range(ask.most):
                    tokens.append(tokens[place + j])
                return tokens[len(ask.tokens) :]
        return []

    def _learn(self, row: int, tokens: Sequence[int]) -> dict[tuple[int, ...], int]:
        """The index of a text: of n-grams that something follows."""
        known = self._known.setdefault(row, [])
        if known != tokens[: len(known)]:  # another text
            self.free(row)
            known = self._known.setdefault(row, [])
        index = self._index.setdefault(row, {})
        for place in range(max(len(known), 1), len(tokens)):
            for n in self.sizes:
                if place >= n:
                    index[tuple(tokens[place - n : place])] = place
        known.extend(tokens[len(known) :])
        return index

    def free(self, row: int) -> None:
        """Forget a row."""
        self._known.pop(row, None)
        self._index.pop(row, None)


class ModelDraft:
    """A smaller model of the same vocabulary, with a cache of its own.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, section 2.1; "Accelerating
        Large Language Model Decoding with Speculative Sampling", arXiv:2302.01318, section "Choice of Draft Models".
    PAPER CONTEXT: a more efficient model of the same task drafts gamma tokens one after another.
    INTUITION: an apprentice writes ahead; the master reads over it and corrects the first mistake.
    IMPLEMENTATION: its cache is cut to what the text still begins with, and what is missing is read: one token after a
        rejection, two after a draft that was kept whole; equally many for all rows, so that steps can be recorded.
        What is drafted goes from step to step on the device: the host learns of it when the next draft is asked for.
    WHY: it finds out by itself what is valid, so whoever drives it needs no bookkeeping for rejections, ends, or rows
        that change their text.

    Args:
        model: put in eval mode; cache, chunk, compiled, graphs: as of project 8's `Writer`.
    """

    def __init__(
        self,
        model,
        cache: str | Callable[..., KVCache] = "contiguous",
        chunk: int = 512,
        compiled: bool = False,
        graphs: bool = False,
    ):
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1: the most tokens of a step that reads")
        self.model, self.chunk = model.eval(), chunk
        self._build = catalog.resolve("caches", cache) if isinstance(cache, str) else cache
        self._fast, self._options = compiled or graphs, (compiled, graphs)
        self.cache, self.decoder, self._held = None, None, []  # _held[row]: the tokens in its cache
        self._latest: tuple[list[int], Proposal] = [], Proposal.of([])  # rows, and what was drafted for them last

    def prepare(self, n_rows: int, capacity: int, vocab_size: int) -> None:
        """Make a cache for so many rows, as long as this model can read."""
        config, weight = self.model.config, next(self.model.parameters())
        if config.vocab_size < vocab_size:
            raise ValueError(f"the draft knows {config.vocab_size} tokens, the text has {vocab_size}: a draft needs "
                             f"the tokenizer of its target")  # fmt: skip
        rounding = octaves if self._options[0] else quarter_octaves
        options = {"padded": True, "round_keys": rounding} if self._fast else {}
        options |= {"dtype": weight.dtype, "device": weight.device}
        capacity = min(quarter_octaves(capacity), config.block_size)
        self.cache = self._build(self.model.specs, n_rows, capacity, **options)
        kind = FastDecoder if self._fast else Decoder
        self.decoder = kind(self.model, self.cache, *(self._options if self._fast else ()))
        self._held, self._latest = [[] for _ in range(n_rows)], ([], Proposal.of([]))

    def propose(self, asks: Sequence[Ask], draw: Draw) -> Proposal:
        """Draft token after token, all rows in step; a row whose text exceeds what the model can read gets fewer."""
        self._remember()
        counts = [max(0, min(ask.most, self.cache.capacity - len(ask.tokens) + 1)) for ask in asks]
        live, all_odds = [i for i, n in enumerate(counts) if n], []
        device, width = self.cache.device, max(counts, default=0)
        drafted = torch.zeros(len(asks), width, dtype=torch.long, device=device)
        logits = self._catch_up([asks[i] for i in live]) if live else None
        for j in range(width):
            some = slice(None) if len(live) == len(asks) else on_device(live, device)
            positions = [len(asks[i].tokens) + j for i in live]
            tokens, odds = draw(logits, [asks[i].row for i in live], positions, drafted[some, :j])
            drafted[some, j] = tokens
            all_odds.append((some, odds))
            stay = [place for place, i in enumerate(live) if counts[i] > j + 1]
            if len(stay) < len(live):
                tokens, live = tokens[on_device(stay, device)], [live[place] for place in stay]
            if live:
                logits = self.decoder.step([(asks[i].row, 1, 1) for i in live], tokens)
        proposal = Proposal(drafted, counts, _stack(all_odds, len(asks)))
        self._latest = [ask.row for ask in asks], proposal
        return proposal

    def _remember(self) -> None:
        """Take down what was drafted last, all but the last token of each row: it lies in the cache."""
        rows, proposal = self._latest
        for row, draft in zip(rows, proposal.tokens):
            self._held[row] += draft[:-1]
        self._latest = [], Proposal.of([])

    def _catch_up(self, asks: Sequence[Ask]) -> Tensor:
        """Read what is missing of each text; logits (R, V) behind them."""
        for ask in asks:
            self._cut(ask.row, _common(self._held[ask.row], ask.tokens))
        while parts := self._long_parts(asks):  # up to the last token, as prompts are read
            self._step([(row, len(part), 0) for row, part in parts], [token for _, part in parts for token in part])
        n = max(len(ask.tokens) - len(self._held[ask.row]) for ask in asks)
        for ask in asks:  # equally many for all, if that means to read a token twice
            if n > 1 and len(ask.tokens) >= n:
                self._cut(ask.row, len(ask.tokens) - n)
        parts = [ask.tokens[len(self._held[ask.row]) :] for ask in asks]
        work = [(ask.row, len(part), len(part)) for ask, part in zip(asks, parts)]  # all wanted: can be recorded
        logits = self._step(work, [token for part in parts for token in part])
        ends = np.cumsum([len(part) for part in parts]) - 1
        return logits if len(logits) == len(asks) else logits[on_device(ends, logits.device)]

    def _long_parts(self, asks: Sequence[Ask]) -> list[tuple[int, Sequence[int]]]:
        """(row, tokens) of rows that miss more than a short step takes, at most `chunk` tokens in all."""
        parts, budget = [], self.chunk
        for ask in asks:
            start = len(self._held[ask.row])
            missing = len(ask.tokens) - start
            n = min(missing - 1, budget, self.cache.step_limit)
            if missing > min(2, self.cache.step_limit) and n:
                parts.append((ask.row, ask.tokens[start : start + n]))
                budget -= n
        return parts

    def _step(self, work, tokens: Sequence[int]) -> Tensor:
        logits, tokens = self.decoder.step(work, tokens), iter(tokens)
        for row, n, _ in work:
            self._held[row].extend(next(tokens) for _ in range(n))
        return logits

    def _cut(self, row: int, length: int) -> None:
        """Keep the first tokens of a row; where its cache cannot go back so far, none.

        The cache holds more than is known here where a step failed, or what draws for it did.
        """
        if length == len(self._held[row]) == self.cache.lengths[row]:
            return
        try:
            self.cache.truncate(row, length)
            del self._held[row][length:]
        except ValueError:  # a ring that has gone on: read again
            self.free(row)

    def free(self, row: int) -> None:
        """Forget a row."""
        self._remember()
        self.cache.free(row)
        self._held[row] = []


def _common(held: Sequence[int], tokens: Sequence[int]) -> int:
    """How many tokens of a cache serve a text, whose last one must be read in any case."""
    n = min(len(held), len(tokens) - 1)
    if held[:n] == tokens[:n]:
        return n
    return next(i for i in range(n) if held[i] != tokens[i])


def _stack(steps: Sequence[tuple[slice | Tensor, Tensor | None]], n_rows: int) -> Tensor | None:
    """The odds of all steps, each of some rows: (R, K, V), zero where a row drafted less; None if nothing was drawn."""
    if not steps or steps[0][1] is None:
        return None
    like = steps[0][1]
    stacked = like.new_zeros(n_rows, len(steps), like.shape[-1])
    for j, (some, odds) in enumerate(steps):
        stacked[some, j] = odds
    return stacked
