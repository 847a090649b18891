"""The scheduler: budgets, priorities, patience, fairness, preemption, and what always holds, whatever happens."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase4_advanced_inference.project12_dynamic_batching import scheduler as scheduler_module
from phase4_advanced_inference.project12_dynamic_batching.request import ABORTED, Request
from phase4_advanced_inference.project12_dynamic_batching.scheduler import Scheduler

ROOM = 10**6


class Memory:
    """A capacity that counts: rows, and places for tokens that are given out as texts grow."""

    def __init__(self, n_rows, n_places=ROOM, step_limit=ROOM):
        self.n_rows, self.n_places, self.step_limit = n_rows, n_places, step_limit
        self.held: dict[int, int] = {}  # row -> places

    @property
    def left(self):
        return self.n_places - sum(self.held.values())

    def check(self, request):
        if request.limit > self.n_places:
            raise ValueError(f"a text of {request.limit} tokens will never fit in {self.n_places}")

    def admit(self, request):
        if len(self.held) == self.n_rows or not self.left:
            return False
        request.row = min(set(range(self.n_rows)) - set(self.held))
        self.held[request.row] = 0
        return True

    def grow(self, request, n):
        if n > self.left:
            return False
        self.held[request.row] += n
        return True

    def preempt(self, request):
        self.release(request)
        request.fed = 0

    def release(self, request):
        del self.held[request.row]
        request.row = None


class House:
    """A scheduler with its requests, and a model that always says 1."""

    def __init__(self, capacity, **options):
        self.capacity, self.scheduler, self.requests = capacity, Scheduler(capacity, **options), []

    def add(self, n_prompt, n_new=4, **whose):
        params = SamplingParams(n_new, 0.0, seed=0, stop_ids=())
        request = Request(len(self.requests), [1] * n_prompt, params, NumberTokenizer(9), ROOM, **whose)
        self.scheduler.add(request)
        self.requests.append(request)
        return request

    def step(self):
        step = self.scheduler.next_step()
        for request in step.drawing if step else ():
            if request.accept(1, None).finish_reason:
                self.scheduler.finish(request)
        return step

    def run(self, n=10**5):
        steps = []
        while (self.scheduler.running or self.scheduler.n_waiting) and len(steps) < n:
            steps.append(self.step())
        return steps


def shares(step):
    """{request's number: tokens} of a step."""
    return {request.index: n for (_, n, _), request in zip(step.work, step.requests)}


# --- what always holds ---


class Anything(RuleBasedStateMachine):
    """Requests come, run, are called off; memory is short. What is scheduled must make sense all the same."""

    def __init__(self):
        super().__init__()
        self.house = House(Memory(3, 40, step_limit=9), max_tokens=12, patience=5)
        self.read: dict[int, int] = {}  # by request: tokens scheduled since it got its row

    @rule(n_prompt=st.integers(1, 25), n_new=st.integers(1, 15), priority=st.integers(0, 2), user=st.sampled_from("ab"))
    def add(self, n_prompt, n_new, priority, user):
        self.house.add(n_prompt, n_new, priority=priority, user=user)

    @rule()
    def add_what_never_fits(self):
        requests = len(list(self.house.scheduler.everyone()))
        with pytest.raises(ValueError, match="never fit"):
            self.house.add(41)
        assert len(list(self.house.scheduler.everyone())) == requests

    @precondition(lambda self: self.house.requests)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.house.requests))
        before = request.finish_reason
        self.house.scheduler.abort(request)
        assert request.finish_reason == (before or ABORTED) and request.row is None

    @rule(n=st.integers(1, 6))
    def step(self, n):
        for _ in range(n):
            self.one_step()

    def one_step(self):
        scheduler = self.house.scheduler
        texts = {r.index: list(r.tokens) for r in scheduler.everyone()}
        decoding = [r for r in scheduler.running if not r.reading]
        step = scheduler.next_step()
        if step is None:
            assert not scheduler.running and not scheduler.n_waiting
            return
        rows = [row for row, _, _ in step.work]
        assert len(set(rows)) == len(rows)  # no row twice
        total = sum(n for _, n, _ in step.work)
        assert 0 < total == scheduler.max_tokens - step.budget <= scheduler.max_tokens
        assert not set(step.preempted) & set(step.requests)  # who lost its row has no part in the step
        for request in [*step.preempted, *step.admitted]:
            self.read[request.index] = 0
        told = iter(step.tokens)
        for (row, n, n_wanted), request in zip(step.work, step.requests):
            assert request.row == row and 1 <= n <= self.house.capacity.step_limit
            start = self.read[request.index]  # each token once, in order
            text = texts[request.index]
            assert [next(told) for _ in range(n)] == text[start : start + n]
            self.read[request.index] = request.fed = start + n
            assert n_wanted == (start + n == len(text))  # a token is drawn exactly behind the newest one
        assert next(told, None) is None
        self.most_important(step, decoding)
        for request in step.drawing:
            if request.accept(1, None).finish_reason:
                scheduler.finish(request)

    def most_important(self, step, decoding):
        """Who decodes is never left out, and nobody is sent away but for somebody more important."""
        assert all(request in step.requests or request in step.preempted for request in decoding)
        for lost in step.preempted:
            assert any((-o.priority, o.index) < (-lost.priority, lost.index) or o.priority > lost.level
                       for o in self.house.scheduler.running)  # fmt: skip

    @invariant()
    def nobody_is_lost_and_no_memory(self):
        scheduler, capacity = self.house.scheduler, self.house.capacity
        alive = [r for r in self.house.requests if r.finish_reason is None]
        assert sorted(r.index for r in scheduler.everyone()) == [r.index for r in alive]
        assert {r.row for r in scheduler.running} == set(capacity.held)
        assert all(r.row is None for r in self.house.requests if r not in scheduler.running)
        assert all(capacity.held[r.row] == r.fed for r in scheduler.running) and capacity.left >= 0

    def teardown(self):
        for _ in range(3000):
            if not list(self.house.scheduler.everyone()):
                break
            self.one_step()
        assert all(r.finish_reason for r in self.house.requests)  # everything ends
        assert all(len(r.tokens) == r.limit for r in self.house.requests if r.finish_reason != ABORTED)
        assert not self.house.capacity.held  # and leaves nothing


