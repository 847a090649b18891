"""What the tests of the house share: its folders, files, docstrings, commands, and a way to parse without running."""

import argparse
import ast
import contextlib
import functools
import importlib
import re
import shlex
import sys
import tomllib
from pathlib import Path

from common import ROOT
from common import settings as settings_module

PROJECTS = sorted(ROOT.glob("phase*/project*/"), key=lambda folder: int(re.findall(r"\d+", folder.name)[0]))
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WITHOUT_BENCHMARK = ("project29", "project30")  # a deployment and a user interface measure nothing of their own


def number_of(folder):
    """7 for .../project7_mixed_precision."""
    return int(re.match(r"project(\d+)_", Path(folder).name)[1])


def name_of(path):
    """A path for messages and test names: relative to the root, with forward slashes."""
    return Path(path).relative_to(ROOT).as_posix()


def python_files(folder):
    """All Python files of a folder and its subfolders, in order."""
    return sorted(path for path in Path(folder).rglob("*.py") if "__pycache__" not in path.parts)


@functools.cache
def tree_of(path):
    """The syntax tree of a Python file."""
    return ast.parse(Path(path).read_text(encoding="utf-8"), str(path))


def functions_of(tree, *names):
    """Top-level functions of a module, all or those with the given names."""
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and (not names or node.name in names)]


def has_main_guard(tree):
    """True for a file with an ``if __name__ == "__main__"`` block."""
    return any(isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in tree.body)


def kind_of(path):
    """What a file of a project is: package, config, test, benchmark, download, script or implementation."""
    fixed = {"__init__": "package", "config": "config", "benchmark": "benchmark", "download_data": "download"}
    if path.stem in fixed:
        return fixed[path.stem]
    if path.stem.startswith("test_") or path.stem == "conftest":
        return "test"
    tree = tree_of(path)
    if path.stem.endswith("_config") and functions_of(tree, "validate_config"):
        return "config"
    return "script" if functions_of(tree, "main") and has_main_guard(tree) else "implementation"


def is_kernel(path):
    """True for a file of Triton or Gluon kernels: it imports Triton at its top, and is itself imported in functions."""
    return Path(path).stem.endswith(("_kernel", "_kernels"))


def files_of_kind(folder, *kinds):
    """The Python files of a project of the given kinds."""
    return [path for path in python_files(folder) if kind_of(path) in kinds]


def module_of(path):
    """Import the module that a file of the repository is."""
    return importlib.import_module(".".join(Path(path).relative_to(ROOT).with_suffix("").parts))


def documented(tree):
    """(node, docstring) of every module, class and function of a file that has one."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
    return [(node, ast.get_docstring(node)) for node in nodes if ast.get_docstring(node)]


@functools.cache
def papers():
    """Checked titles: title -> arXiv id or 'none'."""
    lines = (ROOT / "tests" / "papers.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("\t") for line in lines)


# --- commands of the documentation ---


def commands_in(page):
    """The ``uv run`` and ``uv sync`` commands in the fenced blocks and tables of a Markdown page, as lists of words."""
    text = Path(page).read_text(encoding="utf-8").replace("\\\n", " ")
    found = []
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            line = re.sub(r"^\s*\$ ", "", line).strip()
            if line.startswith(("uv run ", "uv sync")):
                found.append(shlex.split(line, comments=True))
    # Tables hold commands, too: | `uv run python ...` |
    found += [shlex.split(cell) for cell in re.findall(r"\| `(uv run [^`]+)` \|", text)]
    return found


def script_and_flags(words):
    """(path of the script, its flags) of a ``uv run python ...`` command, or (None, []) where no script is called."""
    for index, word in enumerate(words):
        if word == "-m" and words[index + 1].split(".")[0] in ("common", *(p.parent.name for p in PROJECTS)):
            return ROOT / (words[index + 1].replace(".", "/") + ".py"), words[index + 2 :]
        if word.endswith(".py"):
            return ROOT / word, words[index + 1 :]
    return None, []


class Parsed(BaseException):
    """Raised in place of the work of a script once its command line has been read."""

    def __init__(self, parser, settings=None):
        self.parser, self.settings = parser, settings


@contextlib.contextmanager
def only_parsing():
    """Within this block a script's ``main`` stops with `Parsed` where it would begin to work."""
    parse, load = argparse.ArgumentParser.parse_args, settings_module.load
    seen, loading = [], []

    def stop_after_parsing(parser, *arguments, **options):
        seen.append(parser)
        result = parse(parser, *arguments, **options)
        if not loading:
            raise Parsed(parser)
        return result

    def stop_after_loading(*arguments, **options):
        loading.append(True)
        try:
            settings = load(*arguments, **options)
        finally:
            loading.pop()
        raise Parsed(seen[-1], settings)

    argparse.ArgumentParser.parse_args, settings_module.load = stop_after_parsing, stop_after_loading
    argv = sys.argv
    try:
        yield seen
    finally:
        argparse.ArgumentParser.parse_args, settings_module.load, sys.argv = parse, load, argv


def reads_its_command_line(path):
    """True where ``main`` of a script goes through `Run`, `load` or argparse, so that it can be called to be parsed."""
    mains = functions_of(tree_of(path), "main")
    names = {getattr(c.func, "attr", getattr(c.func, "id", "")) for m in mains for c in ast.walk(m) if is_call(c)}
    return bool(names & {"Run", "load", "parse_args"})


def is_call(node):
    """True for a call expression."""
    return isinstance(node, ast.Call)


def parse_script(path, flags):
    """Let a script read its flags and stop before it works.

    Raises:
        SystemExit: the flags are refused, or ask for help.
        AssertionError: the script does not read its command line.
    """
    assert reads_its_command_line(path), f"main() of {name_of(path)} does not read its flags by Run, load or argparse"
    with only_parsing():
        sys.argv = [str(path), *flags]
        try:
            module_of(path).main(list(flags))
        except Parsed as parsed:
            return parsed
    raise AssertionError(f"{name_of(path)} ran to its end without reading its flags")


def scripts():
    """All files of the house that are called from the command line and have flags."""
    kinds = ("script", "benchmark", "download")
    found = [path for folder in PROJECTS for path in files_of_kind(folder, *kinds)]
    tests = [path for folder in PROJECTS for path in files_of_kind(folder, "test")]
    found += [path for path in tests if functions_of(tree_of(path), "main")]
    roofs = [path for path in sorted(ROOT.glob("*.py")) if functions_of(tree_of(path), "main")]
    return found + roofs + [ROOT / "common" / "benchmark.py"]
