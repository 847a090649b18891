"""Download text to pre-train on: --source fineweb, wikipedia or wikitext, --size small, medium or large.

    uv run python phase1_foundation/project3_pretrain/download_data.py --size small
    uv run python phase1_foundation/project3_pretrain/download_data.py --source wikipedia --size medium

Writes one document per line to TRAIN_DATA_PATH, resumes an interrupted download, and takes the bundled sample where
the Hugging Face hub cannot be reached (--no_fallback fails instead).
"""

import re

from common import DATA
from common.download import fetch
from common.run import Run
from phase1_foundation.project3_pretrain import config

SIZES = {"small": 100_000_000, "medium": 1_000_000_000, "large": 10_000_000_000}  # bytes of text, at most


def articles(rows):
    """Join WikiText's lines to whole articles; one begins at a heading such as `` = Valkyria Chronicles III = ``."""
    article = []
    for row in rows:
        if re.fullmatch(r" = [^=].*[^=] = \n?| = [^=] = \n?", row["text"]):
            yield "".join(article)
            article = []
        article.append(row["text"])
    yield "".join(article)


SOURCES = {
    "fineweb": {"dataset": "HuggingFaceFW/fineweb-edu", "subset": "sample-10BT"},
    "wikipedia": {"dataset": "wikimedia/wikipedia", "subset": "20231101.en"},
    "wikitext": {"dataset": "Salesforce/wikitext", "subset": "wikitext-103-raw-v1", "reader": articles},
}


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("Data",), description=__doc__, quiet=True) as run:
        fetch(run.settings, run.settings.TRAIN_DATA_PATH, SOURCES, SIZES, DATA / "sample_corpus.jsonl.xz")


if __name__ == "__main__":
    main()
