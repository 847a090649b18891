"""From text to a language model in one command: tokenizer, data, pre-training, evaluation, report.

    uv run python speedrun.py                  about six minutes on two CPU cores
    uv run python speedrun.py --preset h100    125M parameters on one H100
    uv run python speedrun.py --preset quick   under a minute, to see every stage work

A stage is skipped when its output stands and its inputs have not changed; an interrupted training resumes. The model
lands in checkpoints/speedrun/, the report in report/report.md; those of the other presets in folders of their own.
"""

import datetime
import json
import lzma
import os
import sys
from pathlib import Path

import numpy as np

from common import CHECKPOINTS, DATA, ROOT
from common import settings as common_settings
from common.checkpoint import atomic_write
from common.device import device_name, pick_device
from common.plots import curves
from common.progress import clock
from common.run import Run
from common.stages import Stages
from phase1_foundation.project3_pretrain import config as pretrain_config
from phase1_foundation.project3_pretrain import download_data, evaluation, prepare_data, train_pretrain, zero_shot
from phase1_foundation.project3_pretrain.data import TokenDataset
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.running import set_aside
from phase1_foundation.project3_pretrain.token_file import read_header
from phase1_foundation.project3_pretrain.writing import write

# == Speedrun ==
DEVICE = pick_device()  # cuda, mps or cpu
SEED = 1337  # of every stage
PRESET = "cpu"  # cpu (a few million parameters), h100 (125M) or quick (a few steps of a tiny one: does all work?)
TEXT: list[str] = []  # text files (.txt, .jsonl, also compressed); none: the bundled sample, or a download (h100)
VOCAB_SIZE: int | None = None  # tokens of the vocabulary; none: what suits the preset
REPORT_DIR: str | None = None  # report.md with curves and samples; none: report/, report_quick/ ...
OUT_DIR: str | None = None  # tokenizer, checkpoints, metrics; none: checkpoints/speedrun/, speedrun_quick/ ...
DATA_DIR: str | None = None  # tokenised data; none: data/speedrun/, data/speedrun_quick/ ...

_BUNDLED = DATA / "sample_corpus.jsonl.xz"
_PROMPTS = ("The ", "Once upon a time", "ROMEO:\n", "Water is")
_FOLDERS = {"REPORT_DIR": ROOT / "report", "OUT_DIR": CHECKPOINTS / "speedrun", "DATA_DIR": DATA / "speedrun"}
# preset -> flags of train_pretrain.py
_TRAINING = {
    "cpu": ["--model", "cpu-small", "--block_size", "128", "--batch_tokens", "2048", "--max_steps", "500"],
    "h100": ["--model", "llama-125m", "--block_size", "1024", "--batch_tokens", "491520", "--max_steps", "1000"],
    "quick": ["--model", "cpu-tiny", "--block_size", "64", "--batch_tokens", "2048", "--max_steps", "40",
              "--warmup_steps", "4", "--eval_every", "20", "--eval_tokens", "8192"],
}  # fmt: skip


def validate_config(settings=None):
    """Refuse what cannot work."""
    s = settings or sys.modules[__name__]
    if s.PRESET not in _TRAINING:
        raise ValueError(f"PRESET={s.PRESET} is unknown: use one of {', '.join(_TRAINING)}")
    if s.PRESET == "h100" and s.DEVICE != "cuda":
        raise ValueError(f"PRESET=h100 needs a GPU, and DEVICE={s.DEVICE}: use --preset cpu")
    if s.VOCAB_SIZE is not None and s.VOCAB_SIZE < 257:
        raise ValueError(f"VOCAB_SIZE={s.VOCAB_SIZE} must be at least 257: one token a byte, and <|endoftext|>")
    for text in s.TEXT:
        if not Path(text).is_file():
            raise ValueError(f"TEXT={text} is no file: give text files, or leave it out for the bundled sample")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])


