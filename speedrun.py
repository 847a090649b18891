"""From text to a model that chats in one command: tokenizer, pre-training, fine-tuning, preferences, report.

    uv run python speedrun.py                  about nine minutes on two CPU cores, then a chat
    uv run python speedrun.py --preset h100    125M parameters on one H100
    uv run python speedrun.py --preset quick   under a minute, to see every stage work

A stage is skipped when its output stands and its inputs have not changed; an interrupted training resumes. The models
land in checkpoints/speedrun/ (pretrain, sft, dpo), the report in report/report.md; those of the other presets in
folders of their own.
"""

import datetime
import json
import lzma
import os
import shutil
import sys
from pathlib import Path

import numpy as np

import chat
from common import CHECKPOINTS, DATA, ROOT
from common import settings as common_settings
from common.checkpoint import atomic_write
from common.device import device_name, pick_device
from common.progress import clock
from common.run import Run, interruptible
from common.stages import Stages
from phase1_foundation.project3_pretrain import config as pretrain_config
from phase1_foundation.project3_pretrain import download_data, evaluation, prepare_data, train_pretrain, zero_shot
from phase1_foundation.project3_pretrain.data import TokenDataset
from phase1_foundation.project3_pretrain.hooks import read_metrics
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.running import set_aside
from phase1_foundation.project3_pretrain.token_file import read_header
from phase1_foundation.project3_pretrain.writing import write
from phase2_finetuning.project4_sft import config as sft_config
from phase2_finetuning.project4_sft import download_data as sft_download_data
from phase2_finetuning.project4_sft import train_sft
from phase2_finetuning.project4_sft.conversations import read_conversations, split
from phase2_finetuning.project6_dpo import stage_report, train_dpo
from phase2_finetuning.project6_dpo.preferences import read_preferences

# == Speedrun ==
DEVICE = pick_device()  # cuda, mps or cpu
SEED = 1337  # of every stage
PRESET = "cpu"  # cpu (a few million parameters), h100 (125M) or quick (a few steps of a tiny one: does all work?)
TEXT: list[str] = []  # text files (.txt, .jsonl, also compressed); none: the bundled sample, or a download (h100)
CONVERSATIONS: str | None = None  # to fine-tune on, JSON Lines; none: the bundled sample, or a download (h100)
PRETRAIN_STEPS: int | None = None  # optimizer steps of pre-training; none: what suits the preset
VOCAB_SIZE: int | None = None  # tokens of the vocabulary; none: what suits the preset
REPORT_DIR: str | None = None  # report.md with curves and samples; none: report/, report_quick/ ...
OUT_DIR: str | None = None  # tokenizer, checkpoints, metrics; none: checkpoints/speedrun/, speedrun_quick/ ...
DATA_DIR: str | None = None  # tokenised data; none: data/speedrun/, data/speedrun_quick/ ...
CHAT = True  # end in a chat with the model, where there is a terminal

_BUNDLED = DATA / "sample_corpus.jsonl.xz"
_BUNDLED_TALK = DATA / "sft_sample.jsonl.xz"
_PREFERENCES = DATA / "polite_train.jsonl.xz", DATA / "polite_test.jsonl.xz"
_XZ_REACH = 64 << 20  # bytes behind which `xz -9` looks for repetitions: text before that would not help it
_BLIMP = DATA / "eval" / "blimp_sample.jsonl"
_PROMPTS = ("The ", "Once upon a time", "ROMEO:\n", "Water is")
_FOLDERS = {"REPORT_DIR": ROOT / "report", "OUT_DIR": CHECKPOINTS / "speedrun", "DATA_DIR": DATA / "speedrun"}
_QUICK = ["--block_size", "64", "--batch_tokens", "2048", "--warmup_steps", "4", "--eval_every", "20",
          "--eval_tokens", "8192", "--sample_tokens", "16"]  # fmt: skip
