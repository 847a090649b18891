"""Progress that tells the rate and the remaining time: a bar for chores, an aligned line for training."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def human(number):
    """1234567 -> '1.23M'."""
    for size, letter in _UNITS:
        if abs(number) >= 0.9995 * size:  # 999,900 rounds to 1M, not to 1e+03k
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def clock(seconds):
    """3725 -> '1:02:05', 65 -> '1:05'."""
    seconds = int(max(0, seconds))
    hours, minutes, rest = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def track(iterable, total=None, label="", unit="it", size=lambda item: 1):
    """Iterate with a progress bar on stderr: label, bar, percentage, rate and remaining time.

    Args:
        iterable: what to walk through.
        total: how much there is, in `unit`; by default ``len(iterable)`` where that is known.
        size: how much one item counts, in `unit` (bytes of a document, say).
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), transient=False) as bar:
        task = bar.add_task(label, total=total, rate="")
        start, done = time.perf_counter(), 0
        for item in iterable:
            yield item
            done += size(item)
            rate = done / max(time.perf_counter() - start, 1e-9)
            bar.update(task, completed=done, rate=f"{human(rate)} {unit}/s")


class Reporter:
    """One aligned line per report: step, the fields given, rate, elapsed and remaining time.

    Args:
        total: number of steps of the whole job.
        label: what a step is called.
        unit: what `units` counts (tokens, say).
        every_s: least seconds between two printed lines; the first and the last step always print.
        start: the step that the job begins at (after a resume).
    """

    def __init__(self, total, label="step", unit="tok", every_s=1.0, start=0, echo=print):
        self.total, self.label, self.unit, self.every_s, self.start = total, label, unit, every_s, start
        self.echo = echo
        self.began = self.window = time.perf_counter()
        self.printed_at = self.window_units = self.window_seconds = self.rate = 0.0

    def report(self, done, units=0, seconds=None, force=False, **fields):
        """Tell that `done` steps are finished, `units` more processed since the last call; print if it is time.

        With `seconds`, the rate counts these alone, so that evaluations between two steps do not blur it.
        """
        now = time.perf_counter()
        self.window_units += units
        self.window_seconds += seconds or 0.0
        if not (force or done in (self.start + 1, self.total) or now - self.printed_at >= self.every_s):
            return
        if self.window_units:
            self.rate = self.window_units / max(self.window_seconds or now - self.window, 1e-9)
        pace = (now - self.began) / max(done - self.start, 1)
        width = len(str(self.total))
        shown = "  ".join(f"{key} {_show(value)}" for key, value in fields.items())
        rate = f"  {human(self.rate):>5} {self.unit}/s" if self.rate else ""
        self.echo(
            f"{self.label} {done:>{width}}/{self.total}  {shown}{rate}"
            f"  {clock(now - self.began):>5} elapsed  {clock(pace * (self.total - done)):>5} left",
            flush=True,
        )
        self.printed_at, self.window = now, now
        self.window_units = self.window_seconds = 0.0


def _show(value):
    """A number at a constant width, so that lines stay aligned."""
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-2 else f"{value:.4f}"
    return str(value)
