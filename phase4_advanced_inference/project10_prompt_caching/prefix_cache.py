"""
Prefix cache

This file implements a radix tree over the beginnings of texts, and what is kept of each, following:
- "SGLang: Efficient Execution of Structured Language Model Programs" (Zheng et al., 2023) - RadixAttention: the tree,
  its least recently used leaves, the references of running requests
- "Prompt Cache: Modular Attention Reuse for Low-Latency Inference" (Gim et al., 2023) - attention states are worth
  keeping between requests

Each component is explained with paper references for educational purposes.
"""

import heapq
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol


class Span(Protocol):
    """What is kept for some tokens in a row: keys and values here, blocks in project 13. The tree looks at no more.

    Whoever makes a span gives it to the tree, which drops it when it is evicted.
    """

    nbytes: int

    def __len__(self) -> int:
        """How many tokens it is for."""
        ...

    def split(self, n: int) -> "tuple[Span, Span]":
        """Two spans for the first n tokens and the rest, in place of this one, which may still be read."""
        ...

    def drop(self) -> None:
        """Give back what it holds."""
        ...


def packed(tokens: Sequence[int]) -> array:
    """Tokens as numbers side by side: thousands of them are compared in microseconds."""
    return array("Q", tokens if isinstance(tokens, list) else list(tokens))


@dataclass(eq=False)
class _Node:
    """An edge of the tree and where it ends: some tokens, and the span for them."""

    tokens: array
    span: Span | None
    parent: "_Node | None"
    children: "dict[bytes, _Node]" = field(default_factory=dict)  # by their first page of tokens
    holders: int = 0  # matches that are in use, here or further down
    touched: int = 0  # when it was last asked for

    def path(self) -> "list[_Node]":
        """From below the root down to this node."""
        nodes, node = [], self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]


class Match:
    """What the tree knows of the beginning of a text. It is held, so that it is not evicted, until it is released.

    PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
    PAPER CONTEXT: a node that running requests use has a reference count above zero and is not evicted.
    INTUITION: a book on loan cannot be thrown away.
    IMPLEMENTATION: `parts` are (span, n): use the first n tokens of each, which is all of them but for the last.
        Nothing is split for a match. A context manager: leaving it releases.
    WHY: spans are used after the tree was asked, and another request may fill it meanwhile.
    """

    def __init__(self, asked: int, length: int, parts: list[tuple[Span, int]], node: _Node):
        self.asked, self.length, self.parts, self._node = asked, length, parts, node
        for each in self.path():
            each.holders += 1

    def path(self) -> list[_Node]:
        """The nodes that it holds."""
        return self._node.path() if self._node else []

    def release(self) -> None:
        """The spans are not used any more; a second time does nothing."""
        for each in self.path():
            each.holders -= 1
        self._node = None

    def __enter__(self) -> "Match":
        return self

    def __exit__(self, *_) -> None:
        self.release()


@dataclass
class Statistics:
    """Exact counts of tokens."""

    asked: int = 0  # of texts that were looked up
    found: int = 0  # of these, known
    inserted: int = 0  # taken in
    evicted: int = 0  # thrown away

    @property
    def hit_rate(self) -> float:
        """The part of all tokens asked for that was found."""
        return self.found / self.asked if self.asked else 0.0