def main(argv=None):
    """Run all stages."""
    with Run(sys.modules[__name__], argv, description=__doc__) as run:
        for name, folder in _FOLDERS.items():
            if getattr(run.settings, name) is None:
                other = "" if run.settings.PRESET == "cpu" else f"_{run.settings.PRESET}"
                setattr(run.settings, name, f"{folder}{other}")
        speedrun(run.settings)


def speedrun(s):
    """The way from text to a report, stage by stage."""
    out = Path(s.OUT_DIR)
    tokenizer, train, val = out / "tokenizer.pkl", Path(s.DATA_DIR) / "train.bin", Path(s.DATA_DIR) / "val.bin"
    best, scores = out / "best.pt", out / "scores.json"
    flags = _TRAINING[s.PRESET]
    stages = Stages(out / "stages.json")
    texts = find_texts(s, stages)
    stages.run("tokenizer and data", lambda fresh: prepare(texts, tokenizer, s), files=texts,
               settings=vocab_size(s), outputs=[tokenizer, train, val])  # fmt: skip
    stages.run("pre-training", lambda fresh: pretrain(flags, tokenizer, s, fresh), files=[train, val],
               settings=[flags, s.SEED], outputs=[best])  # fmt: skip
    stages.run("evaluation", lambda fresh: evaluate(best, train, val, s, scores), files=[best, train, val],
               outputs=[scores])  # fmt: skip
    write_report(s, stages, texts, json.loads(scores.read_text(encoding="utf-8")))


def find_texts(s, stages):
    """The text to learn from: what TEXT names, a download for the large preset, else the bundled sample."""
    if s.TEXT or s.PRESET != "h100":
        return [Path(text) for text in s.TEXT] or [_BUNDLED]
    path = Path(pretrain_config.TRAIN_DATA_PATH)
    stages.run("text", lambda fresh: download_data.main(["--size", "large"]), outputs=[path])
    return [path]


def vocab_size(s):
    """Tokens of the vocabulary: more for a larger model and more text."""
    return s.VOCAB_SIZE or (32768 if s.PRESET == "h100" else 4096)


def prepare(texts, tokenizer, s):
    """Learn a vocabulary (project 2) and turn the texts into memory maps, some documents held out (project 3)."""
    tokenizer.unlink(missing_ok=True)  # the text or the size of the vocabulary has changed
    prepare_data.main(["--train_data_path", ",".join(map(str, texts)), "--data_dir", s.DATA_DIR,
                       "--tokenizer", str(tokenizer), "--vocab_size", str(vocab_size(s))])  # fmt: skip


def pretrain(flags, tokenizer, s, fresh):
    """Train the model (project 3); an interrupted run of the same settings continues."""
    if fresh:  # at once: interrupted before its first save, the new run must find nothing of the old one
        set_aside(s.OUT_DIR)
    places = ["--tokenizer", str(tokenizer), "--data_dir", s.DATA_DIR, "--out_dir", s.OUT_DIR]
    train_pretrain.main([*flags, *places, "--seed", str(s.SEED), "--device", s.DEVICE])


def evaluate(best, train, val, s, path):
    """Score the best model on the held-out documents, beside xz on the same bytes, and let it write (project 3)."""
    model, tokenizer = load(best, device=s.DEVICE)
    held_out = TokenDataset(val, model.config.block_size, tokenizer.fingerprint)
    print("predicting the held-out documents ...", flush=True)
    total = evaluation.score(model, held_out)
    text, seen = (plain_text(path, tokenizer) for path in (val, train))
    print(f"compressing them with xz, {len(seen) / 1e6:.1f} MB of training text before them ...", flush=True)
    xz, xz_seen, xz_both = (len(lzma.compress(part, preset=9)) for part in (text, seen, seen + text))
    print("judging pairs of sentences (BLiMP), writing samples ...", flush=True)
    blimp = zero_shot.blimp(model, tokenizer, DATA / "eval" / "blimp_sample.jsonl")
    scores = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_bytes": len(text),
        "bits_per_byte": total.bits_per_byte,
        "loss": total.loss,
        "perplexity": total.perplexity,
        "xz": 8 * xz / len(text),
        "xz_primed": 8 * (xz_both - xz_seen) / len(text),
        "blimp": blimp.accuracy,
        "samples": {prompt: write(model, tokenizer, prompt, 80, seed=s.SEED) for prompt in _PROMPTS},
    }
    atomic_write(path, json.dumps(scores, indent=1, ensure_ascii=False) + "\n")
    print(f"held-out text: {scores['bits_per_byte']:.3f} bits a byte; xz -9: {scores['xz']:.3f}")


