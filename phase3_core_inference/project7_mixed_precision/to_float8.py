"""Store the weights of a model's linear layers in float8: a checkpoint that every other script loads.

    uv run python phase3_core_inference/project7_mixed_precision/to_float8.py
    uv run python phase3_core_inference/project7_mixed_precision/to_float8.py --checkpoint HuggingFaceTB/SmolLM-135M

Nothing is trained or calibrated. Afterwards:

    uv run python chat.py --checkpoint checkpoints/project7/float8.pt
"""

from common import catalog
from common.run import Run
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.running import write_plain
from phase3_core_inference.project7_mixed_precision import to_float8_config


def main(argv=None):
    """Run the script."""
    with Run(to_float8_config, argv, description=__doc__, quiet=True) as run:
        s = run.settings
        model, tokenizer = load(s.CHECKPOINT)
        plain = sum(2 * p.numel() for p in model.parameters())
        model = catalog.apply(model, [("fp8_weights", {"skip": list(s.SKIP)} if s.SKIP else {})])
        write_plain(model, tokenizer, s.STORED)
        kept = sum((t.element_size() if t.dtype.itemsize == 1 else 2) * t.numel() for t in model.state_dict().values())
        run.print(f"stored {s.CHECKPOINT or 'the newest model'} in {s.STORED}: {kept / 1e6:.2f} MB of weights where "
                  f"bfloat16 takes {plain / 1e6:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
