"""Traces and timelines: lengths and arrivals as asked, times by a clock that the test turns, pictures as expected."""

import math

import numpy as np
import pytest
import torch

from common import settings
from phase1_foundation.project3_pretrain.model import PRESETS, Transformer
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, generate
from phase3_core_inference.project8_kv_cache.rivals import NumberTokenizer
from phase4_advanced_inference.project12_dynamic_batching import benchmark_config
from phase4_advanced_inference.project12_dynamic_batching.batcher import Batcher
from phase4_advanced_inference.project12_dynamic_batching.capacity import GangSlots, Slots
from phase4_advanced_inference.project12_dynamic_batching.timeline import Share, Timeline
from phase4_advanced_inference.project12_dynamic_batching.traces import (
    Arrival,
    Lengths,
    Record,
    Replay,
    make_trace,
    own_params,
    replay,
)

TOKENS = list(range(64))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Transformer(PRESETS["llama-7b"](vocab_size=64, block_size=64, n_layer=1, n_head=2, n_embd=16, n_ff=16))
    return model.eval().requires_grad_(False)


class Clock:
    """A second a step; sleeping takes as long as was asked for."""

    def __init__(self, batcher):
        self.now, self.slept, step = 0.0, [], batcher.step

        def timed_step():
            self.now += 1.0
            return step()

        batcher.step = timed_step

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def served(model, trace, n_rows=2, params=None, **options):
    batcher = Batcher(model, NumberTokenizer(64), n_rows, **options)
    clock = Clock(batcher)
    return replay(batcher, trace, params, clock, clock.sleep), clock


# --- traces ---


def test_lengths_are_log_normal_and_clipped():
    drawn = Lengths(50, 0.7, 10, 200).draw(20_000, np.random.default_rng(0))
    assert min(drawn) == 10 and max(drawn) == 200 and np.median(drawn) == pytest.approx(50, rel=0.03)
    free = np.log(Lengths(500, 0.7).draw(20_000, np.random.default_rng(1)))
    assert free.mean() == pytest.approx(math.log(500), abs=0.02) and free.std() == pytest.approx(0.7, rel=0.02)
    assert set(Lengths(7, 0.0).draw(9, np.random.default_rng(0))) == {7}


def test_arrivals_are_a_poisson_process():
    trace = make_trace(20_000, 5.0, Lengths(3, most=60), Lengths(3), TOKENS, seed=3)
    gaps = np.diff([each.at for each in trace])
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.03) and gaps.std() == pytest.approx(1 / 5, rel=0.03)
    assert (gaps > 0.4).mean() == pytest.approx(math.exp(-2), abs=0.01)


def test_a_seed_fixes_all_but_the_rate():
    slow, fast, all_at_once = (make_trace(50, rate, Lengths(5, most=60), Lengths(9), TOKENS, 1) for rate in (
        1.0, 4.0, math.inf))  # fmt: skip
    other = make_trace(50, 1.0, Lengths(5, most=60), Lengths(9), TOKENS, 2)
    assert [(e.prompt, e.n_new) for e in slow] == [(e.prompt, e.n_new) for e in fast] != [
        (e.prompt, e.n_new) for e in other]  # fmt: skip
    assert [e.at for e in slow] == pytest.approx([4 * e.at for e in fast]) and {e.at for e in all_at_once} == {0.0}
    assert all(e.prompt == list(range(e.prompt[0], e.prompt[0] + len(e.prompt))) for e in slow)  # pieces of the text


@pytest.mark.parametrize("bad", [
    {"n_requests": 0}, {"rate": 0.0}, {"rate": math.nan}, {"prompts": Lengths(100, 0.0)}],
    ids=["nobody", "never", "no number", "longer than the text"])  # fmt: skip
def test_traces_that_cannot_be(bad):
    fine = {"n_requests": 2, "rate": 1.0, "prompts": Lengths(3), "outputs": Lengths(3), "tokens": TOKENS}
    with pytest.raises(ValueError, match=r"must be at least 1|cannot be cut out of 64"):
        make_trace(**fine | bad)


# --- replays ---


def test_what_a_request_experiences(model):
    found, clock = served(model, [Arrival(2.5, [1, 2, 3], 3), Arrival(3.0, [4], 2), Arrival(3.2, [5], 1),
                                  Arrival(20.0, [6], 1)])  # fmt: skip
    a, b, c, d = found.records
    assert a.times == [3.5, 4.5, 5.5] and b.times == [4.5, 5.5] and c.times == [6.5] and d.times == [21.0]
    assert clock.slept == [2.5, 13.5]  # before the first came, and when all had left
    assert (a.first, a.gaps, a.normalized) == (1.0, [1.0, 1.0], 1.0)
    assert c.first == c.normalized == pytest.approx(3.3)  # there were two rows
    summary = found.summary()
    assert (summary.n_requests, summary.n_tokens, summary.n_steps) == (4, 7, 5)
    assert summary.throughput == pytest.approx(7 / 18.5) and summary.occupancy == 7 / 10
    assert summary.first[0] == pytest.approx(1.25) and summary.gap == (1.0, 1.0, 1.0)
    assert summary.normalized[0] == pytest.approx(1.125)


