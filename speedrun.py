"""From text to a language model in one command: tokenizer, data, pre-training, evaluation, report.

    uv run python speedrun.py                  about ten minutes on two CPU cores
    uv run python speedrun.py --preset h100    125M parameters on one H100
    uv run python speedrun.py --quick          under a minute, to see every stage work

A stage is skipped when its output stands and its inputs have not changed; an interrupted training resumes. The model
lands in checkpoints/speedrun/, the report in report/report.md.
"""

import json
import lzma
import sys
from pathlib import Path

from common import CHECKPOINTS, DATA, ROOT
from common import settings as common_settings
from common.checkpoint import atomic_write
from common.device import pick_device
from common.download import read_documents
from common.plots import curves
from common.progress import clock
from common.run import Run
from common.stages import Stages

# == Speedrun ==
DEVICE = pick_device()  # cuda, mps or cpu
SEED = 1337  # of every stage
PRESET = "cpu"  # cpu (a few million parameters) or h100 (125M parameters)
QUICK = False  # a few steps of a tiny model: does everything work?
TEXT: list[str] = []  # text files (.txt, .jsonl, also .gz, .xz, .zst); none: the bundled texts
VOCAB_SIZE = 4096  # tokens of the vocabulary
REPORT_DIR = str(ROOT / "report")  # report.md with curves and samples
OUT_DIR = str(CHECKPOINTS / "speedrun")  # tokenizer, checkpoints, metrics
DATA_DIR = str(DATA / "speedrun")  # tokenised data

BUNDLED = (DATA / "sample_corpus.jsonl.xz", DATA / "shakespeare.txt")
PROMPTS = ("The ", "Once upon a time", "ROMEO:\n", "Water is")
# preset -> flags of train_pretrain.py
TRAINING = {
    "cpu": ["--model", "cpu-small", "--block_size", "128", "--batch_tokens", "4096", "--max_steps", "500"],
    "h100": ["--model", "llama-125m", "--block_size", "1024", "--batch_tokens", "491520", "--max_steps", "1000"],
    "quick": ["--model", "cpu-tiny", "--block_size", "64", "--batch_tokens", "2048", "--max_steps", "40",
              "--warmup_steps", "4", "--eval_every", "20", "--eval_tokens", "8192"],
}  # fmt: skip


def validate_config(settings=None):
    """Refuse what cannot work."""
    s = settings or sys.modules[__name__]
    if s.PRESET not in TRAINING:
        raise ValueError(f"PRESET={s.PRESET} is unknown: use one of {', '.join(TRAINING)}")
    if s.PRESET == "h100" and s.DEVICE != "cuda":
        raise ValueError(f"PRESET=h100 needs a GPU, and DEVICE={s.DEVICE}: use --preset cpu")
    if s.VOCAB_SIZE < 257:
        raise ValueError(f"VOCAB_SIZE={s.VOCAB_SIZE} must be at least 257: one token a byte, and <|endoftext|>")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])


def main(argv=None):
    """Run all stages."""
    with Run(sys.modules[__name__], argv, description=__doc__) as run:
        speedrun(run.settings)


def speedrun(s):
    """The way from text to a report, stage by stage."""
    out, texts = Path(s.OUT_DIR), [Path(text) for text in s.TEXT] or list(BUNDLED)
    tokenizer, train, val = out / "tokenizer.pkl", Path(s.DATA_DIR) / "train.bin", Path(s.DATA_DIR) / "val.bin"
    best, scores = out / "best.pt", out / "scores.json"
    flags = TRAINING["quick" if s.QUICK else s.PRESET]
    stages = Stages(out / "stages.json")
    stages.run("tokenizer", lambda fresh: train_tokenizer(texts, s.VOCAB_SIZE, tokenizer),
               files=texts, settings=s.VOCAB_SIZE, outputs=[tokenizer])  # fmt: skip
    stages.run("data", lambda fresh: tokenise(texts, tokenizer, s), files=[*texts, tokenizer], outputs=[train, val])
    stages.run("pre-training", lambda fresh: pretrain(flags, tokenizer, s, fresh), files=[train, val],
               settings=[flags, s.SEED], outputs=[best])  # fmt: skip
    stages.run("evaluation", lambda fresh: evaluate(texts, best, val, s, scores), files=[best, val], outputs=[scores])
    write_report(s, stages, texts, json.loads(scores.read_text(encoding="utf-8")))


def train_tokenizer(texts, vocab_size, path):
    """Learn a BPE vocabulary from the texts (project 2)."""
    from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer

    documents = (document for text in texts for document in read_documents(text))
    tokenizer = BPETokenizer.train(documents, vocab_size, ["<|endoftext|>"], rule="merges")
    tokenizer.save(path)
    print(f"learned {tokenizer.vocab_size} tokens: {path}")


def tokenise(texts, tokenizer, s):
    """Turn the texts into memory maps, a part of the documents held out (project 3)."""
    from phase1_foundation.project3_pretrain import prepare_data

    prepare_data.main(["--train_data_path", *map(str, texts), "--data_dir", s.DATA_DIR, "--tokenizer", str(tokenizer)])


def pretrain(flags, tokenizer, s, fresh):
    """Train the model (project 3); an interrupted run of the same settings continues."""
    from phase1_foundation.project3_pretrain import train_pretrain

    train_pretrain.main([*flags, "--tokenizer", str(tokenizer), "--data_dir", s.DATA_DIR, "--out_dir", s.OUT_DIR,
                         "--seed", str(s.SEED), "--device", s.DEVICE, "--resume" if not fresh else "--no_resume"])  # fmt: skip
