"""Which replica a request goes to: the longest known beginning, within a bound on the load."""

import collections
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phase10_deployment.project28_serving.routing import Beginnings, beginning_of

TEXTS = st.lists(st.sampled_from(["aa", "bb", "cc"]), max_size=6).map("".join)  # of chunks, so that many begin alike
ROUNDS = st.lists(st.tuples(TEXTS, st.dictionaries(st.sampled_from("xyz"), st.integers(0, 9), min_size=1)), max_size=40)


def alike(a, b):
    """Characters at the beginning of two texts that are equal, in whole chunks of two."""
    return 2 * next((i for i in range(len(a) // 2 + 1) if a[2 * i : 2 * i + 2] != b[2 * i : 2 * i + 2] or
                     2 * i >= min(len(a), len(b))), 0)  # fmt: skip


@given(ROUNDS, st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_longest_known_beginning_wins_within_the_bound(rounds, slack, worth):
    beginnings, given_to = Beginnings(slack, chunk=2, worth=worth), {}
    for text, loads in rounds:
        given_to = {name: texts for name, texts in given_to.items() if name in loads}  # others are gone
        known = {name: max((alike(text, each) for each in texts), default=0) for name, texts in given_to.items()}
        chosen = beginnings.choose(text, loads)
        allowed = {name: n for name, n in known.items()
                   if n and n >= worth * len(text) and loads[name] <= min(loads.values()) + slack}  # fmt: skip
        if allowed:
            best = [name for name in allowed if allowed[name] == max(allowed.values())]
            assert chosen in best and loads[chosen] == min(loads[name] for name in best)
        else:
            assert loads[chosen] == min(loads.values())
        given_to.setdefault(chosen, []).append(text)
        assert beginnings.known(text)[chosen] == len(text) if text else not beginnings.known(text)


@given(ROUNDS, st.integers(1, 9))
def test_memory_is_bounded_and_counted(rounds, limit):
    beginnings = Beginnings(2, chunk=2, limit=limit)
    for text, loads in rounds:
        chosen = beginnings.choose(text, loads)
        assert len(beginnings) <= limit
        assert beginnings.held.keys() <= loads.keys()
        owned = collections.Counter(name for owners in beginnings._owners.values() for name in owners)
        assert +beginnings.held == owned
        if text:  # the beginning of the newest text is what is kept of it
            assert beginnings.known(text)[chosen] == 2 * min(limit, len(text) // 2)


def test_the_longest_unused_text_is_forgotten_from_its_end():
    beginnings = Beginnings(chunk=2, limit=6)
    beginnings.choose("aabbcc", {"x": 0})
    beginnings.choose("bbccaa", {"x": 0})
    assert beginnings.known("aabbcc") == {"x": 6}
    beginnings.choose("ccaa", {"x": 0})
    assert beginnings.known("aabbcc") == {"x": 2} and beginnings.known("bbccaa") == {"x": 6}


def test_different_texts_are_shared_out_evenly():
    beginnings, idle = Beginnings(chunk=2), dict.fromkeys("xyz", 0)
    found = collections.Counter(beginnings.choose(f"{i:02}{i:02}", idle) for i in range(30))
    assert found == dict.fromkeys("xyz", 10)


def test_a_popular_beginning_spreads_when_its_replica_is_busy():
    beginnings, loads = Beginnings(slack=2, chunk=2), dict.fromkeys("xyz", 0)
    for _ in range(30):  # nothing is ever finished
        loads[beginnings.choose("popular!", loads)] += 1
        assert max(loads.values()) - min(loads.values()) <= 3
    assert beginnings.known("popular!") == dict.fromkeys("xyz", 8)


def test_what_a_replica_knew_is_gone_with_it():
    beginnings = Beginnings(chunk=2)
    first = beginnings.choose("once upon a time", {"x": 0, "y": 0})
    second = next(name for name in "xy" if name != first)
    assert beginnings.choose("once upon a time", {second: 9}) == second
    assert beginnings.known("once upon a time") == {second: 16} and first not in beginnings.held


def test_a_very_long_text_is_remembered_in_part():
    beginnings = Beginnings(chunk=1, limit=10_000)
    beginnings.choose("ab" * 10_000, {"x": 0})
    assert len(beginnings) == Beginnings.DEPTH


def test_a_conversation_that_goes_on_begins_as_before():
    said = [{"role": "user", "content": "Who was Ada Lovelace?"}]
    more = [*said, {"role": "assistant", "content": "A mathematician."}, {"role": "user", "content": "When?"}]
    first = beginning_of(json.dumps({"model": "tiny", "messages": said}).encode())
    second = beginning_of(json.dumps({"temperature": 1, "messages": more, "model": "tiny"}).encode())
    assert second.startswith(first.rstrip("]"))
    assert beginning_of(json.dumps({"model": "polite", "messages": said}).encode()) != first


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"model": "tiny"}', b"[" * 100_000])
def test_what_cannot_be_read_has_no_beginning(body):
    assert beginning_of(body) == ""


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