TestAnything = Anything.TestCase
TestAnything.settings = settings(
    max_examples=300, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


# --- the budget ---


def test_no_decode_waits_while_a_long_prompt_is_read():
    house = House(Memory(4), max_tokens=10)
    early = [house.add(3, 50) for _ in range(3)]
    house.step()
    late = house.add(40, 2)
    for chunk in (7, 7, 7, 7, 7, 5):  # what three decodes leave of ten
        assert shares(house.step()) == {**{r.index: 1 for r in early}, late.index: chunk}
    assert len(late.tokens) == 41 and all(len(r.tokens) == 3 + 1 + 6 for r in early)


def test_with_a_large_budget_prompts_are_read_whole():
    house = House(Memory(4), max_tokens=10**6)
    first, second = house.add(300), house.add(500)
    assert shares(house.step()) == {first.index: 300, second.index: 500}
    third = house.add(200)
    assert shares(house.step()) == {first.index: 1, second.index: 1, third.index: 200}


def test_prompts_share_what_is_left_in_the_order_of_arrival_and_caches_bound_a_row():
    house = House(Memory(3, step_limit=16), max_tokens=20)
    for n in (30, 3, 9):
        house.add(n, 1)
    assert [shares(step) for step in house.run()] == [{0: 16, 1: 3, 2: 1}, {0: 14, 2: 6}, {2: 2}]


def test_rows_are_used_again_in_the_step_after_an_end():
    house = House(Memory(2), max_tokens=100)
    for n_new in (1, 3, 2):
        house.add(4, n_new)
    assert [shares(step) for step in house.run()] == [{0: 4, 1: 4}, {1: 1, 2: 4}, {1: 1, 2: 1}]


@pytest.mark.parametrize("bad", [{"max_tokens": 0}, {"patience": 0}])
def test_a_budget_or_patience_of_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="must be at least 1"):
        Scheduler(Memory(1), **bad)


