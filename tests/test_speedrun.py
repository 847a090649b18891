"""The main job from end to end, on a small text: every stage, what is skipped, what an interruption leaves."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import speedrun
from common import ROOT
from common.checkpoint import load as load_checkpoint


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speedrun")
    rng = random.Random(0)
    syllables = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "her", "dog"]
    words = syllables + [a + b for a in syllables for b in syllables]
    lines = (" ".join(rng.choices(words, k=60)) + "." for _ in range(300))
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return ["--preset", "quick", "--text", f"{folder}/text.txt", "--vocab_size", "320", "--out_dir", f"{folder}/out",
            "--data_dir", f"{folder}/tokens", "--report_dir", f"{folder}/report", "--device", "cpu"]  # fmt: skip


def _start(flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "speedrun.py", *flags], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def _run(flags):
    with _start(flags) as process:
        out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err[-2000:]
    return out


def _folder(flags, name):
    return flags[flags.index(name) + 1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for one process")
def test_an_interrupted_speedrun_continues_and_a_finished_one_does_nothing(flags):
    out, report = _folder(flags, "--out_dir"), _folder(flags, "--report_dir")
    with _start(flags) as process:
        for line in process.stdout:
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        rest, _ = process.communicate(timeout=280)
    assert process.returncode == 130, rest[-1000:]
    stopped_at = load_checkpoint(f"{out}/last.pt")["iter"]
    assert 1 <= stopped_at < 40

    second = _run(flags)
    assert "== tokenizer and data: up to date" in second
    assert f"after step {stopped_at}" in second
    scores = json.loads(Path(out, "scores.json").read_text(encoding="utf-8"))
    assert 0 < scores["bits_per_byte"] < 8 and 0 < scores["xz"] < 8 and scores["held_out_bytes"] > 0
    page = Path(report, "report.md").read_text(encoding="utf-8")
    assert f"{scores['bits_per_byte']:.3f}" in page and "curves.png" in page

    start = time.perf_counter()
    third = _run(flags)
    assert third.count(": up to date") == 3
    assert time.perf_counter() - start < 120


def test_presets_have_folders_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(speedrun, "speedrun", lambda s: seen.append([s.OUT_DIR, s.DATA_DIR, s.REPORT_DIR]))
    speedrun.main([])
    speedrun.main(["--preset", "quick"])
    speedrun.main(["--preset", "quick", "--out_dir", "mine"])
    assert len({Path(folder) for folders in seen for folder in folders}) == 7  # the third run changes one folder
    assert Path(seen[0][0]).name == "speedrun" and Path(seen[1][0]).name == "speedrun_quick" and seen[2][0] == "mine"
    with pytest.raises(SystemExit):
        speedrun.main(["--text", "nowhere.txt"])


def test_a_stage_with_other_settings_leaves_nothing_of_the_old_one(tmp_path, monkeypatch):
    s = SimpleNamespace(OUT_DIR=str(tmp_path), DATA_DIR=str(tmp_path), SEED=1, DEVICE="cpu")
    for name in ("last.pt", "previous.pt", "best.pt", "metrics.jsonl", "tokenizer.pkl"):
        (tmp_path / name).write_text("old", encoding="utf-8")

    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(speedrun.train_pretrain, "main", interrupted)
    for fresh, left in ((False, 5), (True, 1)):  # the same settings continue; others begin anew, whenever interrupted
        with pytest.raises(KeyboardInterrupt):
            speedrun.pretrain([], tmp_path / "tokenizer.pkl", s, fresh)
        assert len([path for path in tmp_path.iterdir() if path.suffix != ".old"]) == left
    assert len(list(tmp_path.glob("*.old"))) == 4


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