# preset -> stage -> flags of train_pretrain.py, train_sft.py and train_dpo.py
_TRAINING = {
    "cpu": {
        "pretrain": ["--model", "cpu-small", "--block_size", "128", "--batch_tokens", "2048", "--max_steps", "500"],
        "sft": ["--block_size", "128", "--batch_tokens", "2048", "--max_steps", "150"],
        "dpo": ["--block_size", "128", "--batch_tokens", "2048"],
    },
    "h100": {
        "pretrain": ["--model", "llama-125m", "--block_size", "1024", "--batch_tokens", "491520",
                     "--max_steps", "1000"],
        "sft": ["--block_size", "1024", "--no_compile"],
        "dpo": ["--block_size", "512"],
    },
    "quick": {
        "pretrain": ["--model", "cpu-tiny", *_QUICK, "--max_steps", "40"],
        "sft": [*_QUICK, "--max_steps", "10"],
        "dpo": [*_QUICK, "--max_steps", "5", "--answers", "2"],
    },
}  # fmt: skip
_STAGES = {"pretrain": "pre-trained", "sft": "fine-tuned", "dpo": "preference-tuned"}  # folder -> what its model is


def validate_config(settings=None):
    """Refuse what cannot work."""
    s = settings or sys.modules[__name__]
    if s.PRESET not in _TRAINING:
        raise ValueError(f"PRESET={s.PRESET} is unknown: use one of {', '.join(_TRAINING)}")
    if s.PRESET == "h100" and s.DEVICE != "cuda":
        raise ValueError(f"PRESET=h100 needs a GPU, and DEVICE={s.DEVICE}: use --preset cpu")
    if s.VOCAB_SIZE is not None and s.VOCAB_SIZE < 257:
        raise ValueError(f"VOCAB_SIZE={s.VOCAB_SIZE} must be at least 257: one token a byte, and <|endoftext|>")
    if s.PRETRAIN_STEPS is not None and s.PRETRAIN_STEPS < 1:
        raise ValueError(f"PRETRAIN_STEPS={s.PRETRAIN_STEPS} must be at least 1, or left out")
    for name, path in [*(("TEXT", text) for text in s.TEXT), ("CONVERSATIONS", s.CONVERSATIONS)]:
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{name}={path} is no file: give one, or leave it out for the bundled sample")


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
        if run.settings.CHAT and sys.stdin.isatty() and sys.stdout.isatty():
            talk(run.settings)


def speedrun(s):
    """The way from text to a report, stage by stage."""
    out = Path(s.OUT_DIR)
    tokenizer, train, val = out / "tokenizer.pkl", Path(s.DATA_DIR) / "train.bin", Path(s.DATA_DIR) / "val.bin"
    models = {stage: out / stage / "best.pt" for stage in _STAGES}
    scores, table, bars = out / "scores.json", out / "stages.md", out / "stages.png"
    stages = Stages(out / "stages.json")
    texts, conversations = find_texts(s, stages), find_conversations(s, stages)
    stages.run("tokenizer and data", lambda fresh: prepare(texts, tokenizer, s), files=texts,
               settings=vocab_size(s), outputs=[tokenizer, train, val])  # fmt: skip
    inputs = {
        "pretrain": ([train, val], ["--tokenizer", str(tokenizer), "--data_dir", s.DATA_DIR]),
        "sft": ([models["pretrain"], conversations],
                ["--checkpoint", str(models["pretrain"]), "--train_data_path", str(conversations)]),
        "dpo": ([models["sft"], *_PREFERENCES],
                ["--checkpoint", str(models["sft"]), "--train_data_path", str(_PREFERENCES[0]),
                 "--val_data_path", str(_PREFERENCES[1])]),
    }  # fmt: skip
    scripts = {"pretrain": train_pretrain, "sft": train_sft, "dpo": train_dpo}
    for stage, name in (("pretrain", "pre-training"), ("sft", "fine-tuning"), ("dpo", "preferences")):
        files, places = inputs[stage]
        stages.run(name, lambda fresh, stage=stage, places=places: train_stage(scripts[stage], stage, places, s, fresh),
                   files=files, settings=[flags_of(stage, s), s.SEED],
                   outputs=[models[stage], out / stage / "curves.png"])  # fmt: skip
    examined = [*models.values(), train, val, conversations, _PREFERENCES[1], _BLIMP]
    with interruptible():  # nothing of this stage would be kept
        stages.run("evaluation", lambda fresh: evaluate(models, train, val, conversations, s, (scores, table, bars)),
                   files=examined, outputs=[scores, table, bars])  # fmt: skip
    write_report(s, stages, [*texts, conversations], json.loads(scores.read_text(encoding="utf-8")))


