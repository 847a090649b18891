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
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain.token_file import write_tokens


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
    stopped_at = load_checkpoint(f"{out}/pretrain/last.pt")["iter"]
    assert 1 <= stopped_at < 40

    second = _run(flags)
    assert "== tokenizer and data: up to date" in second
    assert f"after step {stopped_at}" in second
    scores = json.loads(Path(out, "scores.json").read_text(encoding="utf-8"))
    assert 0 < scores["bits_per_byte"] < 8 and 0 < scores["xz"] < 8 and scores["held_out_bytes"] > 0
    page = Path(report, "report.md").read_text(encoding="utf-8")
    assert f"{scores['bits_per_byte']:.3f}" in page
    assert all(Path(report, name).is_file() and name in page for name in ("stages.png", "pretrain.png", "sft.png"))
    assert all(f"| {name} |" in page for name in speedrun._STAGES.values()) and "What is a noun?" in page

    start = time.perf_counter()
    third = _run(flags)
    assert third.count(": up to date") == 5
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
    with pytest.raises(SystemExit):
        speedrun.main(["--conversations", "nowhere.jsonl"])


def test_a_stage_with_other_settings_leaves_nothing_of_the_old_one(tmp_path, monkeypatch):
    s = SimpleNamespace(OUT_DIR=str(tmp_path), SEED=1, DEVICE="cpu", PRESET="quick", PRETRAIN_STEPS=7)
    folder = tmp_path / "pretrain"
    folder.mkdir()
    for name in ("last.pt", "previous.pt", "best.pt", "metrics.jsonl", "notes.txt"):
        (folder / name).write_text("old", encoding="utf-8")

    def interrupted(argv):
        assert "7" in argv and str(folder) in argv
        raise KeyboardInterrupt

    script = SimpleNamespace(main=interrupted)
    for fresh, left in ((False, 5), (True, 1)):  # the same settings continue; others begin anew, whenever interrupted
        with pytest.raises(KeyboardInterrupt):
            speedrun.train_stage(script, "pretrain", [], s, fresh)
        assert len([path for path in folder.iterdir() if path.suffix != ".old"]) == left
    assert len(list(folder.glob("*.old"))) == 4


def test_the_end_of_a_token_files_text(tmp_path):
    tokenizer = BPETokenizer.train(["to be or not to be"], 262, ["<|endoftext|>"])
    path = tmp_path / "text.bin"
    write_tokens(path, ["to be", "or not"], tokenizer)
    assert speedrun.plain_text(path, tokenizer) == b"to beor not"
    for most, text in {0: b"", 1: b"t", 7: b"eor not", 99: b"to beor not"}.items():
        assert speedrun.plain_text(path, tokenizer, most) == text


def test_the_chat_at_the_end_needs_a_terminal(monkeypatch):
    talked = []
    monkeypatch.setattr(speedrun, "speedrun", lambda s: None)
    monkeypatch.setattr(speedrun.chat, "main", talked.append)
    speedrun.main(["--preset", "quick"])
    assert not talked
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    speedrun.main(["--preset", "quick", "--no_chat"])
    assert not talked
    speedrun.main(["--preset", "quick"])
    assert Path(talked[0][talked[0].index("--checkpoint") + 1]).parts[-2:] == ("dpo", "best.pt")


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__]))
