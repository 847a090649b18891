"""Compare the stages of a model's education: pre-trained, fine-tuned, with adapters, preference-tuned.

    uv run python phase2_finetuning/project6_dpo/compare_stages.py
    uv run python phase2_finetuning/project6_dpo/compare_stages.py --stages base=org/name mine=mine.pt

Measures each checkpoint on the same held-out text: perplexity on the text of pre-training (what was forgotten), the
loss on held-out answers, which of two answers it prefers, and what it says to a few prompts. Prints a table and leaves
it as stages.md, with a plot, in checkpoints/stages.
"""

from pathlib import Path

from common import CHECKPOINTS, DATA
from common.checkpoint import atomic_write
from common.run import Run
from phase1_foundation.project3_pretrain.loading import newest_checkpoint
from phase2_finetuning.project4_sft.conversations import read_conversations, split
from phase2_finetuning.project6_dpo import stages_config
from phase2_finetuning.project6_dpo.preferences import read_preferences
from phase2_finetuning.project6_dpo.stage_report import HeldOut, draw, evaluate_stages, markdown, plain

# name -> the folders of checkpoints/ in which a stage is looked for, the first that holds one
FOLDERS = {
    "pre-trained": ("project3", "speedrun/pretrain"),
    "fine-tuned": ("project4", "speedrun/sft"),
    "adapters": ("project5",),
    "preference-tuned": ("project6", "speedrun/dpo"),
}


def main(argv=None):
    """Run the script."""
    with Run(stages_config, argv, description=__doc__, quiet=True) as run:
        s = run.settings
        stages = evaluate_stages(find_stages(s), held_out_of(s), run.device)
        out = Path(s.OUT_DIR)
        atomic_write(out / "stages.md", markdown(stages, s.PROMPTS))
        draw(out / "stages.png", stages)
        run.print(plain(stages, s.PROMPTS))
        run.print(f"wrote stages.md and stages.png in {out}")


def find_stages(s):
    """Name -> checkpoint."""
    if s.STAGES:
        return dict(stage.split("=", 1) for stage in s.STAGES)
    candidates = {name: [newest_checkpoint(CHECKPOINTS / folder) for folder in folders] for name, folders in
                  FOLDERS.items()}  # fmt: skip
    found = {name: next(filter(None, paths), None) for name, paths in candidates.items()}
    found = {name: path for name, path in found.items() if path is not None}
    if not found:
        raise ValueError(f"there are no checkpoints in {CHECKPOINTS}: train a model, or name some with --stages")
    return found


def held_out_of(s):
    """What all stages are measured on."""
    speedrun = DATA / "speedrun" / "val.bin"
    return HeldOut(
        pretrain_data=s.PRETRAIN_DATA or (speedrun if speedrun.is_file() else None),
        conversations=split(read_conversations(s.SFT_DATA), s.VAL_FRACTION)[1],
        preferences=read_preferences(s.PREFERENCE_DATA),
        prompts=s.PROMPTS,
        max_tokens=s.MAX_TOKENS,
    )


if __name__ == "__main__":
    main()
