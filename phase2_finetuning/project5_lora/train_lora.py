"""Fine-tune a language model on conversations by low-rank adapters; its weights stay as they are.

    uv run python phase2_finetuning/project5_lora/train_lora.py
    uv run python phase2_finetuning/project5_lora/train_lora.py --rank 32 --rank_stabilized
    uv run python phase2_finetuning/project5_lora/train_lora.py --dora --targets q_proj v_proj
    uv run python phase2_finetuning/project5_lora/train_lora.py --checkpoint HuggingFaceTB/SmolLM-135M --block_size 1024

The run is project 4's (train_sft.py), on the same model and conversations; interrupted, it goes on in the same way. It
leaves in checkpoints/project5 what every run leaves, and adapter/, which `peft` reads. merge.py makes a plain model of
it. Talk to it:

    uv run python chat.py --checkpoint checkpoints/project5/best.pt
"""

from pathlib import Path

import torch

from common import catalog
from common.run import Run
from phase1_foundation.project3_pretrain.hub_tokenizer import write_tokenizer
from phase1_foundation.project3_pretrain.loading import load
from phase2_finetuning.project4_sft.exporting import add_template
from phase2_finetuning.project4_sft.template import ChatTemplate
from phase2_finetuning.project4_sft.tuning import fine_tune
from phase2_finetuning.project5_lora import config
from phase2_finetuning.project5_lora.lora import save_adapter, trainable


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__) as run:
        train(run)


def train(run):
    """Train adapters as the settings say and write them to OUT_DIR; returns the final `TrainState`."""
    s = run.settings
    state = fine_tune(run, lambda model, added: adapt(run, model, added), title=f"LoRA, rank {s.RANK}")
    finished = state is None or state.iter == state.total
    if finished and run.is_main:
        model, tokenizer = load(Path(s.OUT_DIR) / "best.pt")
        folder = save_adapter(model, Path(s.OUT_DIR) / "adapter", published(s.CHECKPOINT))
        write_tokenizer(tokenizer, folder, model.config.block_size)  # it may have tokens that the base has not
        add_template(ChatTemplate(tokenizer), folder)
        size = (folder / "adapter_model.safetensors").stat().st_size
        run.print(f"wrote the adapter alone, {size / 1e6:.2f} MB, to {folder}")
    return state


def published(source):
    """The base as `peft` can load it: a Hugging Face folder or org/name, None for a checkpoint of ours."""
    if source is None or source.endswith(".pt"):
        return None
    path = Path(source)
    return source if (path / "config.json").is_file() or not path.is_dir() else None


def adapt(run, model, added):
    """Freeze the model and add the adapters; `added` are the ids of tokens that are new to it."""
    s = run.settings
    options = {"rank": s.RANK, "alpha": s.ALPHA, "dropout": s.LORA_DROPOUT, "targets": s.TARGETS}
    options |= {"rank_stabilized": True} if s.RANK_STABILIZED else {}
    options |= {"dora": True} if s.DORA else {}
    options |= {"tokens": added} if added and s.TRAIN_TOKENS else {}
    model = catalog.apply(model.to(getattr(torch, s.BASE_DTYPE)), [("lora", options)])
    count, total = trainable(model)
    run.print(f"{count / 1e6:.3f}M of {total / 1e6:.2f}M values are trained ({count / total:.2%})")
    return model


if __name__ == "__main__":
    main()
