"""Benchmarks: fair timing, honest tables, pages that cannot go stale unseen."""

import json

import numpy as np
import pytest
import torch

from common import benchmark
from common.benchmark import END, START, Report, measure, measure_recorded, run_parts


def test_measure_interleaves_so_that_drift_hits_all_alike():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ABC"}
    timings = measure(functions, repeats=3, warmup=2, before=lambda: calls.append("-"))
    assert "".join(calls) == "-A-B-C" * 5
    assert {t.n for t in timings.values()} == {3}


def test_measure_counts_the_repeats_alone_and_reports_their_median(monkeypatch):
    now, takes = [0.0], iter([100, 3, 1, 2])  # the warm-up takes 100
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    timing = measure({"A": lambda: now.append(now.pop() + next(takes))}, repeats=3, warmup=1)["A"]
    assert (timing.median, timing.low, timing.high, timing.n) == (2, 1, 3, 3)
    assert timing.rate(6) == (3, 2, 6)


def test_what_would_be_recorded_on_a_gpu_is_measured_in_turn_elsewhere():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "AB"}
    timings = measure_recorded(functions, repeats=2, before=lambda: calls.append("-"), device="cpu")
    assert "".join(calls) == "-A-B" * 3
    assert {t.n for t in timings.values()} == {2}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_call_takes_as_long_as_one_of_many():
    x = torch.randn(2048, 2048, device="cuda")
    timings = measure_recorded({"one": lambda: x @ x, "two": lambda: x @ x @ x})
    assert 1.5 < timings["two"].median / timings["one"].median < 2.5


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A small repository: one project with markers, one without, nothing measured."""
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results")
    for name, text in (("project2_tokenizer", f"# Two\n{START}\nby hand\n{END}\nafter\n"), ("project3_x", "# Three\n")):
        folder = tmp_path / "phase1_foundation" / name
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(text, encoding="utf-8")
    return tmp_path


def report(project="project2_tokenizer", **options):
    result = Report(project, "Tokenizing | fast", device="cpu", **options)
    result.row("encode", 24.0, "MB/s", claim="2x (table 3)", peer=12.0, peer_name="tiktoken", limit=96.0,
               limit_name="memory", spread=(22, 26), note="one thread")  # fmt: skip
    result.row("train", np.float32(10.0), "s", peer=25, peer_name="tokenizers", higher_is_better=False)
    result.skip("kernel", "needs a GPU")
    result.series("sizes", range(3), np.array([1.0, 2.0, 3.0]))
    return result


def check(argv=("--check",)):
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(list(argv))
    return exit_.value.code


def test_finish_writes_the_result_and_the_readme(house, capsys):
    done = report()
    done.check("same ids as tiktoken", True, "10,000 texts")
    done.finish()
    result = json.loads((house / "results" / "project2_tokenizer.cpu.json").read_text(encoding="utf-8"))
    encode, train, kernel = result["rows"]
    assert (encode["vs_peer"], encode["of_limit"], encode["spread"]) == (2.0, 0.25, [22, 26])
    assert train["vs_peer"] == 2.5  # 10 s against 25 s: above 1 is in our favour
    assert kernel == {"name": "kernel", "skipped": "needs a GPU"}
    assert result["series"]["sizes"] == {"x": [0, 1, 2], "y": [1.0, 2.0, 3.0]}
    assert result["checks"] == [{"name": "same ids as tiktoken", "ok": True, "detail": "10,000 texts"}]
    assert result["versions"]["torch"] == torch.__version__
    readme = (house / "phase1_foundation/project2_tokenizer/README.md").read_text(encoding="utf-8")
    row = "| encode | 2x (table 3) | **24** MB/s (22–26) | 12 (tiktoken) | 96 (memory) | 2.00× | 0.25× |"
    assert row in readme
    assert "not measured: needs a GPU" in readme
    assert "- encode: one thread" in readme
    assert "by hand" not in readme
    assert readme.startswith("# Two\n")
    assert readme.endswith("\nafter\n")
    printed = capsys.readouterr().out
    assert "ok    same ids as tiktoken" in printed
    assert "24 MB/s (22–26)" in printed


def test_a_failed_check_exits_with_1_and_is_kept(house, capsys):
    failing = report()
    failing.check("round trip", False, "3 texts differ")
    with pytest.raises(SystemExit) as exit_:
        failing.finish()
    assert exit_.value.code == 1
    assert "FAIL  round trip  3 texts differ" in capsys.readouterr().out
    result = json.loads((house / "results" / "project2_tokenizer.cpu.json").read_text(encoding="utf-8"))
    assert not result["checks"][0]["ok"]


def test_a_part_that_fails_leaves_the_others_alone_and_is_named_at_the_end(house, capsys):
    mine, done = Report("project1_minimal_gpt", "A title", "cpu"), []

    def breaks():
        raise RuntimeError("no such thing")

    parts = {
        "one": lambda: mine.row("speed", 1.0, "tok/s"),
        "two": breaks,
        "three": lambda: mine.check("sum", False),
    }
    with pytest.raises(ValueError, match="the part two failed: no such thing"):
        run_parts(mine, parts, lambda: done.append(len(mine.rows + mine.checks)))
    written = json.loads(mine.path.read_text())
    assert done == [1, 1, 2] and [row["name"] for row in written["rows"]] == ["speed"]
    assert "RuntimeError" in capsys.readouterr().err  # where it broke
    with pytest.raises(SystemExit):  # without a broken part a failed check still ends it so
        run_parts(mine, {})


def test_what_was_measured_is_said_and_saved_before_the_end(house, capsys):
    unfinished = report()
    partial = house / "results" / ".project2_tokenizer.cpu.json.partial"
    assert json.loads(partial.read_text(encoding="utf-8"))["rows"][0]["name"] == "encode"
    assert "encode: 2x (table 3) | 24 MB/s (22–26) | 12 (tiktoken)" in capsys.readouterr().out
    assert not (house / "results" / "project2_tokenizer.cpu.json").exists()
    assert "encode" not in benchmark.results_page()
    unfinished.finish()
    assert not partial.exists()


def test_a_part_measured_again_keeps_the_rest_with_its_date(house):
    report().finish()
    path = house / "results" / "project2_tokenizer.cpu.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    for entry in (before, *before["rows"]):
        entry["date"] = "2020-01-02"
    path.write_text(json.dumps(before), encoding="utf-8")
    part = Report("project2_tokenizer", "Tokenizing | fast", device="cpu", keep=True)
    part.skip("encode", "no time")
    part.row("train", 5.0, "s")
    part.row("decode", 1.0, "s")
    part.finish()
    rows = {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == ["encode", "train", "kernel", "decode"]
    assert (rows["encode"]["ours"], rows["train"]["ours"], rows["train"]["peer"]) == (24.0, 5.0, None)
    readme = (house / "phase1_foundation/project2_tokenizer/README.md").read_text(encoding="utf-8")
    assert "- encode: one thread; measured on 2020-01-02" in readme
    assert "- train: " not in readme


def test_a_check_that_is_made_at_last_takes_the_place_of_its_skipped_row(house):
    report().finish()
    part = Report("project2_tokenizer", "Tokenizing | fast", device="cpu", keep=True)
    part.check("kernel", True)
    part.finish()
    result = json.loads((house / "results" / "project2_tokenizer.cpu.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in result["rows"]] == ["encode", "train"]
    assert [check["name"] for check in result["checks"]] == ["kernel"]


def test_work_of_the_processor_beside_a_gpu_says_so(house, monkeypatch):
    monkeypatch.setattr(benchmark, "device_slug", lambda device: "h100")
    names = {"cpu": "a CPU", "meta": "a GPU"}
    monkeypatch.setattr(benchmark, "device_name", lambda device: names[str(device)])
    Report("project2_tokenizer", "Tokenizing", device="meta", host=True).finish()
    result = json.loads((house / "results" / "project2_tokenizer.h100.json").read_text(encoding="utf-8"))
    assert result["device"] == "a CPU, host of a GPU"


def test_pages_show_the_checks_and_failed_ones_above_the_table(house):
    mixed = report()
    mixed.check("same ids as tiktoken", True, "10,000 texts")
    mixed.check("round trip", False, "3 texts differ")
    mixed.check("memory", False)
    mixed.check("merges in order", True)
    with pytest.raises(SystemExit):
        mixed.finish()
    benchmark.main([])
    for page in ("phase1_foundation/project2_tokenizer/README.md", "RESULTS.md"):
        text = (house / page).read_text(encoding="utf-8")
        failed = "- **FAILED check: round trip** (3 texts differ)\n- **FAILED check: memory** (no details)\n"
        assert text.index(failed) < text.index("| encode |")
        assert text.index("Checks that passed in this run: same ids as tiktoken; merges in order.\n") > text.index(
            "- encode: one thread\n\n"
        )
    nothing = {"device": "a CPU", "date": "2026-01-01", "versions": {}, "rows": [], "checks": []}
    assert "check" not in "\n".join(benchmark._section(nothing)).lower()


def test_another_folder_leaves_the_readme_alone(house, tmp_path):
    before = (house / "phase1_foundation/project2_tokenizer/README.md").read_bytes()
    report(folder=tmp_path / "elsewhere").finish()
    assert (tmp_path / "elsewhere" / "project2_tokenizer.cpu.json").exists()
    assert (house / "phase1_foundation/project2_tokenizer/README.md").read_bytes() == before


def test_check_finds_stale_pages_and_changes_nothing(house, capsys):
    assert check() == 1
    assert "out of date: project2_tokenizer" in (said := capsys.readouterr().err)  # filled in by hand
    assert "out of date: RESULTS.md" in said
    assert not (house / "RESULTS.md").exists()
    benchmark.main([])
    assert check() == 0
    report().finish()  # the README follows, RESULTS.md does not yet
    capsys.readouterr()
    assert check() == 1
    assert capsys.readouterr().err.count("out of date") == 1
    benchmark.main([])
    assert check() == 0
    readme = house / "phase1_foundation/project2_tokenizer/README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("**24**", "**42**"), encoding="utf-8")
    assert check() == 1


def test_results_without_markers_in_the_readme_are_stale(house):
    report("project3_x").finish()
    benchmark.main([])
    assert check() == 1


def test_the_results_page_has_every_project_in_order(house):
    for project in ("project10_prompt_caching", "project2_tokenizer"):
        report(project).finish()
    benchmark.main([])
    page = (house / "RESULTS.md").read_text(encoding="utf-8")
    assert page.index("## project2_tokenizer: Tokenizing") < page.index("## project10_prompt_caching")
    assert page.count("| encode |") == 2


def test_gpu_results_stand_before_those_of_the_cpu(house):
    report().finish()
    cpu = house / "results" / "project2_tokenizer.cpu.json"
    gpu = json.loads(cpu.read_text(encoding="utf-8")) | {"device": "Some GPU"}
    (house / "results" / "project2_tokenizer.h100.json").write_text(json.dumps(gpu), encoding="utf-8")
    text = benchmark.render("project2_tokenizer")
    assert text.index("**Some GPU**") < text.index(" CPU, ")


def test_markdown_cells_survive_a_bar():
    result = {"rows": [{"name": "a|b", "skipped": "x"}]}
    assert "| a\\|b |" in "\n".join(benchmark._table(result))


@pytest.mark.parametrize(
    ("value", "text"), [(None, "—"), (1234567, "1,234,567"), (999.96, "1000"), (0.000123456, "0.0001235"), (3, "3")]
)
def test_numbers(value, text):
    assert benchmark._number(value) == text


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        report(folder=folder).finish()
    raise SystemExit(pytest.main([__file__]))
