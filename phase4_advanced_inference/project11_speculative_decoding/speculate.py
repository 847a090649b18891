"""Continue prompts by drafting and checking, and tell what it brought.

uv run python phase4_advanced_inference/project11_speculative_decoding/speculate.py --prompt "The history of"
uv run python phase4_advanced_inference/project11_speculative_decoding/speculate.py --draft checkpoints/small/best.pt
uv run python phase4_advanced_inference/project11_speculative_decoding/speculate.py --rule coupled --temperature 0.8
"""

import time
from dataclasses import replace

import torch

from common.device import synchronize
from common.run import Run
from phase1_foundation.project3_pretrain.loading import load
from phase3_core_inference.project8_kv_cache.generation import Generation, Writer, append
from phase4_advanced_inference.project11_speculative_decoding import config
from phase4_advanced_inference.project11_speculative_decoding.choosing import draft_of
from phase4_advanced_inference.project11_speculative_decoding.speculative import SpeculativeWriter


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__, quiet=True) as run:
        s = run.settings
        dtype = getattr(torch, s.DTYPE)
        model, tokenizer = load(s.CHECKPOINT, run.device, dtype)
        draft = draft_of(s.DRAFT, tokenizer, run.device, dtype, s.GRAPHS)
        options = {"n_rows": len(s.PROMPT), "cache": s.CACHE, "graphs": s.GRAPHS}
        writer = SpeculativeWriter(model, tokenizer, draft, s.DRAFT_TOKENS, s.RULE, **options)
        run.print("writing everything twice, first to warm up ...")
        texts, seconds = write(run, writer, s)
        for number, text in enumerate(texts):
            run.print(f"--- {number + 1} ({text.finish_reason})\n{s.PROMPT[number]}{text.text}")
        report(run, writer, sum(len(text.tokens) for text in texts), seconds)
        if s.COMPARE:
            compare(run, Writer(model, tokenizer, **options), s, texts, seconds)


def write(run, writer, s):
    """(the continuations, the seconds they took), the second time that they are written: the first one warms up."""
    params = config.sampling_params(s)
    if params.seed is None:
        params = replace(params, seed=int(torch.randint(2**31, (1,))))
        s.SEED = params.seed  # whoever is compared with it must draw with the same
    # One seed would deal all prompts the same luck, and they would say similar things.
    many = [replace(params, seed=params.seed + number) for number in range(len(s.PROMPT))]
    for _ in range(2):
        if isinstance(writer, SpeculativeWriter):
            writer.tally.clear()
        texts = [Generation(0) for _ in s.PROMPT]
        synchronize(run.device)
        began = time.perf_counter()
        for piece in writer.stream(s.PROMPT, many):
            append(texts[piece.index], piece)
            if run.stopping:
                raise KeyboardInterrupt
        synchronize(run.device)
        seconds = time.perf_counter() - began
    return texts, seconds


def report(run, writer, n_tokens, seconds):
    """What the drafts were worth."""
    tally = writer.tally
    run.print(
        f"\nacceptance rate {tally.alpha:.2f} ({tally.kept} of {tally.drafted} drafted tokens stayed); "
        f"{tally.tokens_per_step:.2f} tokens a step, by the formula {tally.expected_tokens_per_step:.2f}"
    )
    run.print(f"with the draft    {n_tokens / seconds:8.1f} tokens/s")


def compare(run, writer, s, texts, seconds):
    """The same without a draft."""
    plain, plain_seconds = write(run, writer, s)
    amounts = [sum(len(text.tokens) for text in both) for both in (texts, plain)]
    run.print(f"without           {amounts[1] / plain_seconds:8.1f} tokens/s")
    same = all(a.tokens == b.tokens for a, b in zip(texts, plain))
    faster = amounts[0] / seconds / (amounts[1] / plain_seconds)
    said = "the same text" if same else "another text"
    run.print(f"{faster:.2f} times as fast; {said}")


if __name__ == "__main__":
    main()
