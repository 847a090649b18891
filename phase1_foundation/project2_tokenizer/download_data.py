"""Get English text from the Hugging Face hub, one document per line, to data/wikipedia_train.txt.

uv run python phase1_foundation/project2_tokenizer/download_data.py --size small
uv run python phase1_foundation/project2_tokenizer/download_data.py --size medium --source wikitext

Without a connection the bundled sample is written to the same path (not with --no_fallback), unless other text stands
there already. An interrupted download continues where it stopped.
"""

from common import DATA
from common.download import download_text
from common.run import Run
from phase1_foundation.project2_tokenizer import config

PATH = DATA / "wikipedia_train.txt"
SIZES = {"small": 10_000_000, "medium": 100_000_000, "large": 1_000_000_000}  # bytes
SOURCES = {
    "wikipedia": {"dataset": "wikimedia/wikipedia", "subset": "20231101.en"},
    "wikitext": {"dataset": "Salesforce/wikitext", "subset": "wikitext-103-raw-v1"},  # Merity et al., 2016
}


def articles(rows):
    """WikiText comes line by line; an article begins at a line ` = Title = ` (deeper headings have ` = = `)."""
    lines = []
    for row in rows:
        line = row["text"].strip()
        if line.startswith("= ") and not line.startswith("= =") and lines:
            yield " ".join(lines)
            lines = []
        if line:
            lines.append(line)
    if lines:
        yield " ".join(lines)


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("Download",), description=__doc__, quiet=True) as run:
        s = run.settings
        download_text(
            PATH,
            **SOURCES[s.SOURCE],
            max_bytes=SIZES[s.SIZE],
            fallback=DATA / "sample_corpus.jsonl.xz",
            no_fallback=s.NO_FALLBACK,
            reader=articles if s.SOURCE == "wikitext" else None,
        )
        run.print("Now: uv run python phase1_foundation/project2_tokenizer/train_tokenizer.py --vocab_size 5000")


if __name__ == "__main__":
    main()