def test_each_gets_its_own_text_of_its_own_length(model):
    trace = make_trace(9, 1.0, Lengths(9, most=40), Lengths(6, most=20), TOKENS, seed=4)
    params = SamplingParams(temperature=1.0, seed=7, stop_ids=None, stop=("..",))
    for options in ({"slots": Slots, "max_tokens": 5}, {"slots": GangSlots}):
        found, _ = served(model, trace, params=params, **options)
        for place, (record, arrival) in enumerate(zip(found.records, trace)):
            own = own_params(trace, place, params)
            text = generate(model, NumberTokenizer(64), arrival.prompt, own)
            assert record.tokens == text.tokens and len(record.times) == arrival.n_new and own.seed == 7 + place


def test_a_replay_can_be_stopped(model):
    batcher = Batcher(model, NumberTokenizer(64), 2)
    answers = iter([False] * 3 + [True] * 9)
    found = replay(batcher, [Arrival(0.0, [1], 30)], stopping=lambda: next(answers))
    assert len(found.records[0].times) == 3 and not batcher.busy
    with pytest.raises(ValueError, match="no request got a token"):
        Replay([Record(0.0)], Timeline(2)).summary()


def test_what_a_batcher_cannot_replay(model):
    batcher = Batcher(model, NumberTokenizer(64), 2)
    with pytest.raises(ValueError, match="has 65 tokens, a row has room for 64"):
        replay(batcher, [Arrival(0.0, [1] * 60, 5)])
    batcher.add([1])
    with pytest.raises(ValueError, match="serves other requests"):
        replay(batcher, [Arrival(0.0, [1], 5)])


# --- timelines ---


def test_the_picture_of_a_replay(model):
    trace = [Arrival(0.0, [1, 2, 3], 3), Arrival(0.0, [4] * 7, 2), Arrival(1.0, [5], 2), Arrival(9.0, [6], 1)]
    found, _ = served(model, trace, max_tokens=6)
    assert found.timeline.text().splitlines() == ["row 0 │AaaCcD", "row 1 │BBb···", "      └0"]
    assert found.timeline.text(width=3).splitlines() == [
        "row 0 │Aaa", "row 1 │BBb", "      └0", "row 0 │CcD", "row 1 │···", "      └3"]  # fmt: skip
    assert found.timeline.text(first=1, last=3).splitlines() == ["row 0 │aa", "row 1 │Bb", "      └1"]
    assert found.timeline.spans() == [
        (0, 0, 1, 0, True), (0, 1, 3, 0, False), (0, 3, 4, 2, True), (0, 4, 5, 2, False), (0, 5, 6, 3, True),
        (1, 0, 2, 1, True), (1, 2, 3, 1, False),
    ]  # fmt: skip
    assert found.timeline.times == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (9, 10)]
    late = [Arrival(0.0, [1], 3), Arrival(0.0, [4], 2), Arrival(0.0, [5], 2)]
    gang, free = (served(model, late, slots=slots)[0].timeline.text().splitlines() for slots in (GangSlots, Slots))
    assert gang == ["row 0 │AaaCc", "row 1 │Bb···", "      └0"] and free == ["row 0 │Aaa·", "row 1 │BbCc", "      └0"]


def test_letters_go_round_and_rows_are_aligned():
    timeline = Timeline(11)
    timeline.shares = [Share(0, 10, 27, 1, False), Share(0, 2, 25, 8, True)]
    timeline.times = [(0, 1)]
    lines = timeline.text().splitlines()
    assert lines[10] == "row 10 │b" and lines[2] == "row  2 │Z" and lines[11] == "       └0"
    assert timeline.occupancy == 2 / 11 and Timeline(3).occupancy == 0 and Timeline(1).text() == ""


def test_the_benchmark_refuses_what_cannot_be_measured():
    for more, said in (
        (["--parts", "luck"], "PARTS=.* must name some of checks"), (["--n_rows", "0"], "N_ROWS=0 must be at least 1"),
        (["--rates", "0"], "RATES=.* must be positive"), (["--bound", "0"], "BOUND=0.0 must be"),
        (["--max_tokens", "2"], "MAX_TOKENS=2 must be at least N_ROWS"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            settings.load(benchmark_config, more)


if __name__ == "__main__":
    for arrival in make_trace(5, 2.0, Lengths(4, most=9), Lengths(5), TOKENS):
        print(f"{arrival.at:5.2f} s: {len(arrival.prompt)} tokens, {arrival.n_new} wanted")
    raise SystemExit(pytest.main([__file__]))
