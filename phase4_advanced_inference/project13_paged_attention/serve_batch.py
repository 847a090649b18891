"""Continue many prompts at once over a cache of blocks, and tell what happened to the blocks.

uv run python phase4_advanced_inference/project13_paged_attention/serve_batch.py
uv run python phase4_advanced_inference/project13_paged_attention/serve_batch.py --compare
uv run python phase4_advanced_inference/project13_paged_attention/serve_batch.py --show_blocks 3 --rows 3
uv run python phase4_advanced_inference/project13_paged_attention/serve_batch.py --memory_mib 2 --swap_mib 8
uv run python phase4_advanced_inference/project13_paged_attention/serve_batch.py --draft_tokens 4 --temperature 0
"""

import re
import time
from dataclasses import replace
from pathlib import Path

import torch

from common.device import synchronize
from common.progress import Reporter
from common.run import Run
from phase1_foundation.project3_pretrain.loading import load
from phase3_core_inference.project8_kv_cache.generation import Generation, Writer, append
from phase3_core_inference.project8_kv_cache.stores import bytes_per_token
from phase4_advanced_inference.project11_speculative_decoding.choosing import draft_of
from phase4_advanced_inference.project11_speculative_decoding.speculation import Speculation
from phase4_advanced_inference.project13_paged_attention import config
from phase4_advanced_inference.project13_paged_attention.block_picture import LEGEND, draw_blocks
from phase4_advanced_inference.project13_paged_attention.runner import Runner


def main(argv=None):
    """Run the script."""
    with Run(config, argv, description=__doc__, quiet=True) as run:
        s = run.settings
        model, tokenizer = load(s.CHECKPOINT, run.device, getattr(torch, s.DTYPE))
        shown, prompts = prompts_of(s, tokenizer)
        runner = runner_of(run, model, tokenizer, prompts)
        params = params_of(s, len(prompts))
        run.print(f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens; "
                  f"{runner.n_rows} rows, {runner.cache.allocator.n_blocks} blocks of {s.PAGE} tokens, "
                  f"{runner.cache.nbytes / 2**20:.1f} MiB")  # fmt: skip
        texts, seconds, seen = serve(run, runner, prompts, params)
        tell_texts(run, shown, texts)
        summarize(run, runner, texts, seconds, seen)
        if s.COMPARE and not run.stopping:
            compare(run, runner, prompts, params, texts, seconds)


# -- prompts


def prompts_of(s, tokenizer) -> tuple[list[str], list[list[int]]]:
    """The prompts as they are shown, and as tokens."""
    if s.PROMPT or s.PROMPTS_FILE:
        shown = s.PROMPT or lines_of(s.PROMPTS_FILE)
        return shown, [list(tokenizer.encode(text)) or [getattr(tokenizer, "eot_id", None) or 0] for text in shown]
    header = list(tokenizer.encode(s.HEADER))
    cut = [list(tokenizer.encode(text)[: s.PASSAGE_TOKENS]) for text in passages_of(s)]
    return [tokenizer.decode(tokens) for tokens in cut], [header + tokens for tokens in cut]


