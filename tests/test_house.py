"""The pages of the whole house are true: the table of projects, the map, the rules, the results."""

import os
import re
import subprocess
import sys
import tomllib

import pytest

from common import benchmark
from common.catalog import GROUPS
from tests.house import PROJECTS, PYPROJECT, ROOT, commands_in, number_of, papers, python_files

README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.splitlines()
    if re.match(r"\| \d+ \|", line)
]
CELLS = [tuple(row) for row in ROWS]


def test_the_table_has_all_thirty_projects():
    assert [int(row[0]) for row in ROWS] == list(range(1, 31))
    assert all(len(row) == 6 for row in ROWS)


@pytest.mark.parametrize(("number", "project", "paper", "idea", "command", "state"), CELLS, ids=[r[0] for r in ROWS])
def test_a_row_of_the_table_is_true(number, project, paper, idea, command, state):
    folder = next((folder for folder in PROJECTS if number_of(folder) == int(number)), None)
    assert state == ("built" if folder else "planned"), f"project {number} is {'' if folder else 'not '}there"
    assert idea
    if paper != "none":
        assert set(paper.split("; ")) <= set(papers())
    if folder:
        name, target = re.fullmatch(r"\[(\w+)\]\((.+)\)", project).groups()
        assert folder.name == f"project{number}_{name}"
        assert target == (folder / "README.md").relative_to(ROOT).as_posix()
        assert re.fullmatch(rf"`uv run python {folder.parent.name}/{folder.name}/\w+\.py[^`]*`", command)
    else:
        assert (re.fullmatch(r"\w+", project) is not None, command) == (True, "—")


def test_the_two_commands():
    commands = [" ".join(words) for words in commands_in(ROOT / "README.md")]
    assert {"uv run python speedrun.py", "uv run pytest", "uv sync --no-default-groups"} <= set(commands)


def test_continuous_integration_runs_the_readmes_test_command():
    script = ROOT / ".ci" / "run"
    lines = [line.strip() for line in script.read_text(encoding="utf-8").splitlines()]
    assert "uv run pytest" in lines
    assert "uv run ruff check" in lines
    assert "set -eu" in lines
    if sys.platform != "win32":
        assert os.access(script, os.X_OK)
        assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_the_map_shows_what_exists():
    block = re.search(r"## The house\n\n```\n(.*?)```", README, re.DOTALL)[1]
    shown = [line.split()[0] for line in block.splitlines() if not line.startswith(" ")]
    written_by_training = {"checkpoints/"}
    missing = [name for name in shown if name not in written_by_training and not (ROOT / name).exists()]
    assert not missing
    assert {f"{folder.parent.name}/" for folder in PROJECTS} <= set(shown)
    assert all(folder.name in block for folder in PROJECTS)


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    anchors = {
        re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, f"{page.name}: no section {target}"
        elif not target.startswith("http"):
            assert (ROOT / target.split("#")[0]).exists(), f"{page.name} links to {target}, which does not exist"


def test_results_are_shown_as_they_were_measured():
    with pytest.raises(SystemExit) as exit_:
        benchmark.main(["--check"])
    assert exit_.value.code == 0, "run `uv run python -m common.benchmark`"


def test_the_paper_list_is_in_order():
    lines = (ROOT / "tests" / "papers.txt").read_text(encoding="utf-8").splitlines()
    assert len(papers()) == len(lines), "a title stands there twice"
    for title, arxiv in papers().items():
        assert title == title.strip()
        assert re.fullmatch(r"\d{4}\.\d{4,5}|none", arxiv), f"{title}: {arxiv}"
    ids = [arxiv for arxiv in papers().values() if arxiv != "none"]
    assert len(ids) == len(set(ids))


def test_the_papers_in_the_guide_are_the_checked_ones():
    text = (ROOT / "CLAUDE.md").read_text(encoding="utf-8").split("## Papers")[1].split("\n## ")[0]
    entries = re.findall(r"^- \d+: (.*?)(?=\n- \d+: |\Z)", text, re.DOTALL | re.MULTILINE)
    assert len(entries) == 28
    for entry in entries:
        unknown = [title for title in " ".join(entry.split()).split("; ") if title not in papers()]
        assert not unknown


def test_the_guide_names_what_the_formats_are():
    text = (ROOT / "CLAUDE.md").read_text(encoding="utf-8")
    from common.checkpoint import REQUIRED

    assert f"`{', '.join(REQUIRED)}`" in text
    assert all(path.stem in text for path in python_files(ROOT / "common") if not path.stem.startswith(("test_", "__")))


def test_public_names_and_the_catalog_belong_to_built_projects():
    names = tomllib.loads((ROOT / "tests" / "public_names.toml").read_text(encoding="utf-8"))
    assert set(names) == {folder.name for folder in PROJECTS}
    built = {f"{folder.parent.name}.{folder.name}" for folder in PROJECTS}
    for entries in GROUPS.values():
        for target in entries.values():
            assert ".".join(target.split(".")[:2]) in built


def test_the_licence_and_the_package():
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert PYPROJECT["project"]["license"] == "MIT"
    assert PYPROJECT["tool"]["uv"]["default-groups"] == ["all"]
    groups = PYPROJECT["dependency-groups"]
    assert {entry["include-group"] for entry in groups["all"]} == set(groups) - {"all"}


if __name__ == "__main__":
    for row in ROWS:
        print(f"{row[0]:>2}  {row[5]:<8} {row[1]}")
    raise SystemExit(pytest.main([__file__]))
