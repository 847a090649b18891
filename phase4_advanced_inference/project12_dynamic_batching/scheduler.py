"""
Scheduler

This file implements who gets how many tokens of the next step following:
- "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022) - iteration-level
  scheduling: requests join and leave the batch between any two steps
- "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve" (Agrawal et al., 2024) - a budget of tokens,
  decodes first, prompts in chunks with what is left
- "Fairness in Serving Large Language Models" (Sheng et al., 2024) - the user who was served least comes first

Each component is explained with paper references for educational purposes.
"""

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from phase4_advanced_inference.project12_dynamic_batching.capacity import Capacity
from phase4_advanced_inference.project12_dynamic_batching.request import ABORTED, Request

MANY_USERS = 1024  # of whom more are remembered only as long as it matters

__all__ = ["Request", "Scheduler", "Step"]


@dataclass
class Step:
    """What the next forward is told to do, for whom."""

    budget: int  # tokens that may still be added
    work: list[tuple[int, int, int]] = field(default_factory=list)  # (row, n_new, n_wanted), for the cache
    tokens: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)  # of each item of the work
    admitted: list[Request] = field(default_factory=list)  # who got a row
    preempted: list[Request] = field(default_factory=list)  # who lost one

    @property
    def drawing(self) -> list[Request]:
        """Those for whom a token is drawn."""
        return [request for (_, _, n_wanted), request in zip(self.work, self.requests) if n_wanted]


