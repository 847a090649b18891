"""Add adapters into the weights of their model: a plain checkpoint, which every other script loads.

    uv run python phase2_finetuning/project5_lora/merge.py
    uv run python phase2_finetuning/project5_lora/merge.py --checkpoint HuggingFaceTB/SmolLM-135M --adapter mine/adapter

Without --adapter it takes the adapters of train_lora.py's best model. Afterwards:

    uv run python chat.py --checkpoint checkpoints/project5/merged.pt
"""

import torch

from common import catalog
from common.run import Run
from phase1_foundation.project3_pretrain.hub import resolve_folder
from phase1_foundation.project3_pretrain.hub_tokenizer import read_tokenizer
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.model import Transformer
from phase1_foundation.project3_pretrain.running import write_plain
from phase2_finetuning.project4_sft.vocabulary import grow_vocabulary
from phase2_finetuning.project5_lora import merge_config
from phase2_finetuning.project5_lora.lora import load_adapter, merge_lora


def main(argv=None):
    """Run the script."""
    with Run(merge_config, argv, description=__doc__, quiet=True) as run:
        s = run.settings
        model, tokenizer = load(s.CHECKPOINT)
        if s.ADAPTER:
            tokenizer = grow_for(model, tokenizer, resolve_folder(s.ADAPTER))
            load_adapter(model, s.ADAPTER)
        check_recipe(merge_lora(model), s.CHECKPOINT)
        write_plain(model, tokenizer, s.MERGED)
        what = f"{s.ADAPTER} and {s.CHECKPOINT}" if s.ADAPTER else s.CHECKPOINT
        run.print(f"merged {what} into {s.MERGED}: no adapters are left in it")


def grow_for(model, tokenizer, folder):
    """The tokenizer that an adapter was trained with; for tokens that the base has not, the model gets rows."""
    own = read_tokenizer(folder)
    if tokenizer is None or own is None or own.vocab_size <= tokenizer.vocab_size:
        return tokenizer
    if not getattr(tokenizer, "special_tokens", {}).items() <= own.special_tokens.items():
        raise ValueError(f"{folder} holds another tokenizer than the base: was the adapter trained on another model?")
    grow_vocabulary(model, tokenizer.vocab_size, own.vocab_size)
    return own


def check_recipe(model, source):
    """Raise ValueError unless `load` would rebuild a model with these very tensors from its config and recipe."""
    with torch.device("meta"):
        rebuilt = catalog.apply(Transformer(model.config), model.recipe)
    ours, theirs = ({name: t.shape for name, t in one.state_dict().items()} for one in (model, rebuilt))
    if ours != theirs:
        steps = ", ".join(name for name, _ in model.recipe)
        raise ValueError(
            f"{source} is a model after {steps}, which no longer holds where adapters are merged: what was written "
            f"could not be loaded. Merge the adapter into the model as it was ({steps} left out), and apply that"
        )


if __name__ == "__main__":
    main()
