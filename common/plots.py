"""Plots in one style: written to PNG files, readable at README width and in grey print."""

import io
from pathlib import Path

MANY = 200  # points of a line, above which it is smoothed
_STYLES = ("-", "--", "-.", ":")
_COLOURS = ("#0b5cad", "#d1495b", "#2e8b57", "#7b4ea3", "#c77d00", "#5a5a5a", "#00838f")


def _figure(title, xlabel, ylabel):
    """An empty figure in the shared style."""
    figure, (axes,) = _panels(1, xlabel, ylabel)
    axes.set_title(title, fontsize=11)
    return figure, axes


def _panels(n, xlabel, ylabel, height=4.2):
    """An empty figure of n panels below each other, on one x axis."""
    import matplotlib  # heavy, and only needed when a plot is drawn

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(n, figsize=(7.2, height), dpi=110, sharex=True, squeeze=False)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(xlabel)
    return figure, list(grid[:, 0])


def _write(figure, path):
    """Save and close a figure, through a temporary file so that a viewer never sees half of it.

    With a palette of 64 colours, enough for lines and bars, a file takes a third of the bytes.
    """
    from matplotlib import pyplot
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.png")
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, metadata={"Software": None})
    pyplot.close(figure)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(temporary, optimize=True)
    temporary.replace(path)
    return path


def curves(path, series, xlabel, ylabel, title, hlines=None, vlines=None, logx=False, logy=False, ylim=None):
    """Draw lines to a PNG; one of more than MANY points is drawn faintly, with its running mean on top.

    Args:
        path: the file to write.
        series: name -> (xs, ys).
        hlines: name -> y of a horizontal reference line (a target, a peer, a limit).
        vlines: name -> x of a vertical one.
        logx, logy: logarithmic axes.
        ylim: (low, high) of the y axis.
    """
    figure, axes = _figure(title, xlabel, ylabel)
    for index, (name, (xs, ys)) in enumerate(series.items()):
        few, colour = len(xs) <= 12, _COLOURS[index % len(_COLOURS)]
        if len(xs) > MANY:
            axes.plot(xs, ys, color=colour, linewidth=0.7, alpha=0.25)
            ys, name = running_mean(ys, len(ys) // 50), f"{name} (running mean)"
        axes.plot(
            xs,
            ys,
            label=name,
            color=colour,
            linestyle=_STYLES[index // 2 % 4],
            linewidth=1.6,
            marker="o" if few else None,
            markersize=4,
        )
    for index, (name, y) in enumerate((hlines or {}).items()):
        axes.axhline(y, color="#5a5a5a", linestyle=_STYLES[3 - index % 3], linewidth=1.1, label=name)
    for index, (name, x) in enumerate((vlines or {}).items()):
        axes.axvline(x, color="#5a5a5a", linestyle=_STYLES[3 - index % 3], linewidth=1.1, label=name)
    if logx:
        axes.set_xscale("log", base=2)
    if logy:
        axes.set_yscale("log")
    if ylim:
        axes.set_ylim(*ylim)
    crowded = len(axes.get_legend_handles_labels()[0]) > 5  # then beside the lines, not over them
    axes.legend(frameon=False, fontsize=9, **({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if crowded else {}))
    return _write(figure, path)


def running_mean(ys, window):
    """Each value's mean with its `window` neighbours on both sides, as far as there are any.

    >>> running_mean([0.0, 3.0, 6.0, 3.0], 1)
    [1.5, 3.0, 4.0, 4.5]
    """
    parts = (ys[max(0, i - window) : i + window + 1] for i in range(len(ys)))
    return [sum(part) / len(part) for part in parts]


def bars(path, labels, groups, ylabel, title):
    """Draw grouped bars to a PNG: `labels` along x, `groups` maps a name to one height per label (None: no bar)."""
    figure, axes = _figure(title, "", ylabel)
    width = 0.8 / max(len(groups), 1)
    for index, (name, heights) in enumerate(groups.items()):
        xs = [i + (index - (len(groups) - 1) / 2) * width for i, height in enumerate(heights) if height is not None]
        ys = [height for height in heights if height is not None]
        drawn = axes.bar(xs, ys, width * 0.92, label=name, color=_COLOURS[index % len(_COLOURS)])
        axes.bar_label(drawn, fmt="%.3g", fontsize=8)
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(y=0.28)  # room for the legend above the bars
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")
    return _write(figure, path)


def timeline(path, panels, xlabel, ylabel, title):
    """Draw who is where when to a PNG: a line a row, a bar a span in its owner's colour, pale but for strong ones.

    Args:
        panels: name -> spans, each (row, start, stop, owner, strong); panels stand below each other on one x axis.
    """
    n_rows = [max((row for row, *_ in spans), default=0) + 1 for spans in panels.values()]
    figure, axes = _panels(len(panels), xlabel, ylabel, height=1.2 + 0.5 * len(panels) + 0.16 * sum(n_rows))
    figure.suptitle(title, fontsize=11)
    for one, (name, spans), n in zip(axes, panels.items(), n_rows):
        one.grid(visible=False)
        for row in range(n):
            one.axhline(row, color="#d0d0d0", linewidth=0.6, zorder=0)
        for row, start, stop, owner, strong in spans:
            colour = _COLOURS[owner % len(_COLOURS)]
            one.barh(row, stop - start, 0.78, start, color=colour if strong else _paler(colour), linewidth=0)
        _number_spans(one, spans)
        one.set_yticks(range(n), [str(row) for row in range(n)], fontsize=7)
        one.set_ylim(n - 0.4, -0.6)
        one.set_title(name, fontsize=9, loc="left")
    axes[0].set_xlim(0, max((stop for spans in panels.values() for _, _, stop, *_ in spans), default=1))
    return _write(figure, path)


def _paler(colour):
    """A colour mixed with white.

    >>> _paler("#0b5cad")
    '#aac6e2'
    """
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(0.35 * part + 0.65 * 255):02x}" for part in parts)


def _number_spans(axes, spans):
    """Write each owner's number where its first long pale span begins, if there is room for it."""
    total = max((stop for _, _, stop, *_ in spans), default=1)
    for row, start, stop, owner, strong in spans:
        if not strong and stop - start > total * 0.012 * (1 + len(str(owner))):
            axes.text(start + total * 0.006, row, str(owner), fontsize=6.5, va="center", color="#202020")
