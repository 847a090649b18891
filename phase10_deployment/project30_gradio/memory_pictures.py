"""
Pictures of memory and of guesses

This file implements drawings of blocks, of beginnings that were known, and of guesses, as HTML, following:
- "Efficient Memory Management for Large Language Model Serving with PagedAttention" (Kwon et al., 2023) - figures of
  block tables
- "SGLang: Efficient Execution of Structured Language Model Programs" (Zheng et al., 2023) - known beginnings
- "Fast Inference from Transformers via Speculative Decoding" (Leviathan et al., 2023) - its figure 1: guesses accepted,
  refused and corrected

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

from phase10_deployment.project30_gradio.blocks_now import Row, Snapshot
from phase10_deployment.project30_gradio.guessing import Guess
from phase10_deployment.project30_gradio.pictures import N_COLOURS, figures, shown, spans
from phase10_deployment.project30_gradio.talking import Token


def blocks_picture(now: Snapshot, blocks: Sequence[int]) -> str:
    """Every block with its owners, and the block table of every text that runs.

    PAPER: "Efficient Memory Management for Large Language Model Serving with PagedAttention", arXiv:2309.06180,
        figures 6 to 8.
    PAPER CONTEXT: physical blocks need not lie side by side; one that several sequences map is counted, not copied.
    INTUITION: a cloakroom from above: each hook in the colour of its guest, shared hooks in several colours.
    IMPLEMENTATION: one square for each of `blocks`, coloured by row; below, for each row, its table in order.
    WHY: what is used, shared, kept and free adds up before one's eyes.
    """
    owners, kept = now.owners, set(now.kept)
    alone = sum(block not in owners for block in kept)
    told = [(f"{len(now.rows)}", "texts run" + (f", {now.waiting} wait" if now.waiting else "")),
            (f"{len(owners)}", f"blocks in use, of {now.page} tokens each"), (f"{now.saved}", "saved by sharing"),
            (f"{alone}", "kept for who begins alike"), (f"{now.n_blocks - len(owners) - alone:,}", "free")]  # fmt: skip
    cells = "".join(_cell(block, owners.get(block, []), block in kept) for block in blocks)
    left = now.n_blocks - len(blocks)
    more = f'<p class="pg-small">and {left:,} blocks more</p>' if left else ""
    tables = "".join(_table(row, owners, now.page) for row in now.rows)
    return figures(told) + f'<div class="pg-blocks">{cells}</div>{more}<div class="pg-tables">{tables}</div>' + LEGEND


LEGEND = (
    '<p class="pg-small pg-legend"><span><i class="pg-block pg-b0"></i> a text has it</span><span><i class="pg-block" '
    'style="background:linear-gradient(135deg,var(--pg-b1) 50%,var(--pg-b2) 50%)"></i> several share it</span><span>'
    '<i class="pg-block pg-kept"></i> kept by the tree</span><span><i class="pg-block"></i> free</span></p>'
)


def _cell(block: int, rows: Sequence[int], kept: bool) -> str:
    """One square."""
    if not rows:
        words = "kept by the tree" if kept else "free"
        return f'<span class="pg-block{" pg-kept" if kept else ""}" title="block {block}: {words}"></span>'
    colours = [f"var(--pg-b{row % N_COLOURS})" for row in rows[:4]]
    share = 100 / len(colours)
    stripes = ", ".join(f"{c} {i * share:.0f}% {(i + 1) * share:.0f}%" for i, c in enumerate(colours))
    words = f"row {rows[0]}" if len(rows) == 1 else f"{len(rows)} rows share it"
    number = f"{len(rows)}" if len(rows) > 1 else ""
    return (f'<span class="pg-block pg-used" style="background:linear-gradient(135deg, {stripes})" title="block '
            f'{block}: {words}">{number}</span>')  # fmt: skip


def _table(row: Row, owners: dict[int, list[int]], page: int) -> str:
    """A text and its block table."""
    chips = []
    for place, block in enumerate(row.blocks):
        part = min(max(row.n_tokens - place * page, 0), page) / page
        shared = " pg-shared" if len(owners[block]) > 1 else ""
        chips.append(f'<span class="pg-chip{shared}" title="{part:.0%} full" style="--part:{part:.2f};--own:var(--pg-b'
                     f'{row.row % N_COLOURS})">{block}</span>')  # fmt: skip
    tail, table = shown(row.text[-48:].replace("\n", "↵")), "".join(chips)
    return (f'<div class="pg-table"><span class="pg-block pg-b{row.row % N_COLOURS}"></span><span class="pg-tail">'
            f"<span>{tail}</span></span><span>{row.n_tokens} tokens</span><div>{table}</div></div>")  # fmt: skip


def prefix_picture(sent: Sequence[tuple[Sequence[Token], int]]) -> str:
    """Prompts, the newest first, each with the tokens that were found in the cache and those that had to be read.

    PAPER: "SGLang: Efficient Execution of Structured Language Model Programs", arXiv:2312.07104, section 3.
    PAPER CONTEXT: requests that share a prefix share its keys and values; a radix tree finds the longest known one.
    INTUITION: what is green was read for somebody before, and costs nothing.
    IMPLEMENTATION: the number is the server's (`usage.prompt_tokens_details.cached_tokens`), in whole blocks, and never
        all of a prompt: its last token must be read to know what comes next.
    WHY: it shows why a system prompt belongs to the beginning, and what a changed first word costs.
    """
    parts = []
    for tokens, found in sent:
        kinds = ["pg-found" if i < found else "pg-read" for i in range(len(tokens))]
        share = found / max(len(tokens), 1)
        parts.append(f'<div class="pg-sent"><p><b>{found} of {len(tokens)}</b> tokens found ({share:.0%})</p>'
                     f"{spans(tokens, kinds, ids=False)}</div>")  # fmt: skip
    return "".join(parts)


def guess_picture(prompt: Sequence[Token], guesses: Sequence[Guess], texts: dict[int, str]) -> str:
    """A text with what was guessed of it: kept, refused, and written by the model itself.

    PAPER: "Fast Inference from Transformers via Speculative Decoding", arXiv:2211.17192, figure 1 and section 3.1.
    PAPER CONTEXT: each line of the figure is one run of the model: accepted guesses, the refused one, its correction.
    INTUITION: an essay with the teacher's pencil in it.
    IMPLEMENTATION: each step begins with a bar; what stands behind the first wrong guess was never judged.
    WHY: tokens for each run of the model is what speculation is about, and here they are counted.

    texts: id -> text, for all tokens of the guesses.
    """
    n_tokens, n_drafted = sum(len(g.gained) for g in guesses), sum(len(g.draft) for g in guesses)
    kept, tested = sum(g.kept for g in guesses), sum(min(g.kept + 1, len(g.draft)) for g in guesses)
    told = [(f"{n_tokens}", "tokens written"), (f"{len(guesses)}", "runs of the model"),
            (f"{n_tokens / max(len(guesses), 1):.2f}", "tokens a run"), (f"{kept} of {n_drafted}", "guesses kept"),
            (f"{kept / tested:.0%}" if tested else "–", "accepted of those judged")]  # fmt: skip
    tokens, kinds = list(prompt), ["pg-read"] * len(prompt)
    for each in guesses:
        tokens += [Token(-1, "|"), *(Token(t, texts[t]) for t in (*each.draft, each.own))]
        kinds += ["pg-step", *["pg-kept-guess"] * each.kept]
        kinds += ["pg-refused"] * (len(each.draft) - each.kept) + ["pg-own"]
    return figures(told) + spans(tokens, kinds, ids=False, lines=False) + GUESS_LEGEND


GUESS_LEGEND = (
    '<p class="pg-small"><span class="pg-token pg-kept-guess">guess kept</span> <span class="pg-token pg-refused">'
    'guess refused</span> <span class="pg-token pg-own">written by the model</span></p>'
)
