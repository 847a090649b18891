"""Train a tokenizer and say what it is like.

uv run python phase1_foundation/project2_tokenizer/train_tokenizer.py --vocab_size 5000

Reads data/wikipedia_train.txt (download_data.py writes it), or the bundled sample where there is none, and writes
checkpoints/project2/tokenizer.pkl.
"""

import time
from pathlib import Path

from common import DATA, ROOT
from common.progress import Reporter, human
from common.run import Run
from phase1_foundation.project2_tokenizer import config
from phase1_foundation.project2_tokenizer.corpus import Corpus, compare_rules
from phase1_foundation.project2_tokenizer.tokenizer import RULES, BPETokenizer

SAMPLE = DATA / "sample_corpus.jsonl.xz"
SENTENCE = "Tokenization isn't spelling: 1234 unbelievably rare words, naïve café."


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("Tokenizer", "Data", "System"), description=__doc__) as run:
        s = run.settings
        corpus = Corpus(find_text(run, Path(s.TRAIN_DATA_PATH)), s.MAX_BYTES)
        run.metrics(Path(s.TOKENIZER_PATH).parent / "metrics.jsonl")
        compile_loops(run, s)
        began = time.perf_counter()
        tokenizer = train(run, s, corpus)
        seconds = time.perf_counter() - began
        tokenizer.save(s.TOKENIZER_PATH)
        run.print(f"Learned {len(tokenizer.merges):,} merges from {human(corpus.bytes)}B of text in {seconds:.1f} s")
        if tokenizer.vocab_size < s.VOCAB_SIZE:
            run.print(
                f"No more pairs occur {s.MIN_FREQUENCY} times: there are {tokenizer.vocab_size:,} ids, "
                f"not {s.VOCAB_SIZE:,}; take more text for more"
            )
        figures = judge(run, tokenizer, corpus)
        run.log(vocab_size=tokenizer.vocab_size, train_bytes=corpus.bytes, seconds=seconds, **figures)
        run.print(f"Wrote {shown(s.TOKENIZER_PATH)}: {tokenizer!r}, fingerprint {tokenizer.fingerprint[:12]}")


def shown(path):
    """A path for messages, short where it lies in the repository."""
    path = Path(path)
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def find_text(run, path):
    """The training text, or the bundled sample in its place."""
    if path.is_file() or str(path) != config.TRAIN_DATA_PATH:
        return path
    run.print(f"{shown(path)} is not there: taking the bundled sample; download_data.py gets more text")
    return SAMPLE


def compile_loops(run, s):
    """Run the fast engine once on nothing, so that its compilation is not counted as training."""
    began = time.perf_counter()
    if s.ENGINE == "fast":
        for rule in RULES:
            BPETokenizer.train(["a first use"] * 2, 260, rule=rule).encode("a first use")
    if (seconds := time.perf_counter() - began) > 5:
        run.print(f"Compiled the loops of the fast engine in {seconds:.0f} s (once a machine)")


def train(run, s, corpus):
    """Learn the vocabulary, with a line of progress a second."""
    reporters, seen = {}, {}

    def progress(stage, done, total):
        total = total or corpus.expected_bytes
        if not total:
            return
        scale, unit = (1, "merges") if stage == "merge" else (1_000_000, "B")
        reporter = reporters.setdefault(
            stage,
            Reporter(
                max(1, total // scale), {"count": "counting, MB", "merge": "merging"}[stage], unit, echo=run.print
            ),
        )
        if done:
            reporter.report(min(done // scale, reporter.total), units=done - seen.get(stage, 0))
        seen[stage] = done

    return BPETokenizer.train(
        corpus, s.VOCAB_SIZE, config.special_tokens(s), pattern=s.PATTERN, rule=s.RULE, engine=s.ENGINE,
        min_frequency=s.MIN_FREQUENCY, num_threads=s.NUM_THREADS, max_unique_words=s.MAX_UNIQUE_WORDS,
        progress=progress,
    )  # fmt: skip


def judge(run, tokenizer, corpus):
    """Print both rules on the documents held out, and one sentence in pieces; returns the figures."""
    run.print(f"\n{SENTENCE}")
    for rule in RULES:
        pieces = tokenizer.with_rule(rule).pieces(SENTENCE)
        run.print(f"  {rule:<13} {len(pieces):>3} tokens  {'|'.join(pieces)}")
    if not corpus.held_out:
        return {}
    figures = compare_rules(tokenizer, corpus.held_out)
    run.print(f"\nOn {len(corpus.held_out):,} documents not trained on:")
    run.print(f"  {'rule':<13} bytes/token  tokens/byte    MB/s  round trip")
    for rule, f in figures.items():
        run.print(
            f"  {rule:<13} {f['bytes_per_token']:>11.3f}  {f['tokens_per_byte']:>11.4f}  "
            f"{f['megabytes_per_second']:>6.1f}  {f['round_trips']:>9.0%}"
            + ("  <- saved with this rule" if rule == tokenizer.rule else "")
        )
    run.print()
    return figures


if __name__ == "__main__":
    main()
