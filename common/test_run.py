"""The frame of a script: settings, seeds, devices, metrics, interruption, and errors in one line."""

import json
import os
import random
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import ROOT
from common.run import Run, interruptible
from common.test_settings import make_config

CONFIG = '''"""A config."""
# == Training ==
STEPS = 3  # how many
RATE = 0.1  # how fast
# == System ==
SEED: int | None = 7  # of all randomness
DEVICE = "cpu"  # where


def validate_config(settings):
    """Refuse what cannot work."""
    if settings.STEPS < 1:
        raise ValueError(f"STEPS={settings.STEPS} must be at least 1: use 1 or more")
'''


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.delenv("LLM_ROADMAP_TRACEBACK", raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return make_config(tmp_path, CONFIG)


def test_settings_device_and_configuration(config, capsys):
    with Run(config, ["--steps", "5"]) as run:
        assert run.settings.STEPS == 5
        assert run.device == torch.device("cpu")
        assert (run.rank, run.world_size, run.is_main, run.stopping) == (0, 1, True, False)
        run.print("hello", end="!\n")
    printed = capsys.readouterr().out
    assert "* STEPS" in printed
    assert "CPU" in printed
    assert printed.endswith("hello!\n")


def test_peak_memory_is_that_of_the_run_alone(config, monkeypatch):
    forgotten = []
    monkeypatch.setattr("common.run.reset_peak_memory", forgotten.append)
    with Run(config, [], quiet=True) as run:
        assert forgotten == [run.device]


def test_a_missing_library_is_one_line_and_a_missing_part_of_ours_a_traceback(config, capsys):
    with pytest.raises(SystemExit) as exit_, Run(config, [], quiet=True):
        import a_library_that_nobody_has  # noqa: F401
    assert exit_.value.code == 2
    assert "error: this needs a_library_that_nobody_has" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError), Run(config, [], quiet=True):
        import common.no_such_file  # noqa: F401


def test_quiet_prints_nothing(config, capsys):
    with Run(config, [], quiet=True):
        pass
    assert capsys.readouterr().out == ""


def test_only_the_sections_of_the_script_are_flags(config, capsys):
    with pytest.raises(SystemExit) as exit_, Run(config, ["--steps", "5"], sections=("System",)):
        pass
    assert exit_.value.code == 2
    with Run(config, ["--seed", "5"], sections=("System",)) as run:
        assert run.settings.STEPS == 3


def drawn(config, argv):
    with Run(config, argv, quiet=True):
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002


def test_the_seed_decides_all_draws(config):
    assert drawn(config, []) == drawn(config, ["--seed", "7"])
    assert all(a != b for a, b in zip(drawn(config, []), drawn(config, ["--seed", "8"])))
    assert all(a != b for a, b in zip(drawn(config, ["--seed", "none"]), drawn(config, ["--seed", "none"])))


def run_and_raise(config, error, argv=()):
    with Run(config, list(argv), quiet=True):
        raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("STEPS=0: use 1"), "error: STEPS=0: use 1"),
        (FileNotFoundError("there is no data at x"), "error: there is no data at x"),
        (OSError(28, "No space left on device"), "error: [Errno 28] No space left on device"),
        (ValueError("two\nlines"), "error: two lines"),
        (ValueError(), "error: ValueError"),
    ],
)
def test_errors_of_the_user_are_one_line_and_status_2(config, capsys, error, line):
    with pytest.raises(SystemExit) as exit_:
        run_and_raise(config, error)
    assert exit_.value.code == 2
    shown = capsys.readouterr()
    assert shown.err == line + "\n"
    assert shown.out == ""


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--steps", "0"], "error: STEPS=0 must be at least 1: use 1 or more"),
        (["--device", "gpu"], "error: DEVICE='gpu' cannot be used here: use "),
    ],
)
def test_errors_at_the_start_are_one_line_too(config, capsys, argv, line):
    with pytest.raises(SystemExit) as exit_, Run(config, argv):
        raise AssertionError("the block must not begin")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(line)


def test_errors_of_ours_keep_their_traceback(config, monkeypatch):
    with pytest.raises(KeyError):
        run_and_raise(config, KeyError("a bug"))
    monkeypatch.setenv("LLM_ROADMAP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="the user's"):
        run_and_raise(config, ValueError("the user's"))


def test_metrics_are_appended_line_by_line(config, tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    for start in (0, 2):  # the second run resumes
        with Run(config, [], quiet=True) as run:
            run.log(step=-1)  # nowhere yet
            run.metrics(path)
            for step in (start, start + 1):
                run.log(step=step, loss=1 / (step + 1))
                assert json.loads(path.read_text().splitlines()[-1])["step"] == step  # flushed at once
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_the_first_interrupt_asks_and_the_second_stops(config, capfd):
    before = signal.getsignal(signal.SIGINT)

    def loop():
        with Run(config, [], quiet=True) as run:
            while not run.stopping:
                signal.raise_signal(signal.SIGINT)
            run.print("saved")
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit) as exit_:
        loop()
    assert exit_.value.code == 130
    shown = capfd.readouterr()
    assert "saved" in shown.out
    assert shown.err.count("Stopping after this step") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_where_nothing_would_be_kept_the_first_interrupt_stops(config):
    with pytest.raises(SystemExit) as exit_, Run(config, [], quiet=True) as run, interruptible():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")
    assert exit_.value.code == 130
    assert not run.stopping


def test_other_ranks_stay_silent(config, capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped, Run(config, []) as run:  # noqa: PT012 - it is raised on leaving
        assert not run.is_main
        run.print("hello")
        run.metrics(tmp_path / "metrics.jsonl")
        run.log(step=1)
        signal.raise_signal(signal.SIGINT)
        assert run.stopping
    assert stopped.value.code == 130  # whoever started the script must not take it for finished
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.glob("*.jsonl")) == []


SCRIPT = """
import sys, types, torch, torch.distributed as dist
from common.run import Run
config = types.ModuleType("config")
config.__file__, config.DEVICE = sys.argv[1], "cpu"
with Run(config, []) as run:
    total = torch.tensor([run.rank + 1.0])
    dist.all_reduce(total)
    run.print("sum", total.item(), "of", run.world_size)
print("joined" if dist.is_initialized() else "left")
"""


def test_two_processes_join_and_leave_a_group(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "config.py"
    path.write_text('DEVICE = "cpu"  # where\n', encoding="utf-8")
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, "-c", SCRIPT, str(path)]
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE))
    first, second = (process.communicate(timeout=200)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert "sum 3.0 of 2" in first
    assert "CPU" in first
    assert " x 2\n" in first
    assert second == "left\n"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder, Run(make_config(folder, CONFIG), ["--steps", "2"]) as example:
        example.print(f"{example.settings.STEPS} steps on {example.device}")
    raise SystemExit(pytest.main([__file__]))
