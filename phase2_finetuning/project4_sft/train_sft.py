"""Fine-tune a language model on conversations, so that it answers.

    uv run python phase2_finetuning/project4_sft/train_sft.py
    uv run python phase2_finetuning/project4_sft/train_sft.py --checkpoint HuggingFaceTB/SmolLM-135M --block_size 1024
    uv run python phase2_finetuning/project4_sft/train_sft.py --train_data_path mine.jsonl --epochs 5

Starts from the newest model of project 3 (or --checkpoint), adds the template's tokens to its tokenizer, packs the
conversations of TRAIN_DATA_PATH (the bundled sample if there are none), and leaves best.pt, last.pt, metrics.jsonl and
curves.png in checkpoints/project4. Stop it with Ctrl-C, or kill it: the same command continues. Then talk to it:

    uv run python chat.py
"""

from common.run import Run
from phase2_finetuning.project4_sft import config
from phase2_finetuning.project4_sft.tuning import fine_tune


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__) as run:
        fine_tune(run)


if __name__ == "__main__":
    main()
