"""Tokenise a text into memory maps: train.bin and val.bin in DATA_DIR, each with a JSON header.

    uv run python phase1_foundation/project3_pretrain/prepare_data.py
    uv run python phase1_foundation/project3_pretrain/prepare_data.py --train_data_path data/sample_corpus.jsonl.xz

Reads .txt (one document per line) and .jsonl (a "text" field), also compressed (.gz, .xz, .zst), one file or several
(with commas between, or a pattern). Does nothing when the result stands and neither text nor tokenizer has changed.
"""

import signal

from common.run import Run
from phase1_foundation.project3_pretrain import config
from phase1_foundation.project3_pretrain.preparation import prepare

__all__ = ["main", "prepare"]


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("Data",), description=__doc__, quiet=True) as run:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends it at once: nothing half-written stays
        prepare(run.settings, refresh=True)


if __name__ == "__main__":
    main()
