"""Download preferences to learn from: --source ultrafeedback or hh, --size small, medium or large.

    uv run python phase2_finetuning/project6_dpo/download_data.py --size small
    uv run python phase2_finetuning/project6_dpo/download_data.py --source hh --size medium

hh is Anthropic's HH-RLHF, its helpful and its harmless part; the latter holds offensive text by design. Writes one
preference per line to TRAIN_DATA_PATH, resumes an interrupted download, and takes the bundled polite pairs where the
Hugging Face hub cannot be reached (--no_fallback fails instead).
"""

import re

from common import DATA
from common.download import fetch
from common.run import Run
from phase2_finetuning.project6_dpo import config
from phase2_finetuning.project6_dpo.preferences import check_preference

SIZES = {"small": 10_000_000, "medium": 100_000_000, "large": 1_000_000_000}  # bytes, at most
ROLES = {"Human": "user", "Assistant": "assistant"}


def conversations(rows):
    """Rows whose `chosen` and `rejected` are whole conversations, as lists of messages."""
    for row in rows:
        yield from _pair([{"role": m["role"], "content": m["content"]} for m in row["chosen"]],
                         [{"role": m["role"], "content": m["content"]} for m in row["rejected"]])  # fmt: skip


def transcripts(rows):
    """Rows whose `chosen` and `rejected` are whole conversations, as texts: "Human: ...", "Assistant: ...".

    >>> row = {"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello.", "rejected": "\\n\\nHuman: Hi\\n\\nAssistant: No."}
    >>> next(transcripts([row]))
    {'prompt_messages': [{'role': 'user', 'content': 'Hi'}], 'chosen': 'Hello.', 'rejected': 'No.'}
    """
    for row in rows:
        yield from _pair(_turns(row["chosen"]), _turns(row["rejected"]))


def _turns(text):
    """The messages of a transcript."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    return [{"role": ROLES[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])]


def _pair(chosen, rejected):
    """The preference as a line, unless it is none: some rows of public sets are broken, or part too early."""
    if not chosen or not rejected or chosen[:-1] != rejected[:-1]:
        return
    entry = {"prompt_messages": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    try:
        check_preference(entry)
    except ValueError:
        return
    yield entry


SOURCES = {
    "ultrafeedback": {"dataset": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs",
                      "reader": conversations},
    "hh": {"dataset": "Anthropic/hh-rlhf", "reader": transcripts},
}  # fmt: skip


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("Data",), description=__doc__, quiet=True) as run:
        fetch(run.settings, run.settings.TRAIN_DATA_PATH, SOURCES, SIZES, DATA / "polite_train.jsonl.xz")


if __name__ == "__main__":
    main()
