"""Plots in one style: written to PNG files, readable at README width and in grey print."""

import io
from pathlib import Path

MANY = 200  # points of a line, above which it is smoothed
_STYLES = ("-", "--", "-.", ":")
_COLOURS = ("#0b5cad", "#d1495b", "#2e8b57", "#7b4ea3", "#c77d00", "#5a5a5a", "#00838f")


def _figure(title, xlabel, ylabel):
    """An empty figure in the shared style."""
    import matplotlib  # heavy, and only needed when a plot is drawn

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=110)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


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