# --- who goes first ---


def test_higher_priorities_overtake():
    house = House(Memory(1), max_tokens=100, patience=None)
    house.add(4, 2)
    house.step()
    low, same, higher = house.add(4, 1), house.add(4, 1), house.add(4, 1, priority=3)
    first = [next(iter(shares(step))) for step in house.run()]
    assert first == [higher.index, 0, low.index, same.index]  # 0 was sent away, and read itself anew


def test_a_higher_priority_takes_the_row_of_the_least_important_and_it_goes_on_later():
    house = House(Memory(2), max_tokens=100)
    middle, low = house.add(4, 9, priority=1), house.add(4, 9)
    house.step()
    urgent = house.add(4, 2, priority=2)
    step = house.step()
    assert step.preempted == [low] and step.admitted == [urgent] and low.row is None
    assert shares(step) == {middle.index: 1, urgent.index: 4}
    assert shares(house.step()) == {middle.index: 1, urgent.index: 1}
    assert shares(house.step()) == {middle.index: 1, low.index: 5}  # the prompt, and what it had said
    house.run()
    assert all(len(r.tokens) == r.limit for r in house.requests) and house.scheduler.n_preempted == 1


def test_a_row_goes_to_whom_it_was_made_free_for():
    house = House(Memory(2), max_tokens=4)
    low = house.add(2, 9)
    house.step()
    reader = house.add(40, 1, priority=1)
    house.step()
    urgent = house.add(4, 1, priority=1)
    step = house.step()
    assert step.preempted == [low] and step.admitted == [urgent]  # though the reader takes all tokens of this step
    assert shares(step) == {reader.index: 4}


def test_equals_are_not_sent_away():
    house = House(Memory(1), max_tokens=100)
    house.add(4, 20, priority=1)
    house.step()
    house.add(4, 1, priority=1)
    assert [shares(house.step()) for _ in range(5)] == [{0: 1}] * 5 and not house.scheduler.n_preempted


def served_under_pressure(patience):
    """In how many of 200 steps a request gets something, while one with priority arrives in each step."""
    house = House(Memory(1), max_tokens=100, patience=patience)
    house.add(4, 5, priority=1)
    low, count = house.add(4, 5), 0
    for _ in range(200):
        house.add(4, 2, priority=1)
        step = house.step()
        count += low in step.requests
    return count, low.finish_reason


def test_patience_frees_the_starving_and_lets_them_finish():
    assert served_under_pressure(None) == (0, None)
    assert served_under_pressure(20) == (5, "length")  # let in once, it is not sent away again


def test_who_ran_for_long_has_not_waited():
    house = House(Memory(1), max_tokens=100, patience=5)
    long = house.add(4, 100)
    for _ in range(50):
        house.step()
    urgent = house.add(4, 3, priority=1)
    assert all(urgent in house.step().requests for _ in range(3)) and urgent.finish_reason
    assert len(long.tokens) == 4 + 50 and house.scheduler.n_preempted == 1


def test_one_user_with_many_requests_does_not_keep_another_behind_them():
    house = House(Memory(2), max_tokens=100, patience=8)
    for _ in range(60):
        house.add(5, 5, user="many")
    for _ in range(40):  # the queue is now much older than anybody's patience
        house.step()
    for _ in range(4):
        house.add(5, 5, user="few")
    done = {"many": 0, "few": 0}
    while done["few"] < 4:
        before = {r.index for r in house.requests if r.finish_reason}
        house.step()
        for request in house.requests:
            if request.finish_reason and request.index not in before:
                done[request.user] += 1
    assert done["many"] <= 6  # they took turns