class Scheduler:
    """Requests in, steps out.

    PAPER: "Orca: A Distributed Serving System for Transformer-Based Generative Models" (Yu et al., 2022), sections 3
        and 4.2; "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", arXiv:2403.02310, section 4.
    PAPER CONTEXT: a finished request leaves at once and a new one joins at the next iteration; chunks of prompts fill
        what decodes leave of a token budget, so that no decode waits for a long prompt.
    INTUITION: a bus that stops at every step, instead of a coach that leaves when the last passenger has arrived.
    IMPLEMENTATION: decodes first, then prompts that are being read, then the queue, until the budget is used. Where
        memory runs out, the least important request that has no part in the step yet gives its own back.
    WHY: a batch of fixed members is as slow as its longest text, and as empty as its shortest ones make it.

    Args:
        capacity: where texts have their keys and values (capacity.py); max_tokens: of a step.
        patience: steps of waiting that count as one level of priority, so that nobody waits for ever; None: strict.
    """

    def __init__(self, capacity: Capacity, max_tokens: int = 512, patience: int | None = 256):
        if max_tokens < 1 or (patience is not None and patience < 1):
            raise ValueError(f"max_tokens={max_tokens} and patience={patience} must be at least 1 (patience may be "
                             f"None: strict priorities)")  # fmt: skip
        self.capacity, self.max_tokens, self.patience = capacity, max_tokens, patience
        self.running: list[Request] = []
        self.served: defaultdict[str, int] = defaultdict(int)  # tokens read and written for each user
        self._many_users = MANY_USERS
        self.n_steps = self.n_preempted = 0
        self._queues: dict[tuple[int, str], deque[Request]] = {}  # (priority, user) -> in the order of arrival

    @property
    def waiting(self) -> list[Request]:
        """The queue, in no particular order."""
        return [request for queue in self._queues.values() for request in queue]

    @property
    def n_waiting(self) -> int:
        """How many there are in the queue."""
        return sum(map(len, self._queues.values()))

    def add(self, request: Request) -> None:
        """Let a request queue up; raises ValueError for one that will never fit."""
        self.capacity.check(request)
        active = {key[1] for key in self._queues} | {r.user for r in self.running}
        if request.user not in active:  # who was away has not saved up service; behind an empty house all are even
            least = min((self.served[user] for user in active), default=max(self.served.values(), default=0))
            self.served[request.user] = max(self.served[request.user], least)
            self._forget(active | {request.user}, least)
        request.queued = self.n_steps
        self._queues.setdefault((request.priority, request.user), deque()).append(request)

    def _forget(self, active: set[str], least: int) -> None:
        """Where users are many, forget those who are away and would be lifted to `least` anyway."""
        if len(self.served) > self._many_users:
            kept = {user: n for user, n in self.served.items() if user in active or n > least}
            self.served = defaultdict(int, kept)
            self._many_users = max(MANY_USERS, 2 * len(kept))

    def finish(self, request: Request) -> None:
        """A request has ended, whether it runs, waits, or was in a step that is not over."""
        if request.row is not None:
            self.running.remove(request)
            self.capacity.release(request)
        else:
            self._take(request)
            request.kept = None

    def abort(self, request: Request) -> None:
        """Call a request off, at any moment; one that has ended already stays as it is."""
        if request.finish_reason is None:
            request.finish_reason = ABORTED
            self.finish(request)

    def next_step(self) -> Step | None:
        """The next step; None if there is nothing to do for now."""
        self.n_steps += 1
        step = Step(self.max_tokens)
        self._make_way(step)
        decoding, reading = [], []
        for request in sorted(self.running, key=_importance):
            (reading if request.reading else decoding).append(request)
        for request in decoding:
            if request.row is not None and not request.complete and not request.waits:
                self._serve(request, step, 1 + len(request.draft))
        for request in reading:
            if request.row is not None:
                self._serve(request, step, request.unread)
        self._admit(step)
        return step if step.work else None

    def _serve(self, request: Request, step: Step, n: int) -> None:
        """Give a request up to n tokens of this step, if there is room for them."""
        n = min(n, step.budget, self.capacity.step_limit)
        if not n or not (self.capacity.grow(request, n) or self._make_room(request, step, n)):
            return
        unread = request.unread
        # Logits are wanted behind the newest token and behind each guess, if nothing before them is left to read.
        n_wanted = 1 + n - unread if n >= unread and not request.complete else 0
        step.work.append((request.row, n, n_wanted))
        step.tokens += request.next_tokens(n)
        step.requests.append(request)
        step.budget -= n
        request.fed += n
        self.served[request.user] += n

    def _make_room(self, request: Request, step: Step, n: int) -> bool:
        """Find memory for n tokens more by preemption.

        PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
            section 4.5.
        PAPER CONTEXT: first come, first served: the latest request is preempted first, all of its blocks at once.
        INTUITION: when the lifeboat is full, who came last gets off, and is first in the queue for the next.
        IMPLEMENTATION: the least important one without a part in this step; a decode may find that it is itself. One
            that still reads its prompt does not push itself out: it waits for a later step.
        WHY: the most important request always gets on, so the queue always moves.
        """
        served = set(map(id, step.requests))
        while True:
            victim = max((r for r in self.running if id(r) not in served), key=_importance)
            if victim is request and request.reading:
                return False
            self._preempt(victim, step)
            if victim is request:
                return False
            if self.capacity.grow(request, n):
                return True

    def _preempt(self, request: Request, step: Step) -> None:
        """Take a request's row; it goes to the front of its queue."""
        self.capacity.preempt(request)  # first: if it fails, this is still a running request, to be called off as such
        self.running.remove(request)
        request.queued = self.n_steps - request.waited  # its time on a row was no waiting
        self._queues.setdefault((request.priority, request.user), deque()).appendleft(request)
        step.preempted.append(request)
        self.n_preempted += 1

    def _make_way(self, step: Step) -> None:
        """Let running requests of lower priority leave, where one in the queue finds no room."""
        while self.running and (request := self._first()) and not request.pending:
            victim = max(self.running, key=lambda r: (-r.level, r.index))
            if victim.level >= request.priority:
                return
            if not self.capacity.admit(request):
                self._preempt(victim, step)
                if not self.capacity.admit(request):  # what was made free is for nobody else
                    continue
            self._enter(request, step)

    def _admit(self, step: Step) -> None:
        """Let the queue in, as long as there are tokens and room."""
        while step.budget and (request := self._first()):
            if request.pending or request in step.preempted or not self.capacity.admit(request):
                return
            self._enter(request, step)
            self._serve(request, step, request.unread)

    def _enter(self, request: Request, step: Step) -> None:
        request.level = self._levels()[request.priority]  # who got in by patience is not sent away for lack of priority
        request.waited = self.n_steps - request.queued
        self._take(request)
        self.running.append(request)
        step.admitted.append(request)

    def _first(self) -> Request | None:
        """Who is next: by priority and patience, then the user served least, then by arrival.

        PAPER: "Fairness in Serving Large Language Models", arXiv:2401.00588, section 4 (the virtual token counter).
        PAPER CONTEXT: each client has a counter of tokens served; the one with the smallest counter is admitted next,
            and a client that comes back is lifted to the least of the others.
        INTUITION: at the buffet, who has had least goes first; who comes late does not eat for the time missed.
        IMPLEMENTATION: one queue for each (priority, user); only their heads are compared. Tokens read and written
            count alike.
        WHY: otherwise one user with a thousand requests keeps all others waiting behind them.
        """
        heads, levels = (queue[0] for queue in self._queues.values()), self._levels()
        return min(heads, key=lambda r: (-levels[r.priority], self.served[r.user], r.index), default=None)

    def _levels(self) -> dict[int, int]:
        """How urgent each priority is by now: it ages as one, as patience within it would favour long queues."""
        levels: dict[int, int] = {}
        for (priority, _), queue in self._queues.items():
            waited = (self.n_steps - queue[0].queued) // self.patience if self.patience else 0
            levels[priority] = max(levels.get(priority, priority), priority + waited)
        return levels

    def _take(self, request: Request) -> None:
        """Remove a request from its queue."""
        key = (request.priority, request.user)
        self._queues[key].remove(request)
        if not self._queues[key]:
            del self._queues[key]

    def everyone(self) -> Iterator[Request]:
        """All requests that have not ended."""
        yield from self.running
        yield from self.waiting


def _importance(request: Request) -> tuple[int, int]:
    """Smaller is more important: by priority, then by arrival."""
    return -request.priority, request.index
