"""Benchmarks that can be trusted: interleaved timing, peers in the same run, results kept in one format.

A project's ``benchmark.py`` fills a `Report`: for every row the paper's claim, our figure, a peer's figure measured in
the same run, and the physical limit. `Report.finish` prints the table, writes ``results/<project>.<device>.json`` and
refreshes the table between the markers in the project's README. ``uv run python -m common.benchmark`` gathers all
files into ``RESULTS.md``; ``--check`` fails where a README is out of date.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from common import RESULTS, ROOT
from common.checkpoint import atomic_write
from common.device import device_name, device_slug, pick_device, synchronize
from common.progress import clock

START, END = "<!-- results:start -->", "<!-- results:end -->"


@dataclass(frozen=True)
class Timing:
    """Seconds of one function over several repeats: median, fastest, slowest, and how many."""

    median: float
    low: float
    high: float
    n: int

    def rate(self, amount):
        """(median, low, high) of `amount` per second."""
        return amount / self.median, amount / self.high, amount / self.low


def measure(functions, repeats=5, warmup=1, device="cpu", before=None):
    """Time several functions fairly: in turn (A B C, A B C, ...), so that drift of the machine hits all alike.

    Args:
        functions: name -> function without arguments; it must do all of its work each time.
        repeats: counted rounds.
        warmup: rounds before that (compilation, caches).
        device: the device to wait for before each reading of the clock.
        before: called before each timed call, outside the clock (to flush a cache, say).

    Returns:
        name -> `Timing`, in seconds.
    """
    times = {name: [] for name in functions}
    for round_number in range(warmup + repeats):
        for name, function in functions.items():
            if before:
                before()
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if round_number >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(t), min(t), max(t), len(t)) for name, t in times.items()}


def measure_recorded(functions, repeats=5, calls=8, before=None, device="cuda"):
    """Time functions on a GPU's own clock, in turn: launching from Python then costs nothing, however short they are.

    Args:
        functions: name -> function without arguments that can be recorded into a CUDA graph (`common.graphs`). An
            autograd backward must have its forward inside, or have it run at the first call, on the graph's stream.
        repeats: counted rounds.
        calls: of a function in one graph.
        before: called before each timed replay (to flush a cache, say).
        device: elsewhere than on a GPU this is `measure`.

    Returns:
        name -> `Timing` of one call, in seconds.
    """
    if torch.device(device).type != "cuda":
        return measure(functions, repeats, 1, device, before)
    graphs = {name: _recorded(function, calls) for name, function in functions.items()}
    times = {name: [] for name in graphs}
    for round_number in range(1 + repeats):
        for name, graph in graphs.items():
            if before:
                before()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if round_number:
                times[name].append(start.elapsed_time(end) / 1e3 / calls)
    return {name: Timing(statistics.median(t), min(t), max(t), len(t)) for name, t in times.items()}


def _recorded(function, calls):
    """So many calls in one CUDA graph, compiled and tuned before, on the graph's stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    return graph