def test_counters_are_lifted_on_return():
    house = House(Memory(1), max_tokens=100)
    served = house.scheduler.served
    house.add(5, 1, user="early")
    house.run()
    for _ in range(20):
        house.add(5, 5, user="busy")
    for _ in range(30):
        house.step()
    assert served["early"] == 5 and served["busy"] > 30
    house.add(5, 5, user="early")
    assert served["early"] == served["busy"]  # no service was saved up while it was away
    house.run()
    most = max(served.values())
    house.add(5, 5, user="new")  # to an empty house
    assert served["new"] == most


def test_forgetting_users_changes_no_turn(monkeypatch):
    def turns(most):
        monkeypatch.setattr(scheduler_module, "MANY_USERS", most)
        house, order = House(Memory(2), max_tokens=16), []
        draw = random.Random(0)
        for _ in range(300):
            house.add(draw.randint(1, 9), draw.randint(1, 6), user=str(draw.randint(0, 60)))
            for _ in range(draw.randint(0, 4)):
                step = house.step()
                order.append(shares(step) if step else None)
        return order, len(house.scheduler.served)

    (forgetful, few), (faithful, many) = turns(4), turns(10**6)
    assert forgetful == faithful and few < many


def test_arrival_decides_between_requests_of_one_user():
    house = House(Memory(1), max_tokens=100)
    for _ in range(5):
        house.add(3, 2)
    assert [next(iter(shares(step))) for step in house.run()] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


# --- short memory ---


def test_the_latest_is_preempted_first_and_comes_back_first():
    house = House(Memory(3, n_places=20), max_tokens=100)
    a, b, c = (house.add(5, 10) for _ in range(3))
    steps = [house.step() for _ in range(3)]
    assert [step.preempted for step in steps] == [[], [], [c]]  # 15, 18, and no 21 places
    assert shares(steps[2]) == {a.index: 1, b.index: 1} and len(c.tokens) == 7
    house.add(2, 2)
    order = [r.index for step in house.run() for r in step.admitted]
    assert order[0] in (b.index, c.index) and order.index(c.index) < order.index(3)
    assert all(len(r.tokens) == r.limit for r in house.requests) and not house.capacity.held


def test_a_reader_without_room_waits_and_does_not_push_itself_out():
    house = House(Memory(2, n_places=20), max_tokens=30)
    first, reader = house.add(8, 6), house.add(14, 1)
    step = house.step()
    assert shares(step) == {first.index: 8} and reader.row is not None  # admitted, but there were 12 places
    while not first.finish_reason:
        assert house.step().preempted == []
    assert shares(house.step()) == {reader.index: 14}


# --- calling off ---


def test_abort_at_any_moment_frees_memory_at_once():
    house = House(Memory(2, n_places=40), max_tokens=10)
    decoding, reading, waiting = house.add(4, 9), house.add(30, 9), house.add(3, 9)
    house.step()
    assert (decoding.fed, reading.fed, waiting.row) == (4, 6, None) and house.capacity.left == 30
    for request, left in ((waiting, 30), (reading, 36), (decoding, 40)):
        house.scheduler.abort(request)
        assert (request.finish_reason, request.row, house.capacity.left) == (ABORTED, None, left)
        house.scheduler.abort(request)  # twice is once
    assert house.step() is None and not list(house.scheduler.everyone())
    ended = house.add(3, 1)
    house.run()
    house.scheduler.abort(ended)
    assert ended.finish_reason == "length"


def test_abort_while_preempted():
    house = House(Memory(1), max_tokens=10)
    low = house.add(4, 9)
    house.step()
    house.add(4, 2, priority=1)
    house.step()
    assert low in house.scheduler.waiting
    house.scheduler.abort(low)
    assert len(house.run()) == 1 and low.finish_reason == ABORTED


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
