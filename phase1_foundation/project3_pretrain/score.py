"""Score a model without any training: bits per byte of texts, BLiMP (grammar), LAMBADA (the last word of a passage).

uv run python phase1_foundation/project3_pretrain/score.py --checkpoint checkpoints/project3/best.pt
uv run python phase1_foundation/project3_pretrain/score.py --checkpoint checkpoints/project3/best.pt --details
uv run python phase1_foundation/project3_pretrain/score.py --text data/shakespeare.txt --blimp none --lambada none
"""

import lzma
import sys

import torch

from common import DATA
from common import settings as common_settings
from common.device import pick_device
from common.download import open_text, read_documents
from common.progress import track
from common.run import Run
from phase1_foundation.project3_pretrain.data import TokenDataset
from phase1_foundation.project3_pretrain.evaluation import Score, score, score_text
from phase1_foundation.project3_pretrain.loading import default_source, load
from phase1_foundation.project3_pretrain.token_file import fingerprint_of
from phase1_foundation.project3_pretrain.zero_shot import blimp, lambada

# == Scoring ==
CHECKPOINT: str | None = None  # a checkpoint, a Hugging Face folder or org/name; none: bundled, else newest
DEVICE = pick_device()  # cuda, mps or cpu
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"  # autocast type of the forward
BLIMP: str | None = str(DATA / "eval" / "blimp_sample.jsonl")  # file or folder of minimal pairs; none skips the test
LAMBADA: str | None = str(DATA / "eval" / "lambada_sample.jsonl")  # file of passages; none skips the test
TEXT: list[str] = []  # texts (.txt, .jsonl, also compressed): bits per byte, beside those of xz -9
TOKENS: list[str] = []  # token files (.bin) of prepare_data.py: loss, perplexity and bits per byte
LIMIT: int | None = None  # at most so many passages, and pairs of each paradigm
STRIDE: int | None = None  # tokens between two windows of a long text; none: half the context
DETAILS = False  # list BLiMP by paradigm


def validate_config(settings=None):
    """Refuse combinations that cannot work.

    Raises:
        ValueError: names the constants, their values and the remedy.
    """
    s = settings or sys.modules[__name__]
    if s.DTYPE not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"DTYPE={s.DTYPE} is unknown: use one of float32, bfloat16, float16")
    for name in ("LIMIT", "STRIDE"):
        if getattr(s, name) is not None and getattr(s, name) < 1:
            raise ValueError(f"{name}={getattr(s, name)} must be at least 1, or none")
    if not (s.BLIMP or s.LAMBADA or s.TEXT or s.TOKENS):
        raise ValueError("BLIMP=none, LAMBADA=none, and neither TEXT nor TOKENS: name something to score")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])


def main(argv=None):
    """Run the script."""
    with Run(sys.modules[__name__], argv, description=__doc__) as run:
        s = run.settings
        source = s.CHECKPOINT or default_source()
        run.print(f"scoring {source}")
        model, tokenizer = load(source)
        if tokenizer is None:
            raise ValueError(
                f"CHECKPOINT={s.CHECKPOINT} holds a model without a tokenizer, and what is scored is text: use one "
                f"that was saved with its tokenizer, or put tokenizer.json into its folder"
            )
        model.to(run.device)
        dtype = None if s.DTYPE == "float32" else getattr(torch, s.DTYPE)
        for path in s.TOKENS:
            dataset = TokenDataset(path, model.config.block_size, fingerprint_of(tokenizer))
            run.print(describe(path, score(model, dataset, dtype=dtype)))
        for path in s.TEXT:
            report_text(run, model, tokenizer, path, dtype)
        if s.BLIMP:
            report_blimp(run, blimp(model, tokenizer, s.BLIMP, s.LIMIT, dtype))
        if s.LAMBADA:
            result = lambada(model, tokenizer, s.LAMBADA, s.LIMIT, dtype)
            run.print(
                f"LAMBADA: {result.accuracy:.1%} of {result.passages} last words guessed, "
                f"perplexity of the word {result.perplexity:.4g}"
            )


def describe(path, result):
    """One line about a `Score`."""
    return (
        f"{path}: {result.bits_per_byte:.4f} bits a byte ({result.bytes:,} bytes), "
        f"loss {result.loss:.4f} nats a token, perplexity {result.perplexity:.2f} ({result.tokens:,} tokens)"
    )


def report_text(run, model, tokenizer, path, dtype):
    """Score the documents of a file, each with windows of its own, and what xz makes of the same bytes."""
    s = run.settings
    if ".jsonl" in str(path):
        texts = list(read_documents(path))
    else:
        with open_text(path) as file:
            texts = [file.read()]  # one text: its line breaks belong to it
    if not any(texts):
        raise ValueError(f"{path} holds no text: there is nothing to score")
    total = Score()
    for text in track(texts, label="scoring", unit="texts"):
        total += score_text(model, tokenizer, text, s.STRIDE, dtype=dtype)
    run.print(describe(path, total))
    packed = len(lzma.compress("".join(texts).encode("utf-8", "surrogatepass"), preset=9))
    bits = 8 * packed / total.bytes
    run.print(f"  xz -9 needs {bits:.4f} bits a byte: the model is {bits / total.bits_per_byte:.2f} times as good")


def report_blimp(run, result):
    """Print the mean and, if asked for, all paradigms."""
    kinds = len(result.paradigms)
    run.print(f"BLiMP: {result.accuracy:.1%}, mean of {kinds} paradigms ({result.pairs} pairs; chance: 50%)")
    if run.settings.DETAILS:
        for name, accuracy in sorted(result.paradigms.items(), key=lambda item: item[1]):
            run.print(f"  {accuracy:6.1%}  {name}")


if __name__ == "__main__":
    main()