def read(name, path) -> str:
    """A text file that a setting names; raises ValueError if it is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}={path} cannot be read as text: {error}") from error


def lines_of(path) -> list[str]:
    """The lines of a file that are not empty."""
    lines = [line for line in read("PROMPTS_FILE", path).splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"PROMPTS_FILE={path} holds no prompt: write one on each line")
    return lines


def passages_of(s) -> list[str]:
    """Passages between empty lines, from everywhere in the document."""
    passages = [text for text in re.split(r"\n\s*\n", read("DOCUMENT", s.DOCUMENT)) if text.strip()]
    if len(passages) < s.PASSAGES:
        raise ValueError(f"PASSAGES={s.PASSAGES} are more than the {len(passages)} of DOCUMENT={s.DOCUMENT}: cut fewer")
    return [passages[i * len(passages) // s.PASSAGES] for i in range(s.PASSAGES)]


def params_of(s, n):
    """Sampling parameters for so many texts."""
    params = config.sampling_params(s)
    seed = int(torch.randint(2**31, (1,))) if params.seed is None else params.seed
    # One seed would deal all prompts the same luck, and they would say similar things.
    return [replace(params, seed=seed + number) for number in range(n)]


# -- the engine


def runner_of(run, model, tokenizer, prompts) -> Runner:
    """The engine, with rows for the longest of these prompts and its continuation."""
    s, longest, block_size = run.settings, max(map(len, prompts)), model.config.block_size
    if longest >= block_size:
        raise ValueError(f"a prompt of {longest} tokens has no room to go on: the model's block_size={block_size}: "
                         f"shorten it, or HEADER, or PASSAGE_TOKENS={s.PASSAGE_TOKENS}")  # fmt: skip
    wanted, n_rows = min(longest + s.MAX_NEW_TOKENS, block_size), min(s.ROWS, len(prompts))
    block = bytes_per_token(model.specs, next(model.parameters()).dtype) * s.PAGE
    memory = n_rows * -(-wanted // s.PAGE) * block if s.MEMORY_MIB is None else int(s.MEMORY_MIB * 2**20)
    if (holds := memory // block * s.PAGE) <= longest:
        raise ValueError(f"MEMORY_MIB={s.MEMORY_MIB} holds {holds} tokens, and a prompt has {longest}: give at least "
                         f"{(longest // s.PAGE + 1) * block / 2**20:g}")  # fmt: skip
    if holds < wanted:
        run.print(f"MEMORY_MIB={s.MEMORY_MIB} holds {holds} tokens: texts end there, which might have {wanted}")
    speculation = None
    if s.DRAFT_TOKENS:
        draft = draft_of(s.DRAFT, tokenizer, run.device, getattr(torch, s.DTYPE), s.GRAPHS)
        speculation = Speculation(draft, s.DRAFT_TOKENS, s.RULE, s.GRAPHS)
    runner = Runner(model, tokenizer, n_rows, wanted, memory, s.PAGE, s.SHARE, int(s.SWAP_MIB * 2**20), speculation,
                    s.AHEAD, max_tokens=s.STEP_TOKENS, graphs=s.GRAPHS)  # fmt: skip
    if s.GRAPHS:
        runner.warm_up()
    return runner


def serve(run, runner, prompts, params):
    """(the continuations, the seconds they took, the blocks in use and how empty they are after each step)."""
    s, seen = run.settings, []
    requests = [runner.add(tokens, each) for tokens, each in zip(prompts, params)]
    texts = {request.index: Generation(request.n_prompt) for request in requests}
    most = sum(request.limit - request.n_prompt for request in requests)
    reporter = Reporter(most, "tokens", every_s=float("inf"), echo=run.print)
    synchronize(run.device)
    began = time.perf_counter()
    while runner.busy and not run.stopping:
        pieces = runner.step()
        for piece in pieces:
            append(texts[piece.index], piece)
        used = runner.cache.allocator.n_blocks - runner.blocks.available
        seen.append((used, runner.cache.waste))
        report(reporter, runner, texts.values(), pieces, len(seen), used, s.EVERY)
        if len(seen) <= s.SHOW_BLOCKS:
            show_blocks(run, runner, len(seen))
    synchronize(run.device)
    return list(texts.values()), time.perf_counter() - began, seen


def report(reporter, runner, texts, pieces, n_steps, used, every):
    """A line of progress: now and then, and after the last step."""
    free = runner.cache.allocator.n_free
    reporter.report(
        sum(len(text.tokens) for text in texts), sum(piece.token is not None for piece in pieces),
        force=n_steps % every == 0 or not runner.busy, step=f"{n_steps:<3}",
        running=f"{len(runner.scheduler.running):<2}", waiting=f"{runner.scheduler.n_waiting:<2}", blocks=f"{used:<3}",
        kept=f"{runner.blocks.available - free:<3}", free=f"{free:<3}",
    )  # fmt: skip


def show_blocks(run, runner, n_steps):
    """Draw who has which block after a step."""
    running = {r.row: f"text {r.index + 1}" for r in runner.scheduler.running}
    if n_steps == 1:
        run.print(LEGEND)
    run.print(f"-- after step {n_steps}\n{draw_blocks(runner.cache, running)}\n")


# -- what came of it


def tell_texts(run, shown, texts):
    """Every prompt with its continuation."""
    for number, (prompt, text) in enumerate(zip(shown, texts)):
        run.print(f"--- {number + 1} ({text.finish_reason or 'interrupted'})\n{prompt}{text.text}")


def summarize(run, runner, texts, seconds, seen):
    """Speed, memory, and what was shared, preempted and guessed."""
    n_tokens, blocks, cache = sum(len(text.tokens) for text in texts), runner.blocks, runner.cache
    most, waste = max((used for used, _ in seen), default=0), sum(part for _, part in seen) / max(len(seen), 1)
    reserved = runner.n_rows * -(-runner.room // cache.page)
    run.print(f"\n{n_tokens} tokens in {len(seen)} steps and {seconds:.2f} s: {n_tokens / seconds:.1f} tokens/s")
    run.print(f"blocks in use: {most} at most ({most * cache.block_bytes / 2**20:.1f} MiB), {waste:.1%} of their "
              f"places empty on average; rows reserved for the longest text: {reserved}")  # fmt: skip
    if blocks.tree is not None:
        found = blocks.tree.statistics
        run.print(f"found in the tree: {found.found:,} of {found.asked:,} tokens that were looked up "
                  f"({found.hit_rate:.1%})")  # fmt: skip
    n_preempted = runner.scheduler.n_preempted
    run.print(f"preempted: {n_preempted} times ({n_preempted - blocks.n_swapped} to be read anew, {blocks.n_swapped} "
              f"swapped to the host)")  # fmt: skip
    if runner.speculation is not None:
        tally = runner.speculation.tally
        run.print(f"drafts: {tally.kept} of {tally.drafted} tokens stayed, acceptance rate {tally.alpha:.2f}; "
                  f"{tally.tokens_per_step:.2f} tokens a step and text")  # fmt: skip


def compare(run, runner, prompts, params, texts, seconds):
    """The same texts by project 8: one after the other, and in batches that stay together to their end."""
    s, rate = run.settings, sum(len(text.tokens) for text in texts) / seconds
    for name, n_rows in {"one by one": 1, f"in batches of {runner.n_rows}": runner.n_rows}.items():
        writer = Writer(runner.model, runner.tokenizer, n_rows, runner.room, chunk=s.STEP_TOKENS, graphs=s.GRAPHS)
        if s.GRAPHS:
            list(writer.stream(prompts[:n_rows], [replace(each, max_new_tokens=2) for each in params[:n_rows]]))
        others = [Generation(len(tokens)) for tokens in prompts]
        synchronize(run.device)
        began = time.perf_counter()
        for piece in writer.stream(prompts, params):
            append(others[piece.index], piece)
            if run.stopping:
                return
        synchronize(run.device)
        theirs = sum(len(text.tokens) for text in others) / (time.perf_counter() - began)
        same = sum(a.tokens == b.tokens for a, b in zip(texts, others))
        said = "the same texts" if same == len(texts) else f"{same} of {len(texts)} texts are the same"
        run.print(f"project 8, {name:<15} {theirs:8.1f} tokens/s: this was {rate / theirs:.2f} times as fast; {said}")


if __name__ == "__main__":
    main()
