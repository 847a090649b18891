"""Progress: readable numbers, one aligned line per report, honest remaining time."""

import re

import pytest

from common import progress


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (5.5, "5.5"), (999, "999"), (1000, "1k"), (1234567, "1.23M"), (999_900, "1M"), (484_000, "484k"),
     (2.5e9, "2.5G"), (-1500, "-1.5k")],
)  # fmt: skip
def test_human(number, text):
    assert progress.human(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (65, "1:05"), (3725.9, "1:02:05"), (-3, "0:00")])
def test_clock(seconds, text):
    assert progress.clock(seconds) == text


class Clock:
    """A clock that a test winds by hand."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    hand = Clock()
    monkeypatch.setattr(progress.time, "perf_counter", hand)
    return hand


def test_reporter_tells_rate_and_remaining_time(clock):
    lines = []
    reporter = progress.Reporter(100, "step", "tok", every_s=1.0, echo=lambda text, **_: lines.append(text))
    for step in range(1, 101):
        clock.now += 0.125
        reporter.report(step, units=50, loss=3.0, lr=1e-3)
    assert len(lines) == 14  # the first, one a second, the last
    assert re.fullmatch(
        r"step  25/100  loss 3\.0000  lr 1\.00e-03    400 tok/s   0:03 elapsed   0:09 left", lines[3]
    ), lines[3]
    assert {line.index("tok/s") for line in lines} == {lines[0].index("tok/s")}  # aligned
    assert lines[-1].startswith("step 100/100")
    assert lines[-1].endswith("0:00 left")


def test_reporter_counts_from_where_a_resumed_run_began(clock):
    lines = []
    reporter = progress.Reporter(100, every_s=1e9, start=90, echo=lambda text, **_: lines.append(text))
    clock.now += 2
    reporter.report(91)
    assert "0:18 left" in lines[0]  # nine steps of two seconds, not of 2/91
    reporter.report(95, force=True)
    assert len(lines) == 2


def test_the_rate_is_that_of_the_last_window(clock):
    lines = []
    reporter = progress.Reporter(10, every_s=0, echo=lambda text, **_: lines.append(text))
    clock.now += 10  # compilation
    reporter.report(1, units=100)
    clock.now += 1
    reporter.report(2, units=5000)
    assert "10 tok/s" in lines[0]
    assert "5k tok/s" in lines[1]


def test_track_yields_everything_and_shows_the_rate(capsys):
    assert list(progress.track(["a", "bb", "ccc"], total=6, label="read", unit="B", size=len)) == ["a", "bb", "ccc"]
    shown = capsys.readouterr()
    assert "read" in shown.err
    assert "100%" in shown.err
    assert "B/s" in shown.err
    assert shown.out == ""


def test_track_without_a_known_length_and_left_early(capsys):
    walked = []
    for item in progress.track(iter(range(100)), label="walk"):
        walked.append(item)
        if item == 3:
            break
    assert walked == [0, 1, 2, 3]


if __name__ == "__main__":
    import time

    example = progress.Reporter(5, every_s=0)
    for done in range(1, 6):
        time.sleep(0.05)
        example.report(done, units=4096, loss=5.0 - done / 2, lr=1e-3)
    raise SystemExit(pytest.main([__file__]))
