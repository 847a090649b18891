"""The radix tree against a plain list of texts: matches, splits, eviction, references, exact counts."""

import heapq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phase4_advanced_inference.project10_prompt_caching.prefix_cache import RadixCache

SIZE = 3  # bytes of a token


class Letters:
    """A span that is its tokens; knows all that were ever dropped."""

    dropped: list[tuple[int, ...]] = []  # noqa: RUF012

    def __init__(self, tokens):
        self.tokens = tuple(tokens)

    def __len__(self):
        return len(self.tokens)

    @property
    def nbytes(self):
        return SIZE * len(self.tokens)

    def split(self, n):
        return Letters(self.tokens[:n]), Letters(self.tokens[n:])

    def drop(self):
        self.dropped.append(self.tokens)


def insert(cache, text):
    return cache.insert(text, lambda start, stop: Letters(text[start:stop]))


def read(match):
    """The tokens that a match stands for."""
    return tuple(token for span, n in match.parts for token in span.tokens[:n])


def test_texts_that_begin_alike_share_what_is_alike():
    cache = RadixCache()
    assert insert(cache, (1, 2, 3, 4)) == 4 and insert(cache, (1, 2, 5)) == 1 and insert(cache, (1, 2, 3)) == 0
    assert cache.n_tokens == 5 and cache.nbytes == 5 * SIZE
    for text, found in (((1, 2, 3, 9), 3), ((1, 2, 5, 6), 3), ((1, 9), 1), ((9,), 0), ((), 0)):
        with cache.match(text) as match:
            assert match.length == found and read(match) == text[:found]
    assert sorted(text for text, _ in cache.spans()) == [(1, 2), (1, 2, 3, 4), (1, 2, 5)]


def test_only_whole_pages_are_matched_and_split():
    cache = RadixCache(page=4)
    assert insert(cache, range(10)) == 8
    for text, found in ((range(12), 8), ((0, 1, 2, 3, 4, 5, 9, 9), 4), ((0, 1, 2, 9), 0), (range(3), 0)):
        assert cache.known(text) == found
    assert insert(cache, (0, 1, 2, 3, 4, 5, 9, 9, 9, 9, 9, 9)) == 8
    assert cache.known((0, 1, 2, 3, 4, 5, 6, 7)) == 8
    assert all(len(text) % 4 == len(span) % 4 == 0 for text, span in cache.spans())


def test_counts_are_exact():
    cache = RadixCache()
    insert(cache, (1, 2, 3))
    cache.match((1, 2, 9, 9)).release()
    cache.match((7,)).release()
    s = cache.statistics
    assert (s.asked, s.found, s.inserted, s.evicted) == (5, 2, 3, 0) and s.hit_rate == 0.4
    assert RadixCache().statistics.hit_rate == 0.0


def test_a_look_is_counted_once_it_is_used():
    cache = RadixCache(budget=6 * SIZE)
    insert(cache, [1, 1, 1])
    insert(cache, [2, 2, 2])
    cache.match([1, 1, 1, 5], counted=False).release()
    assert (cache.statistics.asked, cache.statistics.found) == (0, 0)
    with cache.match([1, 1, 1, 5], counted=False) as match:
        cache.count(match)
    assert (cache.statistics.asked, cache.statistics.found) == (4, 3)
    insert(cache, [3, 3])
    assert cache.known((2, 2, 2)) == 1 and cache.known((1, 1, 1)) == 3  # it was used last


def test_what_was_used_longest_ago_goes_first_and_from_its_end():
    cache = RadixCache(budget=6 * SIZE)
    insert(cache, (1, 1, 1))
    insert(cache, (2, 2, 2))
    cache.match((1, 1, 1)).release()
    Letters.dropped.clear()
    insert(cache, (3, 3))  # two tokens too many: the end of what begins with 2
    assert Letters.dropped == [(2, 2)] and cache.known((2, 2, 2)) == 1 and cache.known((1, 1, 1)) == 3
    insert(cache, (4, 4, 4, 4))
    assert (cache.known((2,)), cache.known((1, 1, 1)), cache.known((3, 3)), cache.known((4,) * 4)) == (0, 0, 2, 4)
    assert cache.nbytes == cache.budget and cache.statistics.evicted == 6


def test_a_parent_goes_only_after_its_children():
    cache = RadixCache()
    insert(cache, (1, 2, 3))
    insert(cache, (1, 2, 4))
    assert cache.evict(2 * SIZE) == 2 * SIZE and cache.known((1, 2)) == 2 and cache.n_tokens == 2
    cache.clear()
    assert (cache.n_tokens, cache.nbytes, list(cache.spans())) == (0, 0, [])


def walk(cache):
    """The leaf that a look at every node finds: the one that was used longest ago."""
    leaves = [node for node in cache._nodes() if not node.children and not node.holders]
    return min(leaves, key=lambda node: node.touched, default=None)


