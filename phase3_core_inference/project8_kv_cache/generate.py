"""Continue prompts with any model, through a KV cache.

uv run python phase3_core_inference/project8_kv_cache/generate.py --prompt "The capital of France"
uv run python phase3_core_inference/project8_kv_cache/generate.py --prompt "Once" "In 1914" "My cat" --seed 1
uv run python phase3_core_inference/project8_kv_cache/generate.py --interactive --stop "\\n"
uv run python phase3_core_inference/project8_kv_cache/generate.py --compare
"""

import time
from dataclasses import replace

import torch

from common.device import synchronize
from common.run import Run, ask
from phase1_foundation.project1_minimal_gpt.sampling import stream as stream_uncached
from phase1_foundation.project3_pretrain.loading import load
from phase1_foundation.project3_pretrain.writing import KnownTokens
from phase3_core_inference.project8_kv_cache import config
from phase3_core_inference.project8_kv_cache.generation import Generation, SamplingParams, Writer, append
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__, quiet=True) as run:
        s = run.settings
        model, tokenizer = load(s.CHECKPOINT, run.device, getattr(torch, s.DTYPE))
        params = SamplingParams(
            max_new_tokens=s.MAX_NEW_TOKENS,
            temperature=s.TEMPERATURE,
            top_k=s.TOP_K,
            top_p=s.TOP_P,
            min_p=s.MIN_P,
            repetition_penalty=s.REPETITION_PENALTY,
            presence_penalty=s.PRESENCE_PENALTY,
            frequency_penalty=s.FREQUENCY_PENALTY,
            stop=tuple(text.replace("\\n", "\n") for text in s.STOP),
            seed=s.SEED,
        )
        n_rows = 1 if s.INTERACTIVE or s.COMPARE else len(s.PROMPT)
        writer = Writer(model, tokenizer, n_rows, s.CAPACITY, s.CACHE, s.CHUNK, s.COMPILE, s.GRAPHS)
        if s.INTERACTIVE:
            converse(run, writer, params)
        elif s.COMPARE:
            for prompt in s.PROMPT:
                compare(run, writer, params, prompt)
        else:
            write(run, writer, params, s.PROMPT)


def write(run, writer, params, prompts):
    """Print one prompt and its continuation as it comes, or several when all are done; Ctrl-C ends them."""
    began, n_tokens, texts = time.perf_counter(), 0, [Generation(0, prompt) for prompt in prompts]
    if len(prompts) == 1:
        run.print(prompts[0], end="")
    # One seed would deal all prompts the same luck, and they would say similar things.
    seeds = [None if params.seed is None else params.seed + number for number in range(len(prompts))]
    for piece in writer.stream(prompts, [replace(params, seed=seed) for seed in seeds]):
        append(texts[piece.index], piece)
        n_tokens += piece.token is not None
        if len(prompts) == 1:
            run.print(piece.text, end="")
        if run.stopping:
            break
    seconds = time.perf_counter() - began
    for number, text in enumerate(texts if len(prompts) > 1 else []):
        run.print(f"--- {number + 1} ({text.finish_reason or 'interrupted'})\n{text.text}")
    run.print(f"\n[{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} tokens/s, prefill included]")


def converse(run, writer, params):
    """Continue what is typed, line after line; an empty line, Ctrl-D or Ctrl-C leaves."""
    run.print("Type the beginning of a text; an empty line ends.")
    while not run.stopping and (prompt := ask("> ")):
        try:
            write(run, writer, params, [prompt])
        except ValueError as error:  # a prompt that does not fit must not end the conversation
            run.print(f"error: {error}")


def compare(run, writer, params, prompt):
    """The likeliest continuation with the cache and without, timed, and whether both are the same."""
    tokens = writer.encode(prompt)
    greedy = SamplingParams(temperature=0.0, stop_ids=())
    n_new = min(params.max_new_tokens, writer.room - len(tokens))
    known = KnownTokens(writer.model, writer.tokenizer.vocab_size)
    ways = {
        "with the cache": lambda n: [p.token for p in writer.stream([tokens], [replace(greedy, max_new_tokens=n)])],
        "without": lambda n: list(stream_uncached(known, tokens, n, temperature=0.0)),
    }
    results, seconds = {}, {}
    for name, way in ways.items():
        way(n_new)  # compiles, records and warms up
        synchronize(run.device)
        began = time.perf_counter()
        results[name] = way(n_new)
        seconds[name] = time.perf_counter() - began
        run.print(f"{name:<15} {n_new / seconds[name]:8.1f} tokens/s   {seconds[name] / n_new * 1e3:8.2f} ms a token")
    ours, theirs = results.values()
    differ = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    size = bytes_per_token(writer.model.specs, next(writer.model.parameters()).dtype)
    faster, same = seconds["without"] / seconds["with the cache"], "the same tokens"
    run.print(f"{faster:.1f} times as fast after a prompt of {len(tokens)} tokens; {size:,} bytes a token; "
              f"{same if differ is None else f'other tokens from {differ} on'}")  # fmt: skip
    run.print(prompt + writer.tokenizer.decode(ours))


if __name__ == "__main__":
    main()
