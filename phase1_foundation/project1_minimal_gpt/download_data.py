"""Get the text to train on: tiny Shakespeare comes with the repository, other public text from the Hugging Face hub.

uv run python phase1_foundation/project1_minimal_gpt/download_data.py
uv run python phase1_foundation/project1_minimal_gpt/download_data.py --source wikitext --size small
uv run python phase1_foundation/project1_minimal_gpt/train.py --train_data_path data/wikitext_characters.txt
"""

import hashlib
from pathlib import Path

from common import DATA
from common.download import download_text
from common.run import Run
from phase1_foundation.project1_minimal_gpt import config

SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SIZES = {"small": 1_000_000, "medium": 10_000_000, "large": 100_000_000}  # bytes; tiny Shakespeare has 1.1 million
SOURCES = {
    "wikitext": {"dataset": "Salesforce/wikitext", "subset": "wikitext-103-raw-v1"},
    "wikipedia": {"dataset": "wikimedia/wikipedia", "subset": "20231101.en"},
}


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("Download",), description=__doc__, quiet=True) as run:
        s = run.settings
        if s.SOURCE == "shakespeare":
            check_shakespeare(run, DATA / "shakespeare.txt")
            return
        path = DATA / f"{s.SOURCE}_characters.txt"
        fallback = DATA / "sample_corpus.jsonl.xz"
        download_text(
            path, **SOURCES[s.SOURCE], max_bytes=SIZES[s.SIZE], fallback=fallback, no_fallback=s.NO_FALLBACK
        )  # fmt: skip
        run.print(f"Train on it with --train_data_path {path}")


def check_shakespeare(run, path):
    """Tell whether the bundled text is there and unchanged; raises OSError or ValueError with the remedy."""
    remedy = f"restore it with `git checkout -- {path.relative_to(DATA.parent).as_posix()}`"
    if not path.is_file():
        raise FileNotFoundError(f"the bundled {path} is missing: {remedy}")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(f"{Path(path)} is not tiny Shakespeare as bundled (its checksum differs): {remedy}")
    run.print(f"{path}: tiny Shakespeare, {len(content):,} characters, checksum right; nothing to download")


if __name__ == "__main__":
    main()
