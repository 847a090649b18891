"""Commands: what the pages tell the reader to type really parses, and every flag is explained by --help."""

import argparse
import importlib.util
import re

import pytest

from tests.house import PROJECTS, PYPROJECT, ROOT, Parsed, commands_in, name_of, parse_script, script_and_flags, scripts

PAGES = [page for name in ("README", "CONTRIBUTING", "CLAUDE") if (page := ROOT / f"{name}.md").exists()]
PAGES += [folder / "README.md" for folder in PROJECTS if (folder / "README.md").exists()]
COMMANDS = [(page, words) for page in PAGES for words in commands_in(page)]


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    """Scripts are parsed as if started alone, whatever environment runs the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LLM_ROADMAP_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{name_of(page)}: {' '.join(words)}" for page, words in COMMANDS]
)
def test_a_documented_command_parses(page, words, capsys):
    if words[1] == "sync":
        groups = [words[i + 1] for i, word in enumerate(words) if word in ("--group", "--no-group", "--only-group")]
        assert set(groups) <= set(PYPROJECT["dependency-groups"]), f"{groups} in {' '.join(words)}"
        return
    path, flags = script_and_flags(words)
    if path is not None and "pytest" not in words:
        assert path.exists(), f"{name_of(page)} runs {name_of(path)}, which does not exist"
        try:
            parse_script(path, flags)
        except SystemExit as exit_:
            pytest.fail(f"{' '.join(words)} exits with status {exit_.code}: {capsys.readouterr().err}")
    elif "python" in words and "-m" in words:
        module = words[words.index("-m") + 1]
        assert importlib.util.find_spec(module), f"{' '.join(words)}: there is no module {module}"
    elif "python" in words and "-c" in words:
        compile(words[words.index("-c") + 1], "command", "exec")
    else:
        known = ("pytest", "ruff", "lint-imports")
        assert words[2] in known, f"{' '.join(words)}: {words[2]} is not one of {known}"
    for word in words:
        if word.startswith(("phase", "tests/", "common/", "data/shakespeare")):
            assert (ROOT / word.split("::")[0]).exists(), f"{' '.join(words)}: {word} does not exist"


def flags_of(parser):
    """(action, its spelled flags) of a parser and its sub-parsers."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from flags_of(inner)
        yield action, action.option_strings


@pytest.mark.parametrize("path", scripts(), ids=name_of)
def test_help_explains_every_flag(path, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_script(path, ["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    parser = parse_script(path, []).parser
    for action, names in flags_of(parser):
        assert all(name in text for name in names), f"{name_of(path)}: --help does not show {names}"
        assert action.help is not argparse.SUPPRESS, f"{name_of(path)}: --help hides {names}"
        explained = action.help and not action.help.strip().startswith("(default:")
        assert explained, f"{name_of(path)}: {names or action.dest} is not explained: add a trailing comment"
    assert parser.description, f"{name_of(path)}: --help does not say what the script does"


@pytest.mark.parametrize("path", scripts(), ids=name_of)
def test_an_unknown_flag_is_refused(path, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_script(path, ["--no_such_flag_anywhere"])
    assert exit_.value.code == 2
    assert "--no_such_flag_anywhere" in capsys.readouterr().err


def test_the_pages_have_commands():
    assert len(COMMANDS) >= 4
    for page in PAGES[3:]:
        assert commands_in(page), f"{name_of(page)} shows no command"


def test_commands_are_found_and_split(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\n$ uv run python a/b.py --x 1 \\\n    --y 'two words'  # a remark\nsome output\n```\n"
        "| project | `uv run python c.py --z` | built |\nin prose, `uv run nothing` is not checked\n"
        "```\nuv sync --group all\n```\n"
    )
    assert commands_in(page) == [
        ["uv", "run", "python", "a/b.py", "--x", "1", "--y", "two words"],
        ["uv", "sync", "--group", "all"],
        ["uv", "run", "python", "c.py", "--z"],
    ]
    launcher = ["uv", "run", "python", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["phase1_foundation/x.py", "--steps", "3"]
    assert script_and_flags(launcher) == (ROOT / "phase1_foundation" / "x.py", ["--steps", "3"])
    assert script_and_flags(["uv", "run", "python", "-m", "common.benchmark", "--check"]) == (
        ROOT / "common" / "benchmark.py", ["--check"]
    )  # fmt: skip
    assert script_and_flags(["uv", "run", "pytest"]) == (None, [])


def test_parsing_stops_before_the_work_and_notices_bad_flags(capsys):
    before = (ROOT / "RESULTS.md").read_bytes() if (ROOT / "RESULTS.md").exists() else None
    parsed = parse_script(ROOT / "common" / "benchmark.py", [])
    assert isinstance(parsed, Parsed)
    assert before == ((ROOT / "RESULTS.md").read_bytes() if before is not None else None)
    with pytest.raises(SystemExit):
        parse_script(ROOT / "common" / "benchmark.py", ["--chekc"])
    assert re.search("unrecognized arguments: --chekc", capsys.readouterr().err)


if __name__ == "__main__":
    for page, words in COMMANDS:
        print(f"{name_of(page)}: {' '.join(words)}")
    raise SystemExit(pytest.main([__file__]))
