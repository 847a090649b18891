"""
Routing

This file implements which of several replicas a request goes to, following:
- "SGLang: Efficient Execution of Structured Language Model Programs" (Zheng et al., 2023) - a router that remembers
  which worker has seen which beginnings, and sends what begins alike to the same one
- "Clipper: A Low-Latency Online Prediction Serving System" (Crankshaw et al., 2016) - replicas of a model, each with a
  queue and a load of its own

Each component is explained with paper references for educational purposes.
"""

import functools
import json
from collections import Counter, OrderedDict
from collections.abc import Mapping


class Beginnings:
    """Which replica has the beginning of a text in its cache, as far as a router can know.

    PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
    PAPER CONTEXT: with several workers, each keeps a tree of its own; a router keeps a tree over all of them, matches
        new requests against it and weighs the shared prefix of each worker. It need not be exact.
    INTUITION: the receptionist remembers which doctor has seen a patient, and sends him there again unless that
        waiting room is much fuller than the next one.
    IMPLEMENTATION: the key of a chunk of text is a hash of all text up to its end, so that a dict from keys to replicas
        is the tree. Who knows most of a text gets it, if that is a worthwhile part and its load is near the least;
        otherwise the least loaded one, of equals who knows the fewest chunks. The longest unused keys are forgotten.
    WHY: a prompt whose beginning is cached costs its end alone; without a bound on the load, the one replica that knows
        a popular system prompt would do all the work.

    Deviation: the tree is one of characters, and of what was sent, not of what the replicas still hold.

    Args:
        slack: requests by which a replica that knows a text may be busier than the least busy one.
        chunk: characters that are remembered and matched as a whole.
        limit: chunks that are remembered at most.
        worth: part of a text that must be known for it to matter who knows it.

    >>> beginnings = Beginnings(slack=2, chunk=4)
    >>> beginnings.choose("once upon a time", {"a": 0, "b": 0}), beginnings.choose("in the year 1912", {"a": 1, "b": 0})
    ('a', 'b')
    >>> beginnings.choose("once upon a hill", {"a": 2, "b": 0}), beginnings.choose("once upon a hill", {"a": 3, "b": 0})
    ('a', 'b')
    """

    DEPTH = 256  # chunks of one text at most: what begins alike for so long seldom parts later

    def __init__(self, slack: int = 16, chunk: int = 128, limit: int = 65536, worth: float = 0.5):
        if slack < 0 or chunk < 1 or limit < 1 or not 0 <= worth <= 1:
            raise ValueError(f"slack={slack} must be at least 0, chunk={chunk} and limit={limit} at least 1, and "
                             f"worth={worth} between 0 and 1")  # fmt: skip
        self.slack, self.chunk, self.limit, self.worth = slack, chunk, limit, worth
        self._owners: OrderedDict[int, set[str]] = OrderedDict()  # key -> who knows it; the longest unused one first
        self.held: Counter[str] = Counter()  # chunks that each replica knows

    def __len__(self) -> int:
        return len(self._owners)

    def choose(self, text: str, loads: Mapping[str, int]) -> str:
        """The replica for a text, which is remembered.

        loads: of all replicas that are there, by name: requests that each is serving. One that is not named is gone,
        and what it knew with it.
        """
        for name in self.held.keys() - loads.keys():
            self.forget(name)
        keys = self._keys(text)
        known, least = self._known(keys), min(loads.values())
        near = [name for name, n in known.items() if n >= self.worth * len(keys) and loads[name] <= least + self.slack]
        if near:
            chosen = max(near, key=lambda name: (known[name], -loads[name]))
        else:
            chosen = min(loads, key=lambda name: (loads[name], self.held[name]))
        self._remember(keys, chosen)
        return chosen

    def known(self, text: str) -> dict[str, int]:
        """How many characters of a text each replica knows; only those that know some."""
        return {name: n * self.chunk for name, n in self._known(self._keys(text)).items()}

    def forget(self, name: str) -> None:
        """A replica is gone."""
        for key in [key for key, owners in self._owners.items() if name in owners]:
            self._owners[key].discard(name)
            if not self._owners[key]:
                del self._owners[key]
        del self.held[name]

    def _keys(self, text: str) -> list[int]:
        """A key for each whole chunk: of all text up to its end."""
        keys, key = [], 0
        for start in range(0, min(len(text) - self.chunk + 1, self.DEPTH * self.chunk), self.chunk):
            key = hash((key, text[start : start + self.chunk]))
            keys.append(key)
        return keys

    def _known(self, keys: list[int]) -> dict[str, int]:
        """How many of these keys, from the first one on, each replica knows."""
        known: dict[str, int] = {}
        for i, key in enumerate(keys):
            owners = self._owners.get(key, ())
            if not owners:
                break
            known |= dict.fromkeys(owners, i + 1)  # who knows a chunk knows all before it
        return known

    def _remember(self, keys: list[int], name: str) -> None:
        """Note who has got a text, its end first: of a text's chunks, the first is then the last to be forgotten."""
        for key in reversed(keys):
            owners = self._owners.setdefault(key, set())
            self._owners.move_to_end(key)
            self.held[name] += name not in owners
            owners.add(name)
        while len(self._owners) > self.limit:
            _, owners = self._owners.popitem(last=False)
            self.held.subtract(owners)


def beginning_of(body: bytes) -> str:
    """The part of a request by which it is routed: the model's name, the tools, the conversation or the prompt.

    A conversation that goes on begins as it did before. A body that cannot be read has no beginning: its replica will
    say what is wrong with it.

    >>> beginning_of(b'{"temperature": 0, "prompt": "Once", "model": "tiny"}')
    '["tiny", null, "Once"]'
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(fields, dict):
        return ""
    said = next((fields[name] for name in ("messages", "prompt", "input") if name in fields), None)
    return "" if said is None else json.dumps([fields.get("model"), fields.get("tools"), said], ensure_ascii=False)


@functools.cache
def prefix_router() -> type:
    """A router of Ray Serve that asks `Beginnings`; keyword arguments of its `initialize_state` are those.

    PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
    PAPER CONTEXT: a request is routed by the length of the prefix that it shares with each worker.
    INTUITION: the rule above, with Ray's list of who is there and how busy.
    IMPLEMENTATION: the routed call's argument has a `text`. Ray counts what each replica is serving, and asks those of
        which it has heard nothing for seconds; what a chosen replica refuses is chosen anew.
    WHY: starting, watching and counting replicas is Ray's; only the choice is ours.

    Raises ImportError where there is no Ray.
    """
    from ray.serve.request_router import RequestRouter

    class PrefixRouter(RequestRouter):
        """Replicas by the beginnings of texts."""

        def initialize_state(self, **options) -> None:
            self.beginnings = Beginnings(**options)

        async def choose_replicas(self, candidate_replicas, pending_request=None):
            counts = self.replica_queue_len_cache
            silent = [each for each in candidate_replicas if counts.get(each.replica_id) is None]
            await self._probe_queue_lens(silent, 0)
            there = {each.replica_id.unique_id: each for each in candidate_replicas}
            loads = {name: counts.get(each.replica_id) or 0 for name, each in there.items()}
            text = pending_request.args[0].text if pending_request else ""
            return [[there[self.beginnings.choose(text, loads)]]]

    return PrefixRouter


def __getattr__(name: str):
    """Ray finds a router by its module and name: this is where it gets it, without Ray being imported before."""
    if name == "PrefixRouter":
        return prefix_router()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