def plain_text(path, tokenizer):
    """The bytes of all documents in a token file."""
    tokens = np.fromfile(path, dtype=read_header(path)["dtype"])
    return tokenizer.decode_bytes(tokens[tokens != tokenizer.eot_id].tolist())


def write_report(s, stages, texts, scores):
    """Write report/report.md with the curves beside it."""
    folder, metrics = Path(s.REPORT_DIR), read_metrics(Path(s.OUT_DIR) / "metrics.jsonl")
    series = {
        name: tuple(zip(*[(entry["step"], entry[key]) for entry in metrics if key in entry]))
        for name, key in (("training", "train_loss"), ("validation", "val_loss"))
    }
    curves(folder / "curves.png", series, "step", "loss (nats a token)", "Pre-training")
    tokens = sum(entry.get("tokens", 0) for entry in metrics)
    steps = max((entry["step"] for entry in metrics), default=0)
    lines = [
        "# What the speedrun made",
        "",
        f"A model of {scores['parameters'] / 1e6:.1f}M parameters that read {tokens / 1e6:.1f}M tokens of "
        f"{', '.join(text.name for text in texts)} in {steps:,} steps.",
        "",
        f"Preset `{s.PRESET}`, a vocabulary of {vocab_size(s):,}, {device_name(s.DEVICE)}, "
        f"{datetime.date.today().isoformat()}.",
        "",
        "| stage | time |",
        "| --- | --- |",
        *(f"| {name} | {clock(seconds)} |" for name, seconds in stages.times()),
        "",
        *quality(scores),
        "![curves](curves.png)",
        "",
        "## What it writes",
        "",
        "The beginning in bold was given.",
        "",
        *(f"> {quoted(prompt, text)}\n" for prompt, text in scores["samples"].items()),
        "## What to do with it",
        "",
        "```",
        "uv run python phase1_foundation/project3_pretrain/score.py --checkpoint "
        f"{os.path.relpath(Path(s.OUT_DIR) / 'best.pt', ROOT)}",
        "```",
        "",
    ]
    atomic_write(folder / "report.md", "\n".join(lines))
    print(f"\nThe report is in {folder / 'report.md'}, the model in {Path(s.OUT_DIR) / 'best.pt'}.")


def quality(scores):
    """The lines of the report that say how good the model is."""
    verdict = "fewer" if scores["bits_per_byte"] < scores["xz"] else "more"
    return [
        "## How good it is",
        "",
        f"On {scores['held_out_bytes'] / 1e3:,.0f} kB of documents that it has not read:",
        "",
        "| measure | value |",
        "| --- | --- |",
        f"| model, bits a byte | **{scores['bits_per_byte']:.3f}** |",
        f"| `xz -9` on the same bytes | {scores['xz']:.3f} |",
        f"| `xz -9` that has read the training text first | {scores['xz_primed']:.3f} |",
        f"| loss, nats a token | {scores['loss']:.3f} |",
        f"| perplexity | {scores['perplexity']:.1f} |",
        f"| BLiMP sample, accuracy (chance 50%, and 340 pairs leave 3% either way) | {scores['blimp']:.1%} |",
        "",
        f"The model needs {verdict} bits a byte than `xz -9`. The size of its weights is not counted; xz starts with "
        "nothing, which is why the third line lets it read the training text first.",
        "",
    ]


def quoted(prompt, text):
    """A sample as one Markdown quotation, its prompt in bold."""
    begun, written = prompt.strip(), text[len(prompt) :].strip()
    return " ".join(f"**{begun}** {written}".replace("<", "&lt;").split())


if __name__ == "__main__":
    main()
