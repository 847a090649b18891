"""
Pictures

This file implements drawings of what happens inside, as HTML that fits a phone as well as a desk, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2015) - words in pieces
- "Attention Is All You Need" (Vaswani et al., 2017) - figures of who looks at whom
- "The Curious Case of Neural Text Degeneration" (Holtzman et al., 2019) - figures of what is likely, and what is cut

Each component is explained with paper references for educational purposes.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from phase10_deployment.project30_gradio.looking import entropy
from phase10_deployment.project30_gradio.talking import Token

N_COLOURS = 8  # of tokens and of rows, in page.css
MOST_LABELS = 40  # tokens beside a map; more would lie on each other


def shown(text: str) -> str:
    """A text as HTML, in which nothing can be taken for markup or for a template.

    >>> shown("<b>${x}")
    '&lt;b&gt;&#36;&#123;x&#125;'
    """
    for sign in "{}$`":
        text = text.replace(sign, f"\0{ord(sign)};")
    return html.escape(text).replace("\0", "&#")


def visible_text(text: str) -> str:
    """The same with signs for what cannot be seen.

    >>> visible_text("a\\n"), visible_text(" b"), visible_text("")
    ('a↵', '␣b', '∅')
    """
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"


def notice(words: str, kind: str = "info") -> str:
    """A line that says something: kind is info, good or bad."""
    return f'<div class="pg-notice pg-{kind}" role="status">{words}</div>'


def refusal(error: Exception) -> str:
    """What went wrong, in the place of a picture."""
    return notice(shown(str(error)), "bad")


def figures(pairs: Iterable[tuple[str, str]]) -> str:
    """A row of numbers with their names."""
    cells = (f"<div><b>{shown(number)}</b><span>{shown(name)}</span></div>" for number, name in pairs)
    return f'<div class="pg-figures">{"".join(cells)}</div>'


def spans(tokens: Sequence[Token], kinds: Sequence[str], ids: bool = True, lines: bool = True) -> str:
    """Tokens one behind the other, each of a kind that page.css has a colour for."""
    parts = []
    for token, kind in zip(tokens, kinds):
        number = f"<i>{token.id}</i>" if ids else ""
        parts.append(f'<span class="pg-token {kind}" title="token {token.id}">{shown(visible_text(token.text))}{number}'
                     f"</span>")  # fmt: skip
        if lines and "\n" in token.text:
            parts.append("<br>")
    return f'<div class="pg-tokens">{"".join(parts)}</div>'


def tokens_picture(tokens: Sequence[Token], ids: bool = True) -> str:
    """A text in its tokens, each in another colour than its neighbours.

    PAPER: "Neural Machine Translation of Rare Words with Subword Units", arXiv:1508.07909, section 3.2.
    PAPER CONTEXT: frequent words are one symbol, rare ones are put together from pieces.
    INTUITION: the model reads with these scissors; it never sees a letter.
    IMPLEMENTATION: a coloured box for each token with its id; signs stand for spaces and ends of lines.
    WHY: spelling, counting letters and arithmetic are hard where the pieces are not what one thinks they are.
    """
    n_characters = sum(len(token.text) for token in tokens)
    told = [(f"{len(tokens):,}", "tokens"), (f"{n_characters:,}", "characters"),
            (f"{n_characters / max(len(tokens), 1):.2f}", "characters a token"),
            (f"{len({token.id for token in tokens}):,}", "different tokens")]  # fmt: skip
    return figures(told) + spans(tokens, [f"pg-c{i % N_COLOURS}" for i in range(len(tokens))], ids)


def odds_picture(
    names: Sequence[str], before: Sequence[float], after: Sequence[float], whole: bool, n: int = 15
) -> str:
    """The likeliest next tokens: what the model says, and what is drawn from.

    PAPER: "The Curious Case of Neural Text Degeneration", arXiv:1904.09751, section 3.
    PAPER CONTEXT: where the model is sure, few tokens hold nearly all probability; where it is not, thousands share it.
    INTUITION: two bars a token: before and after the house has set its rules; what got no second bar is out.
    IMPLEMENTATION: names with their odds, best first; `whole`: they are the vocabulary, not the likeliest of it.
    WHY: temperature and top-p are felt in texts and understood in bars.
    """
    order = sorted(range(len(before)), key=lambda i: -before[i])
    top, most = order[:n], max(max(before), max(after))
    n_left = sum(p > 0 for p in after)
    of = "of the vocabulary" if whole else f"of the {len(before)} likeliest, which is all that the API tells"
    told = [(f"{entropy(before):.2f} → {entropy(after):.2f}" if whole else f"{entropy(after):.2f}", "bits of surprise"),
            (f"{n_left:,}", f"tokens may be drawn, {of}"),
            (f"{sum(before[i] for i, p in enumerate(after) if p == 0):.1%}", "of the odds are cut off")]  # fmt: skip
    rows = []
    for i in top:
        out = " pg-out" if after[i] == 0 else ""
        rows.append(
            f'<div class="pg-odds{out}"><code>{shown(visible_text(names[i]))}</code><div>'
            f'<div class="pg-bar pg-before" style="width:{100 * before[i] / most:.2f}%"></div>'
            f'<div class="pg-bar pg-after" style="width:{100 * after[i] / most:.2f}%"></div></div>'
            f"<span>{before[i]:.1%}</span><b>{after[i]:.1%}</b></div>"
        )
    head = ('<div class="pg-odds pg-head"><code>token</code><div><em class="pg-before"></em> model '
            '<em class="pg-after"></em> drawn</div><span>model</span><b>drawn</b></div>')  # fmt: skip
    return figures(told) + f'<div class="pg-chart">{head}{"".join(rows)}</div>'


def attention_picture(tokens: Sequence[Token], weights: Sequence[Sequence[float]]) -> str:
    """Who looks at whom in one head: a row for each token that looks, a column for each that is looked at.

    PAPER: "Attention Is All You Need", arXiv:1706.03762, section 3.2.1, and figures 3 to 5.
    PAPER CONTEXT: the weights on the values are softmax(Q K^T / sqrt(d_k)).
    INTUITION: read a row from left to right: where it is dark, that token is looked at.
    IMPLEMENTATION: a square for each pair, as dark as the weight, which it tells under the pointer. Above the diagonal
        there is nothing, as no token sees what comes later.
    WHY: patterns that many heads share (the token before, the first one, equal ones) are seen at a glance.
    """
    T, cell, labels = len(tokens), 18, len(tokens) <= MOST_LABELS
    words = [shown(visible_text(token.text))[:64] for token in tokens]
    margin = 12 + 7.5 * min(max(len(visible_text(token.text)) for token in tokens), 12) if labels else 4
    size = margin + T * cell + 4
    parts = [f'<svg class="pg-map" viewBox="0 0 {size:.0f} {size:.0f}" style="max-width:{min(size * 1.3, 620):.0f}px" '
             f'role="img" aria-label="attention map">']  # fmt: skip
    for i in range(T):
        for j in range(i + 1):
            at = (f'x="{margin + j * cell:.0f}" y="{margin + i * cell:.0f}" width="{cell - 1}" height="{cell - 1}" '
                  f'rx="2"')  # fmt: skip
            parts.append(f'<rect {at} class="pg-cell"/><rect {at} class="pg-weight" style="opacity:{weights[i][j]:.3f}'
                         f'"><title>{words[i]} looks at {words[j]}: {weights[i][j]:.1%}</title></rect>')  # fmt: skip
    for i in range(T if labels else 0):
        place = margin + i * cell + cell * 0.7
        parts.append(f'<text x="{margin - 6:.0f}" y="{place:.1f}" text-anchor="end">{words[i]}</text>')
        parts.append(f'<text transform="translate({place:.1f} {margin - 6:.0f}) rotate(-90)">{words[i]}</text>')
    return "".join([*parts, "</svg>"])


def heads_picture(maps: Sequence[Sequence[Sequence[float]]], chosen: int) -> str:
    """The maps of all heads of a layer, small, side by side; the chosen one is marked."""
    cells = [f'<figure class="{"pg-chosen" if i == chosen else ""}"><img alt="head {i}" src="{png(each)}">'
             f"<figcaption>{i}</figcaption></figure>" for i, each in enumerate(maps)]  # fmt: skip
    return f'<div class="pg-heads">{"".join(cells)}</div>'


def png(weights: Sequence[Sequence[float]]) -> str:
    """A square of numbers from 0 to 1 as the address of a small picture, white to blue."""
    from PIL import Image

    T = len(weights)
    white, blue = (246, 248, 251), (29, 78, 216)
    shades = [tuple(round(a + (b - a) * min(w, 1.0) ** 0.7) for a, b in zip(white, blue)) for r in weights for w in r]
    image = Image.new("RGB", (T, T))
    image.putdata(shades)
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
