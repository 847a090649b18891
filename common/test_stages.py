"""Tests of the pipeline: what is skipped, what runs again, and what a crash leaves."""

import json

import pytest

from common import stages


def _run(tmp_path, calls, settings=1, fail=False):
    pipeline = stages.Stages(tmp_path / "stages.json", echo=lambda *a: None)

    def action(fresh):
        calls.append(fresh)
        if fail:
            raise OSError("disk full")
        (tmp_path / "out").write_text("x")

    return pipeline.run("copy", action, files=[tmp_path / "in"], settings=settings, outputs=[tmp_path / "out"])


def test_a_stage_runs_once_and_again_when_something_changed(tmp_path):
    calls = []
    (tmp_path / "in").write_text("a")
    assert _run(tmp_path, calls)
    assert not _run(tmp_path, calls)
    (tmp_path / "in").write_text("b")
    assert _run(tmp_path, calls)
    assert _run(tmp_path, calls, settings=2)
    (tmp_path / "out").unlink()
    assert _run(tmp_path, calls, settings=2)
    assert calls == [True, True, True, False]  # only the last one may build on what was left


def test_a_stage_that_failed_runs_again_and_may_continue(tmp_path):
    calls = []
    (tmp_path / "in").write_text("a")
    (tmp_path / "out").write_text("half")
    with pytest.raises(OSError, match="disk full"):
        _run(tmp_path, calls, fail=True)
    assert _run(tmp_path, calls)
    assert calls == [True, False]


def test_the_time_of_interrupted_attempts_counts(tmp_path, monkeypatch):
    now = iter([0, 5, 100, 103, 200, 201])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(now))
    (tmp_path / "in").write_text("a")
    with pytest.raises(OSError, match="disk full"):
        _run(tmp_path, [], fail=True)
    _run(tmp_path, [])
    assert _seconds(tmp_path) == 8
    _run(tmp_path, [], settings=2)  # something else: what was spent before is not its time
    assert _seconds(tmp_path) == 1


def _seconds(tmp_path):
    return json.loads((tmp_path / "stages.json").read_text(encoding="utf-8"))["copy"]["seconds"]


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
