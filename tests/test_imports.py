"""The one rule of the house, arrows point down; and everything imports on a small install, silently."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.house import PROJECTS, PYPROJECT, ROOT, is_kernel, kind_of, name_of, number_of, python_files

CONTRACT = PYPROJECT["tool"]["importlinter"]
PHASES = sorted({folder.parent for folder in PROJECTS}, key=lambda folder: int(re.findall(r"\d+", folder.name)[0]))
FILES = [path for folder in (ROOT / "common", *PHASES) for path in python_files(folder)]


def lint_imports(folder):
    """Run import-linter in a folder, in a process of its own."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_arrows_point_down():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("phase1_foundation/project1_minimal_gpt/model.py", "from phase1_foundation.project3_pretrain import model"),
        ("common/modules.py", "def later():\n    import phase1_foundation.project1_minimal_gpt.model"),
    ],
)
def test_a_planted_upward_import_is_found(tmp_path, importer, line):
    for package in ("common", *(phase.name for phase in PHASES)):
        ignore = shutil.ignore_patterns("__pycache__", "*.png", "*.json", "*.md")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with open(tmp_path / importer, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is not allowed to import" in done.stdout
    assert "BROKEN" in done.stdout


def test_pyproject_knows_every_project():
    ordered = [f"{p.parent.name}.{p.name}" for p in sorted(PROJECTS, key=number_of, reverse=True)]
    layers = [contract for contract in CONTRACT["contracts"] if contract["type"] == "layers"]
    assert [contract["layers"] for contract in layers] == [[*ordered, "common"]]
    packages = {"common", *(phase.name for phase in PHASES)}
    assert set(CONTRACT["root_packages"]) == packages
    assert set(PYPROJECT["tool"]["pytest"]["ini_options"]["testpaths"]) == {"tests", *packages}
    assert set(PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]) >= packages


# What the small install (`uv sync --no-default-groups`) does not have, and what exists for Linux alone.
OPTIONAL = [
    "triton", "transformers", "tokenizers", "tiktoken", "peft", "liger_kernel", "datasets", "zstandard", "gradio",
    "fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client", "llguidance", "openai", "httpx", "aiohttp",
    "opentelemetry", "ray", "pytest", "hypothesis", "huggingface_hub", "torchao",
    "fcntl", "resource", "termios", "pwd", "grp",
]  # fmt: skip

# The side of project 28 that faces the web stands on libraries of the group `serve`; serve.py imports it in a function.
WEB = {"asking.py", "cluster.py", "errors.py", "front.py", "gate.py", "protocol.py", "replica.py", "server.py",
       "shutdown.py", "streaming.py", "tracing.py"}  # fmt: skip

IMPORT_ALL = """
import importlib, sys
for name in {blocked}:
    sys.modules[name] = None
for name in {modules}:
    try:
        importlib.import_module(name)
    except BaseException as error:
        print(f"{{name}}: {{type(error).__name__}}: {{error}}")
"""


def test_everything_imports_silently_on_the_small_install(tmp_path):
    files = [path for path in FILES if kind_of(path) != "test" and not is_kernel(path)]
    files = [path for path in files if not (path.parent.name == "project28_serving" and path.name in WEB)]
    # Of project 30 the script alone: all else stands on Gradio's group.
    files = [path for path in files if path.parent.name != "project30_gradio" or path.name in ("app.py", "config.py")]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    program = IMPORT_ALL.format(blocked=OPTIONAL, modules=modules)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [], "importing a module wrote files"


# --- macOS and Windows ---

POSIX_ONLY = {"fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "curses", "syslog", "readline"}


def imported_at_the_top(tree):
    """Packages that a file imports when it is imported itself."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_everywhere(path):
    top = set(imported_at_the_top(ast.parse(path.read_text(encoding="utf-8"))))
    refused = POSIX_ONLY if is_kernel(path) else POSIX_ONLY | {"triton"}
    assert not top & refused, f"{name_of(path)}: import {top & refused} in a function"


def test_nothing_but_kernels_imports_kernels_at_its_top():
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and not is_kernel(path):
                for target in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                    module = ROOT / (target.replace(".", "/") + ".py")
                    assert not (module in FILES and is_kernel(module)), (
                        f"{name_of(path)}: import {target} in a function: it needs Triton"
                    )


def opens_text_without_encoding(call):
    """True for open(), read_text() and write_text() of text in whatever encoding the machine prefers."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name not in ("open", "read_text", "write_text") or any(k.arg in ("encoding", None) for k in call.keywords):
        return False
    if name == "open":
        owner = getattr(getattr(call.func, "value", None), "id", None)
        if isinstance(call.func, ast.Attribute) and owner not in ("gzip", "lzma", "bz2", "io"):
            return False  # an open() of something else: Image.open, a path's own
        modes = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
        mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "" if modes else "r"
        return "b" not in mode and (mode != "" and (owner is None or "t" in mode))
    return len(call.args) < (1 if name == "read_text" else 2)


@pytest.mark.parametrize("path", [path for path in FILES if not path.name.startswith("test_")], ids=name_of)
def test_text_is_read_and_written_as_utf8_on_every_system(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if opens_text_without_encoding(call)]
    assert not lines, f"{name_of(path)}: lines {lines} open text without encoding='utf-8'"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("open(p)", True), ("open(p, 'w')", True), ("open(p, 'rb')", False), ("open(p, encoding='utf-8')", False),
        ("p.read_text()", True), ("p.read_text('utf-8')", False), ("p.write_text(t)", True),
        ("p.write_text(t, encoding='utf-8')", False), ("gzip.open(p)", False), ("gzip.open(p, 'rt')", True),
        ("open(p, mode)", False), ("Image.open(p)", False), ("open(p, mode='wb')", False),
    ],
)  # fmt: skip
def test_the_search_for_unspoken_encodings(source, expected):
    assert opens_text_without_encoding(ast.parse(source).body[0].value) is expected


if __name__ == "__main__":
    print(lint_imports(ROOT).stdout)
    raise SystemExit(pytest.main([__file__]))
