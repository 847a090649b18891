"""Download conversations to fine-tune on: --source dolly, smoltalk or ultrachat, --size small, medium or large.

    uv run python phase2_finetuning/project4_sft/download_data.py --size small
    uv run python phase2_finetuning/project4_sft/download_data.py --source smoltalk --size medium

Writes one conversation per line to TRAIN_DATA_PATH, resumes an interrupted download, and takes the bundled sample where
the Hugging Face hub cannot be reached (--no_fallback fails instead).
"""

from common import DATA
from common.download import fetch
from common.run import Run
from phase2_finetuning.project4_sft import config
from phase2_finetuning.project4_sft.conversations import check_messages

SIZES = {"small": 10_000_000, "medium": 100_000_000, "large": 1_000_000_000}  # bytes, at most


def instructions(rows):
    """Dolly's columns as conversations; a context stands before the question."""
    for row in rows:
        question = f"{row['context']}\n\n{row['instruction']}" if row["context"] else row["instruction"]
        yield from _whole([{"role": "user", "content": question}, {"role": "assistant", "content": row["response"]}])


def conversations(rows):
    """Rows that hold `messages` already."""
    for row in rows:
        yield from _whole([{"role": m["role"], "content": m["content"]} for m in row["messages"]])


def _whole(messages):
    """The conversation as a line, unless it is none (roles out of order, say): some rows of public sets are broken."""
    try:
        check_messages(messages)
    except ValueError:
        return
    yield {"messages": messages}


SOURCES = {
    "dolly": {"dataset": "databricks/databricks-dolly-15k", "reader": instructions},
    "smoltalk": {"dataset": "HuggingFaceTB/smoltalk", "subset": "all", "reader": conversations},
    "ultrachat": {"dataset": "HuggingFaceH4/ultrachat_200k", "split": "train_sft", "reader": conversations},
}


def main(argv=None):
    """Run the script."""
    with Run(config, argv, sections=("Data",), description=__doc__, quiet=True) as run:
        fetch(run.settings, run.settings.TRAIN_DATA_PATH, SOURCES, SIZES, DATA / "sft_sample.jsonl.xz")


if __name__ == "__main__":
    main()
