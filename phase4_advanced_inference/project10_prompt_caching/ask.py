"""Put questions behind one long text: it is read for the first of them, and remembered for the others.

uv run python phase4_advanced_inference/project10_prompt_caching/ask.py
uv run python phase4_advanced_inference/project10_prompt_caching/ask.py --compare
uv run python phase4_advanced_inference/project10_prompt_caching/ask.py --prefixes data/prefixes
uv run python phase4_advanced_inference/project10_prompt_caching/ask.py --document README.md --question "# " "uv run "
"""

import time
from pathlib import Path

import torch

from common.device import synchronize
from common.run import Run
from phase1_foundation.project3_pretrain.loading import load
from phase3_core_inference.project8_kv_cache.generation import SamplingParams, Writer
from phase4_advanced_inference.project10_prompt_caching import config
from phase4_advanced_inference.project10_prompt_caching.prompt_cache import PromptCache


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__, quiet=True) as run:
        s = run.settings
        model, tokenizer = load(s.CHECKPOINT, run.device, getattr(torch, s.DTYPE))
        prompts = prompts_of(s, model, tokenizer)
        params = SamplingParams(s.MAX_NEW_TOKENS, s.TEMPERATURE, seed=s.SEED, stop_ids=())
        prefixes = PromptCache(int(s.BUDGET_MIB * 2**20))
        if s.PREFIXES and Path(s.PREFIXES).is_dir():
            run.print(f"{s.PREFIXES}: {prefixes.load(s.PREFIXES, model):,} tokens are known")
        writer = Writer(model, tokenizer, 1, None, s.CACHE, s.CHUNK, graphs=s.GRAPHS, prefixes=prefixes)
        plain = Writer(model, tokenizer, 1, None, s.CACHE, s.CHUNK, graphs=s.GRAPHS) if s.COMPARE else None
        for question, prompt in zip(s.QUESTION, prompts):
            if not run.stopping:
                answer(run, writer, plain, params, question, prompt)
        counts = prefixes.statistics
        run.print(f"{counts.found:,} of {counts.asked:,} tokens were known ({counts.hit_rate:.1%}); "
                  f"{prefixes.tree.n_tokens:,} are remembered, in {prefixes.tree.nbytes / 2**20:.1f} MiB")  # fmt: skip
        if s.PREFIXES:
            run.print(f"wrote {prefixes.save(s.PREFIXES, model)} files to {s.PREFIXES}")


def prompts_of(s, model, tokenizer) -> list[list[int]]:
    """The text, as much of it as there is room for, with each question behind it."""
    try:
        document = tokenizer.encode(Path(s.DOCUMENT).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"DOCUMENT={s.DOCUMENT} cannot be read as text: {error}") from error
    questions = [tokenizer.encode(f"\n\n{question}") for question in s.QUESTION]
    room = model.config.block_size - s.MAX_NEW_TOKENS - max(map(len, questions))
    if room < 1:
        raise ValueError(f"MAX_NEW_TOKENS={s.MAX_NEW_TOKENS} and the longest question leave no room for a text in the "
                         f"model's block_size={model.config.block_size}: ask for less")  # fmt: skip
    document = list(document[: min(room, s.DOCUMENT_TOKENS or room)])
    return [document + list(question) for question in questions]


def answer(run, writer, plain, params, question, prompt):
    """Continue one prompt; say how much of it was known and how long the first token took."""
    known = writer.prefixes.statistics.found
    text, first = timed(run, writer, params, prompt)
    known = writer.prefixes.statistics.found - known
    without = ""
    if plain:
        other, slower = timed(run, plain, params, prompt)
        without = f"; without reuse {slower * 1e3:.1f} ms, {'the same' if other == text else 'another'} text"
    run.print(
        f"{question!r}: {known:,} of {len(prompt):,} tokens known, first token after {first * 1e3:.1f} ms{without}"
    )
    run.print(f"    {question}{text!r}")


def timed(run, writer, params, prompt) -> tuple[str, float]:
    """The continuation, and the seconds until its first token."""
    synchronize(run.device)
    began, first, texts = time.perf_counter(), None, []
    for piece in writer.stream([prompt], [params]):
        first = first or time.perf_counter() - began
        if run.stopping:
            break
        texts.append(piece.text)
    return "".join(texts), first


if __name__ == "__main__":
    main()