def talk(s):
    """Talk to the last model, until the user leaves."""
    print()
    chat.main(["--checkpoint", str(Path(s.OUT_DIR) / "dpo" / "best.pt"), "--device", s.DEVICE])


def find_texts(s, stages):
    """The text to learn from: what TEXT names, a download for the large preset, else the bundled sample."""
    if s.TEXT or s.PRESET != "h100":
        return [Path(text) for text in s.TEXT] or [_BUNDLED]
    path = Path(pretrain_config.TRAIN_DATA_PATH)
    stages.run("text", lambda fresh: download_data.main(["--size", "large"]), outputs=[path])
    return [path]


def find_conversations(s, stages):
    """What to fine-tune on: what CONVERSATIONS names, a download for the large preset, else the bundled sample."""
    if s.CONVERSATIONS or s.PRESET != "h100":
        return Path(s.CONVERSATIONS or _BUNDLED_TALK)
    path = Path(sft_config.TRAIN_DATA_PATH)
    stages.run("conversations", lambda fresh: sft_download_data.main(["--size", "medium"]), outputs=[path])
    return path


def vocab_size(s):
    """Tokens of the vocabulary: more for a larger model and more text."""
    return s.VOCAB_SIZE or (32768 if s.PRESET == "h100" else 4096)


def prepare(texts, tokenizer, s):
    """Learn a vocabulary (project 2) and turn the texts into memory maps, some documents held out (project 3)."""
    tokenizer.unlink(missing_ok=True)  # the text or the size of the vocabulary has changed
    prepare_data.main(["--train_data_path", ",".join(map(str, texts)), "--data_dir", s.DATA_DIR,
                       "--tokenizer", str(tokenizer), "--vocab_size", str(vocab_size(s))])  # fmt: skip


def flags_of(stage, s):
    """The flags of a training stage that its result depends on."""
    steps = ["--max_steps", str(s.PRETRAIN_STEPS)] if stage == "pretrain" and s.PRETRAIN_STEPS else []
    return [*_TRAINING[s.PRESET][stage], *steps]


def train_stage(script, stage, places, s, fresh):
    """Run a training script (projects 3, 4 and 6); an interrupted run of the same settings continues."""
    out = Path(s.OUT_DIR) / stage
    if fresh:  # at once: interrupted before its first save, the new run must find nothing of the old one
        set_aside(out)
    script.main([*flags_of(stage, s), *places, "--out_dir", str(out), "--seed", str(s.SEED), "--device", s.DEVICE])


def evaluate(models, train, val, conversations, s, outputs):
    """Judge all stages on the same held-out sets, and what the pre-trained model compresses beside xz."""
    scores, table, bars = outputs
    held_out = stage_report.HeldOut(
        pretrain_data=val,
        conversations=split(read_conversations(conversations), sft_config.VAL_FRACTION)[1],
        preferences=read_preferences(_PREFERENCES[1]),
        max_tokens=65_536,
    )
    print("examining every stage on the same held-out sets ...", flush=True)
    paths = {name: models[stage] for stage, name in _STAGES.items()}
    found = stage_report.evaluate_stages(paths, held_out, s.DEVICE)
    print(stage_report.plain(found, held_out.prompts))
    compress(models["pretrain"], train, val, s, scores)
    atomic_write(table, stage_report.markdown(found, held_out.prompts))
    stage_report.draw(bars, found)


def compress(best, train, val, s, path):
    """Score the pre-trained model on the held-out documents, beside xz on the same bytes, and let it write."""
    model, tokenizer = load(best, device=s.DEVICE)
    held_out = TokenDataset(val, model.config.block_size, tokenizer.fingerprint)
    print("predicting the held-out documents ...", flush=True)
    total = evaluation.score(model, held_out)
    text = plain_text(val, tokenizer)
    seen = plain_text(train, tokenizer, max(0, _XZ_REACH - len(text)))
    print(f"compressing them with xz, {len(seen) / 1e6:.1f} MB of training text before them ...", flush=True)
    xz, xz_seen, xz_both = (len(lzma.compress(part, preset=9)) for part in (text, seen, seen + text))
    print("judging pairs of sentences (BLiMP), writing samples ...", flush=True)
    blimp = zero_shot.blimp(model, tokenizer, _BLIMP)
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