class Report:
    """The result of one project's benchmark on one device.

    Args:
        project: the folder's name, ``project2_tokenizer``.
        title: one line above the table.
        device: where it ran; by default the best device present.
        folder: where results go; by default ``results/``.
        keep: rows, checks and curves of the standing file that this run does not measure stay, with their date.
        host: the work is the processor's, whatever device there is; the file is still named after the machine's device.

    Each row is printed as soon as it is measured and kept in a hidden ``.partial`` file until `finish`, so that a long
    benchmark that is cut short has not been in vain.
    """

    def __init__(self, project, title, device=None, folder=None, keep=False, host=False):
        self.project, self.title, self.device, self.host = project, title, device or pick_device(), host
        self.folder, self.slug, self.keep = Path(folder or RESULTS), device_slug(self.device), keep
        self.path = self.folder / f"{project}.{self.slug}.json"
        self.partial = self.path.with_name(f".{self.path.name}.partial")
        self.rows, self.checks, self.curves, self.began = [], [], {}, time.perf_counter()

    def row(
        self,
        name,
        ours,
        unit,
        *,
        claim=None,
        peer=None,
        peer_name=None,
        limit=None,
        limit_name=None,
        higher_is_better=True,
        spread=None,
        note="",
    ):
        """Add a measured row.

        Args:
            name: what was measured.
            ours, peer, limit: figures in `unit`; a peer is measured in the same run, a limit is arithmetic.
            claim: what the paper says, with its table or figure, as text.
            spread: (low, high) of our figure over the repeats.
            higher_is_better: how the ratios read: above 1 is always in our favour.
        """
        self._add(self.rows, {
            "name": name, "claim": claim, "ours": ours, "unit": unit, "spread": spread and list(spread), "peer": peer,
            "peer_name": peer_name, "limit": limit, "limit_name": limit_name,
            "vs_peer": _ratio(ours, peer, higher_is_better), "of_limit": _ratio(ours, limit, higher_is_better),
            "note": note, "date": datetime.date.today().isoformat(),
        })  # fmt: skip

    def skip(self, name, why):
        """Add a row that could not be measured here, with the reason."""
        self._add(self.rows, {"name": name, "skipped": why})

    def check(self, name, ok, detail=""):
        """Record a correctness check of the same run; one that failed makes `finish` exit with status 1."""
        self._add(self.checks, {"name": name, "ok": bool(ok), "detail": detail})

    def series(self, name, xs, ys):
        """Keep a curve with the result."""
        self.curves[name] = {"x": list(xs), "y": list(ys)}

    def _add(self, entries, entry):
        """Keep a row or a check, say it, and save what there is so far."""
        entries.append(entry)
        said = entry["detail"] if "ok" in entry else " | ".join(cell for cell in _cells(entry)[1:] if cell not in "—")
        print(f"[{clock(time.perf_counter() - self.began)}] {entry['name']}: {said}".replace("**", ""), flush=True)
        atomic_write(self.partial, _as_json(self._result()))

    def _where(self):
        """What was measured on, for people."""
        name = device_name(self.device)
        if not self.host or name == device_name("cpu"):
            return name
        return f"{device_name('cpu')}, host of {name}"

    def _result(self):
        """The contents of the results file."""
        result = {
            "project": self.project,
            "title": self.title,
            "device": self._where(),
            "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "rows": self.rows,
            "checks": self.checks,
            "series": self.curves,
        }
        if self.keep and self.path.exists():
            old = json.loads(self.path.read_text(encoding="utf-8"))
            result["checks"] = _renewed(old["checks"], self.checks)
            # a check that was skipped stands among the rows until it is made
            checked = {check["name"] for check in result["checks"]}
            rows = [row for row in old["rows"] if not ("skipped" in row and row["name"] in checked)]
            result["rows"] = _renewed(rows, self.rows, old["date"])
            result["series"] = old["series"] | self.curves
        return result

    def finish(self):
        """Print the table, write the results file, refresh the README; exit 1 if a check failed."""
        result = self._result()
        print(f"\n{self.title}: {result['device']}\n")
        print("\n".join(_table(result, plain=True)))
        for check in result["checks"]:
            print(f"{'ok  ' if check['ok'] else 'FAIL'}  {check['name']}  {check['detail']}".rstrip())
        atomic_write(self.path, _as_json(result))
        self.partial.unlink(missing_ok=True)
        print(f"\nwrote {self.path}")
        if self.folder == RESULTS:
            refresh_readme(self.project)
        if not all(check["ok"] for check in self.checks):
            raise SystemExit(1)


def run_parts(report, parts, between=None):
    """Run the parts of a benchmark in turn and finish its report; one that fails leaves the others alone.

    Args:
        parts: name -> function without arguments.
        between: called after each of them, to free what it left in memory.

    Raises:
        ValueError: naming the parts that failed and why, after what the others measured is written.
    """
    failed = {}
    for name, part in parts.items():
        try:
            part()
        except Exception as error:
            traceback.print_exc()
            failed[name] = str(error)  # the error itself would keep its tensors alive
        if between:
            between()
    try:
        report.finish()
    finally:
        if failed:
            raise ValueError("; ".join(f"the part {name} failed: {error}" for name, error in failed.items()))


def _as_json(result):
    """The text of a results file."""
    return json.dumps(result, indent=1, ensure_ascii=False, default=float) + "\n"


def _renewed(old, new, date=None):
    """Old rows or checks, those of the same name replaced in place by new ones, and what is new behind them.

    A row that was skipped this time does not replace a measured one; `date` is when the old ones were measured.
    """
    fresh = {entry["name"]: entry for entry in new}
    entries = []
    for entry in old:
        renewed = fresh.pop(entry["name"], None)
        stays = renewed is None or ("skipped" in renewed and "skipped" not in entry)
        entries.append(({"date": date} if date else {}) | entry if stays else renewed)
    return entries + list(fresh.values())


def _ratio(ours, other, higher_is_better):
    """How much better ours is: above 1 in our favour."""
    if ours is None or not other or not ours:
        return None
    return ours / other if higher_is_better else other / ours


def _number(value):
    """Four significant digits at most, thousands grouped."""
    if value is None:
        return "—"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cells(row):
    """The text cells of one row: name, claim, ours, peer, limit, ratios."""
    if "skipped" in row:
        return [row["name"], "", "not measured: " + row["skipped"], "", "", "", ""]
    spread = f" ({_number(row['spread'][0])}–{_number(row['spread'][1])})" if row.get("spread") else ""
    peer = f"{_number(row['peer'])} ({row['peer_name']})" if row["peer"] is not None else row["peer_name"] or "—"
    limit = f"{_number(row['limit'])} ({row['limit_name']})" if row["limit"] is not None else "—"
    ratios = [f"{row[key]:.2f}×" if row[key] is not None else "—" for key in ("vs_peer", "of_limit")]
    return [row["name"], row["claim"] or "—", f"**{_number(row['ours'])}** {row['unit']}{spread}", peer, limit, *ratios]