@settings(deadline=None)
@given(data=st.data())
def test_the_heap_finds_what_a_walk_through_the_tree_finds(data):
    cache, held = RadixCache(), []
    texts = st.lists(st.integers(0, 2), min_size=1, max_size=6)
    for _ in range(data.draw(st.integers(1, 40))):
        act = data.draw(st.sampled_from(["insert", "insert", "use", "hold", "release", "evict"]))
        if act == "insert":
            insert(cache, tuple(data.draw(texts)))
        elif act == "use":
            cache.match(data.draw(texts)).release()
        elif act == "hold":
            held.append(cache.match(data.draw(texts)))
        elif act == "release" and held:
            held.pop(data.draw(st.integers(0, len(held) - 1))).release()
        elif act == "evict":
            leaf = walk(cache)
            size, last = (leaf.span.nbytes, leaf.span.tokens[-1]) if leaf else (0, None)
            before = len(Letters.dropped)
            assert cache.evict(SIZE) == (SIZE if leaf else 0)  # one token, from the end of that leaf
            if leaf:
                assert Letters.dropped[before:] == [(last,)]
                assert leaf.span is None if size == SIZE else leaf.span.nbytes == size - SIZE
    for match in held:
        match.release()
    cache.clear()
    assert cache.nbytes == cache.n_tokens == 0 and not list(cache.spans())


def test_a_full_cache_does_not_look_at_all_texts(monkeypatch):
    cache, looks = RadixCache(), []
    for i in range(2000):
        insert(cache, (i // 100, i % 100, i))
    pop = heapq.heappop
    monkeypatch.setattr(heapq, "heappop", lambda heap: looks.append(1) or pop(heap))
    monkeypatch.setattr(cache, "_nodes", None)
    for _ in range(100):
        assert cache.evict(2 * SIZE) == 2 * SIZE
    assert len(looks) <= 400


def test_what_is_held_is_not_evicted():
    cache = RadixCache(budget=4 * SIZE)
    insert(cache, (1, 2, 3, 4))
    with cache.match((1, 2)) as match:  # a part of the edge holds all of it
        insert(cache, (5, 6))
        assert cache.known((1, 2, 3, 4)) == 4 and cache.known((5, 6)) == 0 and read(match) == (1, 2)
        insert(cache, (1, 2, 9))  # splits what is held
        cache.evict(99)
        assert cache.known((1, 2, 3, 4)) == 4 and cache.known((1, 2, 9)) == 2
    match.release()  # a second time does nothing
    cache.clear()
    assert cache.n_tokens == 0


def test_more_than_the_budget_is_cut_to_it():
    cache = RadixCache(budget=5 * SIZE + 1)
    insert(cache, range(100))
    assert cache.known(range(100)) == 5 and cache.nbytes <= cache.budget
    nothing = RadixCache(budget=0)
    insert(nothing, (1, 2))
    assert nothing.n_tokens == 0


def test_bad_arguments():
    for arguments in ({"page": 0}, {"budget": -1}):
        with pytest.raises(ValueError, match="must be at least 0, or none, and page="):
            RadixCache(**arguments)
    cache = RadixCache()
    with pytest.raises(ValueError, match="span for 2 tokens is for 1"):
        cache.insert((1, 2), lambda start, stop: Letters((1,)))
    assert cache.n_tokens == 0 and cache.known((1, 2)) == 0


TEXTS = st.lists(st.integers(0, 2), max_size=9).map(tuple)


class Trees(RuleBasedStateMachine):
    """Any sequence of calls against a set of beginnings: what is known, what it costs, and nothing lost or leaked."""

    def __init__(self):
        super().__init__()
        self.cache, self.page = None, 1
        self.made, self.held = 0, []
        Letters.dropped = []

    @precondition(lambda self: self.cache is None)
    @rule(page=st.integers(1, 3), budget=st.none() | st.integers(0, 20))
    def begin(self, page, budget):
        self.cache, self.page = RadixCache(budget and budget * SIZE, page), page

    @precondition(lambda self: self.cache)
    @rule(text=TEXTS)
    def insert(self, text):
        self.made += insert(self.cache, text)

    @precondition(lambda self: self.cache)
    @rule(text=TEXTS, keep=st.booleans())
    def match(self, text, keep):
        known = self.cache.known(text)
        match = self.cache.match(text)
        assert match.length == known and read(match) == text[:known] and known % self.page == 0
        self.held.append((match, text[:known]))
        if not keep:
            self.held.pop()[0].release()

    @precondition(lambda self: self.held)
    @rule()
    def release(self):
        self.held.pop(0)[0].release()

    @precondition(lambda self: self.cache)
    @rule(n=st.integers(0, 30))
    def evict(self, n):
        before, freed = self.cache.nbytes, self.cache.evict(n)
        assert freed == before - self.cache.nbytes

    @invariant()
    def nothing_is_lost(self):
        if self.cache is None:
            return
        spans = list(self.cache.spans())
        assert sum(len(span) for _, span in spans) == self.cache.n_tokens
        assert self.cache.n_tokens * SIZE == self.cache.nbytes
        assert all(text[-len(span) :] == span.tokens and len(span) for text, span in spans)
        assert self.made == self.cache.statistics.inserted
        assert self.made - sum(map(len, Letters.dropped)) == self.cache.n_tokens
        assert all(self.cache.known(text) >= len(text) for _, text in self.held)
        if self.cache.budget is not None and not self.held:
            self.cache.evict(self.cache.nbytes - self.cache.budget)
            assert self.cache.nbytes <= self.cache.budget


Trees.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestTrees = Trees.TestCase


if __name__ == "__main__":
    example = RadixCache(budget=5 * SIZE)
    for text in ((1, 2, 3), (1, 2, 4), (5, 6)):
        print(f"{text}: {insert(example, text)} new tokens; {example.n_tokens} remembered")
    raise SystemExit(pytest.main([__file__]))