def plain_text(path, tokenizer, most=sys.maxsize):
    """The last `most` bytes of all documents in a token file."""
    tokens = np.fromfile(path, dtype=read_header(path)["dtype"])
    tokens = tokens[tokens != tokenizer.eot_id]
    text = tokenizer.decode_bytes(tokens[max(0, len(tokens) - most) :].tolist())  # a token has at least one byte
    return text[max(0, len(text) - most) :]


def write_report(s, stages, texts, scores):
    """Write report/report.md with its plots beside it."""
    out, folder = Path(s.OUT_DIR), Path(s.REPORT_DIR)
    metrics = read_metrics(out / "pretrain" / "metrics.jsonl")
    tokens = sum(entry.get("tokens", 0) for entry in metrics)
    plots = {"stages.png": out / "stages.png"} | {f"{stage}.png": out / stage / "curves.png" for stage in _STAGES}
    lines = [
        "# What the speedrun made",
        "",
        f"A model of {scores['parameters'] / 1e6:.1f}M parameters that read {tokens / 1e6:.1f}M tokens of "
        f"{', '.join(text.name for text in texts[:-1])}, was fine-tuned on the conversations in {texts[-1].name}, and "
        f"learned to prefer the polite answers of {_PREFERENCES[0].name}.",
        "",
        f"Preset `{s.PRESET}`, a vocabulary of {vocab_size(s):,}, {device_name(s.DEVICE)}, "
        f"{datetime.date.today().isoformat()}.",
        "",
        "| stage | time |",
        "| --- | --- |",
        *(f"| {name} | {clock(seconds)} |" for name, seconds in stages.times()),
        "",
        "## What each stage brought, and what it cost",
        "",
        (out / "stages.md").read_text(encoding="utf-8"),
        "![stages](stages.png)",
        "",
        "The reward accuracy compares with the fine-tuned model, which ties with itself: 50%. The perplexity is that "
        "of a part of the documents held out of pre-training.",
        "",
        *quality(scores),
        "## How it learned",
        "",
        *(f"![{name}]({stage}.png)" for stage, name in _STAGES.items()),
        "",
        "## What the pre-trained model writes",
        "",
        "The beginning in bold was given.",
        "",
        *(f"> {quoted(prompt, text)}\n" for prompt, text in scores["samples"].items()),
        "## What to do with it",
        "",
        "```",
        *commands_for(out / "dpo" / "best.pt"),
        "```",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in plots.items():
        shutil.copyfile(source, folder / name)
    atomic_write(folder / "report.md", "\n".join(lines))
    print(f"\nThe report is in {folder / 'report.md'}, the model in {out / 'dpo' / 'best.pt'}. To use it:")
    print("".join(f"  {command}\n" for command in commands_for(out / "dpo" / "best.pt")), end="")


def commands_for(model):
    """How to use a model: talk to it in the terminal, in the browser, and serve it to programs."""
    scripts = ("chat.py", "phase10_deployment/project30_gradio/app.py", "phase10_deployment/project28_serving/serve.py")
    return [f"uv run python {script} --checkpoint {os.path.relpath(model, ROOT)}" for script in scripts]


def quality(scores):
    """The lines of the report that say how good the model is."""
    verdict = "fewer" if scores["bits_per_byte"] < scores["xz"] else "more"
    return [
        "## How well the pre-trained model compresses",
        "",
        f"On {scores['held_out_bytes'] / 1e3:,.0f} kB of documents that it has not read:",
        "",
        "| measure | value |",
        "| --- | --- |",
        f"| model, bits a byte | **{scores['bits_per_byte']:.3f}** |",
        f"| `xz -9` on the same bytes | {scores['xz']:.3f} |",
        f"| `xz -9` that has read the training text first (the last 64 MiB) | {scores['xz_primed']:.3f} |",
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