def _note(row, date):
    """What a row has to say below the table: its note, and its date where that is not the table's."""
    older = row.get("date", date) != date and "skipped" not in row
    return "; ".join(part for part in (row.get("note"), f"measured on {row['date']}" if older else "") if part)


def _table(result, plain=False):
    """The lines of the table: Markdown, or aligned for the terminal."""
    head = ["what", "paper's claim", "ours", "peer, same run", "limit", "vs peer", "of limit"]
    cells = [head, *(_cells(row) for row in result["rows"])]
    if plain:
        cells = [[cell.replace("**", "") for cell in row] for row in cells]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    lines.insert(1, "|" + " --- |" * len(head))
    notes = [f"- {row['name']}: {note}" for row in result["rows"] if (note := _note(row, result.get("date")))]
    return lines + (["", *notes] if notes else [])


def _results(project):
    """The results of one project on all devices, GPUs first."""
    files = sorted(RESULTS.glob(f"{project}.*.json"), key=lambda path: (path.stem.endswith(".cpu"), path.name))
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def _section(result):
    """The Markdown of one result: where, when, with what, failed checks, the table, and the checks that passed."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [f"**{result['device']}** ({result['date']}, {versions})", ""]
    failed = [check for check in result["checks"] if not check["ok"]]
    passed = [check["name"] for check in result["checks"] if check["ok"]]
    lines += [f"- **FAILED check: {check['name']}** ({check['detail'] or 'no details'})" for check in failed]
    lines += [""] if failed else []
    lines += [*_table(result), ""]
    return lines + ([f"Checks that passed in this run: {'; '.join(passed)}.", ""] if passed else [])


def render(project):
    """What belongs between the markers of a project's README, as text."""
    lines = [line for result in _results(project) for line in _section(result)]
    return "\n".join([START, "", *lines, END]) if lines else f"{START}\n\nNothing measured yet.\n\n{END}"


def readme_of(project):
    """The README of a project's folder, or None where the folder does not exist."""
    return next(iter(ROOT.glob(f"phase*/{project}/README.md")), None)


def refresh_readme(project):
    """Write the current results between the markers of a project's README; returns True if that changed it."""
    readme = readme_of(project)
    text = readme.read_text(encoding="utf-8") if readme else ""
    if START not in text or END not in text:
        return False
    before, rest = text.split(START, 1)
    fresh = before + render(project) + rest.split(END, 1)[1]
    if fresh != text:
        atomic_write(readme, fresh)
    return fresh != text


def is_fresh(project):
    """True when a project's README shows exactly its results (or has neither markers nor results)."""
    text = readme_of(project).read_text(encoding="utf-8")
    return render(project) in text if START in text or _results(project) else True


def results_page():
    """The text of RESULTS.md: every project's table, generated."""
    lines = [
        "# Results",
        "",
        "Generated by `uv run python -m common.benchmark` from `results/`; nothing here is written by hand.",
        "Each figure is the median over repeats; a peer was measured in the same run, in turn with ours; a ratio above",
        "1 is in our favour; negative results and failed checks stay in. `results/` also holds what the checks found,",
        "and the curves.",
        "",
    ]
    projects = sorted({path.name.split(".")[0] for path in RESULTS.glob("*.json")}, key=_project_number)
    for project in projects:
        results = _results(project)
        lines += [f"## {project}: {results[0]['title']}", ""]
        lines += [line for result in results for line in _section(result)]
    return "\n".join(lines)


def _project_number(project):
    """Sort key: project10 comes after project9."""
    digits = "".join(filter(str.isdigit, project.split("_")[0]))
    return int(digits or 0), project


def main(argv=None):
    """Write RESULTS.md and refresh every README, or check that they are fresh."""
    parser = argparse.ArgumentParser(description="Gather results/*.json into RESULTS.md and the projects' READMEs.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page is out of date")
    arguments = parser.parse_args(argv)
    page = ROOT / "RESULTS.md"
    projects = sorted(path.parent.name for path in ROOT.glob("phase*/project*/README.md"))
    if arguments.check:
        stale = [p for p in projects if not is_fresh(p)]
        stale += ["RESULTS.md"] if not page.exists() or page.read_text(encoding="utf-8") != results_page() else []
        for name in stale:
            print(f"out of date: {name}; run `uv run python -m common.benchmark`", file=sys.stderr)
        raise SystemExit(1 if stale else 0)
    for project in projects:
        refresh_readme(project)
    atomic_write(page, results_page())
    print(f"wrote {page} and the tables of {len(projects)} projects")


if __name__ == "__main__":
    main()