class RadixCache:
    """
    Spans for the beginnings of texts, shared by all texts that begin alike

    PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
    PAPER CONTEXT: a radix tree maps token sequences to cached keys and values; the least recently used leaf goes first.
    INTUITION: a family tree of texts: what two have in common stands once, in the trunk; the tips are pruned.
    IMPLEMENTATION: an edge holds many tokens and one span, and is split where texts part. The tree counts bytes,
        references and tokens; what a span is, it does not know.
    WHY: keys and values depend on all tokens before them, so a *beginning* is what can be reused, and nothing else.

    Args:
        budget: bytes that all spans together may take; None: no limit.
        page: tokens are matched and split in whole pages of so many (project 13: the size of a block).

    Tokens are whole numbers from 0 on.

    >>> class Letters(str):                                             # a span can be anything
    ...     nbytes = property(len)
    ...     def split(self, n): return Letters(self[:n]), Letters(self[n:])
    ...     def drop(self): print("dropped", self)
    >>> cache = RadixCache(budget=8)
    >>> for text in ("romeo", "romulus"):                               # "rom" is shared
    ...     _ = cache.insert(text.encode(), lambda start, stop, text=text: Letters(text[start:stop]))
    dropped o
    >>> with cache.match(b"romulan") as match:
    ...     [(str(span), n) for span, n in match.parts]
    [('rom', 3), ('ulus', 2)]
    """

    def __init__(self, budget: int | None = None, page: int = 1):
        if page < 1 or (budget is not None and budget < 0):
            raise ValueError(f"budget={budget} must be at least 0, or none, and page={page} at least 1")
        self.budget, self.page = budget, page
        self.root = _Node(packed(()), None, None)
        self.statistics, self.nbytes, self.n_tokens = Statistics(), 0, 0
        self._clock = itertools.count(1)
        self._leaves: list[tuple[int, int, _Node]] = []  # a heap by last use; what stands there may be out of date

    def match(self, tokens: Sequence[int], counted: bool = True) -> Match:
        """The longest known beginning, in whole pages; hold it as long as its spans are used.

        A model needs at least one token to go on from: pass all but the last. Who only wants to look asks for a match
        that is not `counted`, and does not make it look used; if it is used after all, `count` says so.
        """
        tokens = packed(tokens)
        node, n, parts = self._walk(tokens)
        match = Match(len(tokens), n, parts, node)
        if counted:
            self.count(match)
        return match

    def count(self, match: Match) -> None:
        """A match that is held is used: statistics know of it, and its spans are the last to be evicted."""
        now = next(self._clock)
        for each in match.path():
            each.touched = now
        self.statistics.asked += match.asked
        self.statistics.found += match.length

    def known(self, tokens: Sequence[int]) -> int:
        """How many tokens `match` would find; nothing is counted or touched."""
        return self._walk(packed(tokens))[1]

    def _key(self, tokens: array, n: int = 0) -> bytes:
        """The page of tokens behind the first n, by which a node finds its child."""
        return tokens[n : n + self.page].tobytes()

    def _walk(self, tokens: array) -> tuple[_Node, int, list[tuple[Span, int]]]:
        """The node in which the known beginning ends, its length, and the spans on the way with how much of each."""
        node, n, parts = self.root, 0, []
        while (child := node.children.get(self._key(tokens, n))) is not None:
            alike = self._alike(child.tokens, tokens[n:])
            parts.append((child.span, alike))
            node, n = child, n + alike
            if alike < len(child.tokens):
                break
        return node, n, parts

    def _alike(self, a: array, b: array) -> int:
        """The number of equal tokens at the beginning, in whole pages, found by halves: comparing slices is quick."""
        low, high = 0, min(len(a), len(b))
        if a[:high] == b[:high]:
            return high // self.page * self.page
        while high - low > 1:  # equal up to `low`, not up to `high`
            middle = (low + high) // 2
            low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
        return low // self.page * self.page

    def insert(self, tokens: Sequence[int], make: Callable[[int, int], Span]) -> int:
        """Take in a text, in whole pages; returns how many tokens are new.

        PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
        PAPER CONTEXT: a finished request's tokens stay in the tree; a node is split where a new text parts from it.
        INTUITION: walk the tree as far as it knows the way, then grow a branch.
        IMPLEMENTATION: make(start, stop) is asked for the span of the new tokens alone. Then the budget is kept: what
            was used longest ago goes, the new text itself last of all.
        WHY: what is there already need not be copied out of a cache again.
        """
        tokens = packed(tokens)[: len(tokens) // self.page * self.page]
        node, n, _ = self._walk(tokens)
        inside = n - sum(len(each.tokens) for each in node.path()[:-1])  # of the last edge
        now = next(self._clock)
        if n < len(tokens):
            if inside < len(node.tokens):
                node = self._split(node, inside)
            child = _Node(tokens[n:], make(n, len(tokens)), node, touched=now)
            if len(child.span) != len(child.tokens):
                raise ValueError(f"the span for {len(child.tokens)} tokens is for {len(child.span)}")
            node.children[self._key(child.tokens)] = node = child
            self._count(child, 1)
            self._queue(child)
            self.statistics.inserted += len(child.tokens)
        for each in node.path():
            each.touched = now
        if self.budget is not None:
            self.evict(self.nbytes - self.budget)
        return len(tokens) - n

    def _split(self, node: _Node, n: int) -> _Node:
        """Put a node above this one for its first n tokens; this one keeps the rest, and those who hold it."""
        head, tail = node.span.split(n)
        before = node.span.nbytes
        above = _Node(node.tokens[:n], head, node.parent, holders=node.holders, touched=node.touched)
        node.parent.children[self._key(above.tokens)] = above
        node.tokens, node.span, node.parent = node.tokens[n:], tail, above
        above.children[self._key(node.tokens)] = node
        self.nbytes += head.nbytes + tail.nbytes - before
        return above

    def _count(self, node: _Node, sign: int) -> None:
        self.nbytes += sign * node.span.nbytes
        self.n_tokens += sign * len(node.tokens)

    def evict(self, nbytes: int) -> int:
        """Throw away at least so many bytes, if that much is not held; returns how many.

        PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
        PAPER CONTEXT: the least recently used leaf is evicted first, then its parent when that has become a leaf.
        INTUITION: prune the twigs that nobody has looked at for longest.
        IMPLEMENTATION: a heap of leaves by last use, which is mended where it is read: a leaf that was used since goes
            in again. Of the last one only the end goes, as its beginning is what is shared longest.
        WHY: a full cache evicts in every step, so that a walk through the whole tree would cost more than the model.
        """
        freed, held = 0, []
        while freed < nbytes and self._leaves:
            touched, _, node = heapq.heappop(self._leaves)
            if node.span is None or node.children:
                continue  # it is gone, or no leaf any more
            if node.holders:
                held.append(node)
            elif node.touched > touched:
                self._queue(node)
            else:
                freed += self._shorten(node, nbytes - freed)
                self._queue(node.parent if node.span is None else node)
        for node in held:
            self._queue(node)
        return freed

    def _queue(self, node: _Node) -> None:
        """Let a node that is or may be a leaf be found by `evict`."""
        heapq.heappush(self._leaves, (node.touched, id(node), node))

    def _shorten(self, leaf: _Node, nbytes: int) -> int:
        """Drop the end of a leaf, or all of it; returns the bytes."""
        before = self.nbytes
        pages, size = len(leaf.tokens) // self.page, leaf.span.nbytes
        keep = max(0, (size - nbytes) * pages // max(size, 1)) * self.page
        self._count(leaf, -1)
        self.statistics.evicted += len(leaf.tokens) - keep
        tail = leaf.span
        if keep:
            leaf.span, tail = leaf.span.split(keep)
            leaf.tokens = leaf.tokens[:keep]
            self._count(leaf, 1)
        else:
            del leaf.parent.children[self._key(leaf.tokens)]
            leaf.span = None
        tail.drop()
        return before - self.nbytes

    def clear(self) -> None:
        """Throw away all that nobody holds."""
        self.evict(self.nbytes)

    def _nodes(self) -> Iterator[_Node]:
        """All nodes but the root, parents before their children."""
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    def spans(self) -> Iterator[tuple[tuple[int, ...], Span]]:
        """All spans, each with the text that ends where it does: a text's beginning before the text."""
        for node in self._nodes():
            yield tuple(itertools.chain.from_iterable(each.tokens for each in node.path())), node.span
