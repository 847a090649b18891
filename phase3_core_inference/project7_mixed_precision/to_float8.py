"""Store the weights of a model's linear layers in float8: a checkpoint that every other script loads.

    uv run python phase3_core_inference/project7_mixed_precision/to_float8.py
    uv run python phase3_core_inference/project7_mixed_precision/to_float8.py --checkpoint HuggingFaceTB/SmolLM-135M

Nothing is trained or calibrated. Afterwards:

    uv run python chat.py --checkpoint checkpoints/project7/float8.pt
"""

import os

from common import catalog
from common.run import Run
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.running import write_plain
from phase3_core_inference.project7_mixed_precision import to_float8_config
from phase3_core_inference.project7_mixed_precision.float8_inference import StoredFloat8Linear


def main(argv=None):
    """Run the script."""
    with Run(to_float8_config, argv, description=__doc__, quiet=True) as run:
        s = run.settings
        source = to_float8_config.source_of(s)
        if source is None:
            raise ValueError(
                "there is no model yet: make one with `uv run python speedrun.py`, or name one by --checkpoint"
            )
        model, tokenizer = load(source)
        if any(isinstance(module, StoredFloat8Linear) for module in model.modules()):
            raise ValueError(f"CHECKPOINT={source} is stored in float8 already: name the model that it was made from")
        plain = sum(2 * p.numel() for p in model.parameters())
        model = catalog.apply(model, [("fp8_weights", {"skip": list(s.SKIP)} if s.SKIP else {})])
        write_plain(model, tokenizer, s.STORED)
        run.print(f"stored {source} in {s.STORED}: a file of {os.path.getsize(s.STORED) / 1e6:.2f} MB; the weights "
                  f"would take {plain / 1e6:.2f} MB if all were bfloat16")  # fmt: skip


if __name__ == "__main__":
    main()
