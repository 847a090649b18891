"""Checkpoints: whole or not at all, and nothing foreign is ever run."""

import contextlib
import os
import pickle
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from common import ROOT, checkpoint


def example(step=1):
    generator = torch.Generator().manual_seed(step)
    model = {"weight": torch.randn(40, 25, generator=generator), "half": torch.ones(3, dtype=torch.bfloat16)}
    return {
        "iter": step,
        "model_state_dict": model,
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]},
        "train_loss": 2.5,
        "val_loss": 2.75,
        "config": {"kind": "minimal_gpt", "model": {"n_embd": 25}},
        "tokenizer": {"kind": "char", "chars": "ab\n\0é"},
        "rng_state": generator.get_state(),
    }


def assert_same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif torch.is_tensor(a):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "new" / "folder" / "model.pt"
    checkpoint.save(path, example())
    assert_same(checkpoint.load(path), example())
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("key", checkpoint.REQUIRED)
def test_a_missing_key_is_named_and_nothing_is_written(tmp_path, key):
    incomplete = example()
    del incomplete[key]
    with pytest.raises(ValueError, match=f"missing: {key}"):
        checkpoint.save(tmp_path / "model.pt", incomplete)
    assert list(tmp_path.iterdir()) == []


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint at .*none\.pt: train one first"):
        checkpoint.load(tmp_path / "none.pt")


def test_truncated_at_any_place(tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, example())
    whole = path.read_bytes()
    size, draw = len(whole), random.Random(0)
    places = {0, 1, 2, 3, 4, 29, 30, 63, 64, 65, size // 2, size - 1, size - 2, size - 21, size - 22, size - 23}
    places |= {draw.randrange(size) for _ in range(150)}
    for place in sorted(places):
        path.write_bytes(whole[:place])
        with pytest.raises(checkpoint.CheckpointError, match=r"model\.pt is damaged"):
            checkpoint.load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_pickle_never_shows_another_error(tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, example())
    whole, draw, refused = path.read_bytes(), random.Random(1), 0
    start = whole.index(b"iter") - 40  # the pickled structure stands in front of the tensors
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.randrange(1, 5)):
            damaged[start + draw.randrange(600)] = draw.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(checkpoint.CheckpointError):  # and no other error
            checkpoint.load(path)  # a changed letter in a text cannot be noticed
            refused -= 1
        refused += 1
    assert refused > 100


class Hostile:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (Path(self.trace),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_hostile_file_runs_nothing(tmp_path, write):
    trace, path = tmp_path / "trace", tmp_path / "model.pt"
    write({**example(), "config": Hostile(trace)}, path)
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.pt"):
        checkpoint.load(path)
    assert not trace.exists()
    with open(path, "rb") as file:  # the same file does its work on a reader that trusts it
        torch.load(file, weights_only=False) if write is torch.save else pickle.load(file)
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"{}", b"PK\x03\x04" + b"\0" * 100, os.urandom(5000)])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=r"other\.pt"):
        checkpoint.load(path)


@pytest.mark.parametrize("value", [[1, 2], {"model": 1}, torch.ones(2)])
def test_a_torch_file_that_is_no_checkpoint(tmp_path, value):
    torch.save(value, tmp_path / "weights.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"weights\.pt is a PyTorch file but no checkpoint"):
        checkpoint.load(tmp_path / "weights.pt")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_not_called_damaged(tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, example())
    path.chmod(0)
    with pytest.raises(PermissionError):
        checkpoint.load(path)


def fail(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", ["os.fsync", "os.replace", "torch.save"])
def test_a_failure_leaves_the_older_checkpoint(tmp_path, monkeypatch, broken):
    path = tmp_path / "model.pt"
    checkpoint.save(path, example(1))
    with monkeypatch.context() as patch:
        patch.setattr(broken, fail)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(path, example(2))
    assert checkpoint.load(path)["iter"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_the_data_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(os, "fsync", lambda number, sync=os.fsync: (steps.append("fsync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b, move=os.replace: (steps.append("replace"), move(a, b)))
    checkpoint.save(tmp_path / "model.pt", example())
    assert steps == ["fsync", "replace"]


@pytest.fixture
def full_disk():
    """Let no file grow beyond 100,000 bytes for the length of a with block."""
    resource = pytest.importorskip("resource", reason="RLIMIT_FSIZE is POSIX")

    @contextlib.contextmanager
    def limit():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


def test_a_full_disk_is_reported_and_nothing_is_lost(tmp_path, full_disk):
    path = tmp_path / "model.pt"
    checkpoint.save(path, example())
    large = {**example(2), "model_state_dict": {"weight": torch.randn(500_000)}}
    with pytest.raises(OSError, match="is the disk full") as caught, full_disk():
        checkpoint.save(path, large)
    assert f"could not write the checkpoint {path}" in str(caught.value)
    assert_same(checkpoint.load(path), example())
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


KILLED = """
import sys, torch
from common import checkpoint
state = torch.load(sys.argv[1], weights_only=True)
state["model_state_dict"]["weight"] = torch.zeros(200_000)
print("ready", flush=True)
for step in range(2, 100_000):
    checkpoint.save(sys.argv[1], {**state, "iter": step})
"""


def test_killed_while_it_writes(tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, example())
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline().strip() == b"ready"
    deadline = time.time() + 30
    while checkpoint.load(path)["iter"] < 5 and time.time() < deadline:
        pass  # a reader never sees half a file, either
    process.kill()
    process.communicate()
    assert checkpoint.load(path)["iter"] >= 5
    checkpoint.save(path, example(1))
    assert checkpoint.load(path)["iter"] == 1


def test_what_a_killed_process_left_is_cleaned_up_later(tmp_path):
    for name, age in ((".model.pt.1.tmp", 7200), (".model.pt.2.tmp", 10), (".other.pt.3.tmp", 7200)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    checkpoint.save(tmp_path / "model.pt", example())
    assert {p.name for p in tmp_path.iterdir()} == {"model.pt", ".model.pt.2.tmp", ".other.pt.3.tmp"}


def test_atomic_write_takes_bytes_and_text(tmp_path):
    path = tmp_path / "a" / "page.md"
    checkpoint.atomic_write(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    checkpoint.atomic_write(path, b"\0")
    assert path.read_bytes() == b"\0"


def test_an_error_inside_atomic_path_leaves_nothing(tmp_path):
    def write():
        with checkpoint.atomic_path(tmp_path / "x") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        write()
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        checkpoint.save(file, example())
        print(f"saved and loaded: {sorted(checkpoint.load(file))}")
        file.write_bytes(file.read_bytes()[:-100])
        try:
            checkpoint.load(file)
        except checkpoint.CheckpointError as error:
            print(textwrap.fill(f"truncated: {error}", 100))
    raise SystemExit(pytest.main([__file__]))
