"""The contract of a project folder, checked for every folder that exists.

A failing test names the folder and the file. What the contract asks for is described in CONTRIBUTING.md.
"""

import ast
import doctest
import re
import sys

import pytest

from common import benchmark
from common import settings as settings_module
from tests.house import (
    PROJECTS,
    PYPROJECT,
    ROOT,
    WITHOUT_BENCHMARK,
    documented,
    files_of_kind,
    functions_of,
    has_main_guard,
    is_kernel,
    kind_of,
    module_of,
    name_of,
    papers,
    python_files,
    tree_of,
)

SECTIONS = ("PAPER:", "PAPER CONTEXT:", "INTUITION:", "IMPLEMENTATION:", "WHY:")
CLOSING = "Each component is explained with paper references for educational purposes."
OWN = [path for folder in (ROOT / "common", ROOT / "tests", *PROJECTS) for path in python_files(folder)]
OWN += sorted(ROOT.glob("*.py"))
PRODUCT = [path for path in OWN if not path.name.startswith("test_")]
IMPLEMENTATIONS = [path for folder in PROJECTS for path in files_of_kind(folder, "implementation")]
# Files that implement no paper: they need not open with one. What they do cite is checked all the same.
PLUMBING = {
    "unicode_ranges.py": "a table of code points",
    "presets.py": "a table of published shapes",
    "hub_mapping.py": "tables of names in Hugging Face's files",
    "hub_tokenizer.py": "the file format of a tokenizer of others",
    "gguf_export.py": "the file format of llama.cpp",
    "loading.py": "finding and reading checkpoints",
    "precision.py": "the public names of project 7, gathered",
    "protocol.py": "tables of what a request may hold",
    "shapes.py": "the objects of a foreign interface",
    "errors.py": "the error objects of a foreign interface",
    "streaming.py": "answers that end when their client leaves",
    "gate.py": "keys, sizes and counts of requests",
    "shutdown.py": "the life of a server process",
    "tracing.py": "the use of a library",
    "wire.py": "messages between two processes",
    "options.py": "settings of scripts as options of engine and server",
    "agreement.py": "rules that a deployment's files must keep among each other",
    "manifests.py": "reading a deployment's files",
    "promql.py": "reading queries of dashboards",
    "stack.py": "the commands that start containers",
    "validators.py": "the use of public validators",
}
COMPONENTS = [path for path in IMPLEMENTATIONS if path.name not in PLUMBING]

each_project = pytest.mark.parametrize("folder", PROJECTS, ids=lambda folder: folder.name)


def each(paths):
    """Parametrise a test over files."""
    return pytest.mark.parametrize("path", paths, ids=name_of)


# --- the folder ---


@each_project
def test_the_files_of_a_project(folder):
    missing = [name for name in ("__init__.py", "README.md", "config.py") if not (folder / name).exists()]
    if not folder.name.startswith(WITHOUT_BENCHMARK) and not (folder / "benchmark.py").exists():
        missing.append("benchmark.py")
    kinds = {kind_of(path) for path in python_files(folder)}
    wanted = {"implementation", "script", "test"} if not folder.name.startswith("project29_") else {"test"}
    missing += [f"a file that is a {kind}" for kind in wanted - kinds]
    assert not missing, f"{folder.name} lacks {', '.join(missing)}"


@pytest.mark.parametrize(
    "folder", [ROOT / "common", ROOT / "tests", *PROJECTS, *sorted({p.parent for p in PROJECTS})], ids=name_of
)
def test_every_folder_is_a_package_that_says_what_it_is(folder):
    for inside in (folder, *(path for path in folder.rglob("*/") if any(path.glob("*.py")))):
        assert (inside / "__init__.py").exists(), (
            f"{name_of(inside)} needs an __init__.py with a line that says what it is"
        )
        assert ast.get_docstring(tree_of(inside / "__init__.py")), f"{name_of(inside)}/__init__.py needs a docstring"


@each_project
def test_public_names_exist(folder):
    import tomllib

    names = tomllib.loads((ROOT / "tests" / "public_names.toml").read_text(encoding="utf-8"))
    assert folder.name in names, f"add the public names of {folder.name} to tests/public_names.toml"
    for module, attributes in names[folder.name].items():
        path = folder / f"{module}.py"
        assert path.exists(), f"{name_of(path)} is missing"
        missing = [name for name in attributes if not hasattr(module_of(path), name)]
        assert not missing, f"{name_of(path)} lacks the public names {missing}"


# --- config.py ---


def config_of(folder):
    """The config module of a project."""
    if not (folder / "config.py").exists():
        pytest.fail(f"{folder.name} has no config.py")
    return module_of(folder / "config.py")


@each_project
def test_the_config_validates_and_prints(folder, capsys):
    config = config_of(folder)
    constants = settings_module.constants_of(config)  # those of BASE_CONFIG among them
    before = {name: repr(constant.default) for name, constant in constants.items()}
    config.validate_config()
    config.validate_config(settings_module.load(config, []))
    for settings in (None, settings_module.load(config, [])):
        config.print_config(settings)
        printed = capsys.readouterr().out
        assert all(name in printed for name in constants)
    after = {name: repr(constant.default) for name, constant in settings_module.constants_of(config).items()}
    assert after == before, "the module was changed"


@each_project
def test_every_constant_explains_itself(folder):
    silent = [c.name for c in settings_module.constants_of(config_of(folder)).values() if not c.help]
    assert not silent, f"{folder.name}/config.py: constants without a trailing comment: {silent}"


@each_project
def test_broken_settings_are_refused_with_constant_value_and_remedy(folder):
    config = config_of(folder)
    refused = []
    for name, constant in settings_module.constants_of(config).items():
        if type(constant.default) not in (int, float):
            continue
        settings = settings_module.load(config, [])
        setattr(settings, name, type(constant.default)(-7))
        try:
            config.validate_config(settings)
        except ValueError as error:
            message = str(error)
            assert re.search(r"\b[A-Z][A-Z0-9_]+=-?[\w.]+", message), f"{name}=-7: {message!r} names no CONSTANT=value"
            assert len(re.split(r"=-?[\w.]+", message, maxsplit=1)[1]) > 5, f"{name}=-7: {message!r} states no remedy"
            refused.append(name)
    assert refused, f"validate_config of {folder.name} accepts -7 for every number"


# --- implementation files ---


def bullets(docstring):
    """The entries of the list in a module docstring, each on one line."""
    entries = []
    for line in docstring.splitlines():
        if line.startswith("- "):
            entries.append(line[2:])
        elif line.startswith("  ") and entries:
            entries[-1] += " " + line.strip()
    return entries


@each(COMPONENTS)
def test_an_implementation_opens_with_its_papers(path):
    docstring = ast.get_docstring(tree_of(path)) or ""
    assert re.match(r"[^\n]+\n\nThis file implements\b.*? follow(ing)?:\n- \"", docstring, re.DOTALL), (
        f"{name_of(path)} must open with a title, a blank line, 'This file implements ... following:' and a list"
    )
    assert CLOSING in docstring, f"{name_of(path)}: the module docstring lacks {CLOSING!r}"
    for entry in (entry for entry in bullets(docstring) if entry.startswith('"')):
        assert re.match(r'"[^"]+" \([^)]+, \d{4}\) - \S', entry), (
            f'{entry!r} is not: "Title" (Authors, Year) - what for'
        )


@each(OWN)
def test_cited_titles_and_arxiv_ids_are_the_checked_ones(path):
    tree = tree_of(path)
    titles = [re.match(r'"([^"]+)"', entry)[1] for entry in bullets(ast.get_docstring(tree) or "") if entry[0] == '"']
    for _, docstring in documented(tree):
        for text in re.findall(r"PAPER:(.*?)(?:\n *[A-Z ]+:|\n\n|$)", docstring, re.DOTALL):
            text = re.sub(r'section\s+"[^"]*"', "", text)  # a section may be named, too
            titles += [" ".join(title.split()) for title in re.findall(r'"([^"]+)"', text)]
        for title, arxiv in re.findall(r'"([^"]+)",?\s+\(?arXiv:(\d{4}\.\d{4,5})', docstring):
            title = " ".join(title.split())
            assert papers().get(title, arxiv) == arxiv, f"{name_of(path)}: {title!r} is not arXiv:{arxiv}"
        for arxiv in re.findall(r"arXiv:(\d{4}\.\d{4,5})", docstring):
            assert arxiv in papers().values(), f"{name_of(path)}: arXiv:{arxiv} is not in tests/papers.txt"
    unknown = [title for title in titles if title not in papers()]
    assert not unknown, f"{name_of(path)}: not in tests/papers.txt: {unknown}"


def test_the_list_of_plumbing_is_in_use():
    assert set(PLUMBING) <= {path.name for path in IMPLEMENTATIONS}


def sections_of(docstring):
    """The sections of a docstring, in order: [(marker, number of its lines)]."""
    found, lines = [], docstring.splitlines()
    for index, line in enumerate(lines):
        marker = next((section for section in SECTIONS if line.strip().startswith(section)), None)
        if marker:
            length = 1
            while index + length < len(lines) and re.match(r"\s*(?![A-Z][A-Z ]*:)\S", lines[index + length]):
                length += 1
            found.append((marker, length))
    return found


def is_component(node):
    """True for a public class that computes: no exception, no protocol, no record of plain fields."""
    bases = [getattr(base, "id", getattr(base, "attr", "")) for base in node.bases]
    if node.name.startswith("_") or any(b.endswith(("Error", "Exception", "Warning", "Protocol")) for b in bases):
        return False
    is_record = "NamedTuple" in bases or any("dataclass" in ast.dump(d) for d in node.decorator_list)
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    return not is_record or any("property" not in ast.dump(d) for m in methods for d in m.decorator_list or [m])


@each(COMPONENTS)
def test_components_have_the_five_sections(path):
    tree, complete, problems = tree_of(path), 0, []
    for node, docstring in documented(tree):
        found = sections_of(docstring) if not isinstance(node, ast.Module) else []
        if found and tuple(marker for marker, _ in found) != SECTIONS:
            problems.append(f"{node.name} has {[m for m, _ in found]}, not all five sections in order")
        problems += [f"{node.name}: {marker} is longer than three lines" for marker, length in found if length > 3]
        complete += tuple(marker for marker, _ in found) == SECTIONS
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and is_component(node) and not sections_of(ast.get_docstring(node) or ""):
            problems.append(f"class {node.name} has no {' '.join(SECTIONS)}")
    if not complete:
        problems.append("nothing in this file has the five sections")
    assert not problems, f"{name_of(path)}: " + "; ".join(problems)


@each([path for path in PRODUCT if kind_of(path) in ("implementation", "script") or path.parent.name == "common"])
def test_examples_in_docstrings_run(path):
    if is_kernel(path):
        pytest.importorskip("triton")
    failed, _ = doctest.testmod(module_of(path))
    assert failed == 0, f"{failed} examples of {name_of(path)} fail (see above)"


@each(IMPLEMENTATIONS)
def test_less_than_half_of_a_file_is_docstring(path):
    lines = sum(1 for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    words = sum(1 for _, docstring in documented(tree_of(path)) for line in docstring.splitlines() if line.strip())
    assert words < lines / 2, f"{name_of(path)}: {words} of {lines} lines are docstring: cut words"


# --- scripts and tests ---


@each(
    [p for folder in PROJECTS for p in files_of_kind(folder, "script", "benchmark", "download")]
    + [path for path in sorted(ROOT.glob("*.py")) if path.name != "conftest.py"]
)
def test_a_script_has_a_main_and_no_public_classes(path):
    tree = tree_of(path)
    mains = functions_of(tree, "main")
    assert mains and has_main_guard(tree), (
        f"{name_of(path)} needs main(argv=None) and an if __name__ == '__main__' guard"
    )
    arguments = mains[0].args
    assert [a.arg for a in arguments.args] == ["argv"] and len(arguments.defaults) == 1, (
        f"{name_of(path)}: main must be main(argv=None)"
    )
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    assert not classes, f"{name_of(path)}: public classes never live in a script: move {classes} to a module"


@each([path for path in OWN if path.name.startswith("test_")])
def test_a_test_file_can_be_run_as_a_script(path):
    source = path.read_text(encoding="utf-8")
    assert has_main_guard(tree_of(path)), f"{name_of(path)} needs an if __name__ == '__main__' guard"
    assert "pytest.main([" in source, f"{name_of(path)}: running it as a script must run pytest on it"


# --- every file ---


@each(OWN)
def test_names_shadow_nothing(path):
    requirements = [r for r in PYPROJECT["project"]["dependencies"]]
    requirements += [r for group in PYPROJECT["dependency-groups"].values() for r in group if isinstance(r, str)]
    packages = {re.match(r"[\w-]+", text)[0].replace("-", "_").lower() for text in requirements}
    packages |= {"triton", "importlinter", "evaluate", "trl", "vllm", "huggingface_hub", "accelerate"}
    assert path.stem == "__init__" or path.stem not in packages | set(sys.stdlib_module_names), (
        f"{name_of(path)} has the name of a module of the standard library or of a dependency"
    )


@each(PRODUCT)
def test_files_and_functions_stay_short(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 450, f"{name_of(path)} has {lines} lines: aim at 400, one idea per file"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{name_of(path)}: {node.name} has {length} lines: aim at 40"


@each(OWN)
def test_no_loose_ends(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not re.search(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b", line), f"{name_of(path)}:{number}: {line.strip()}"
        assert not re.search(r"[\"' (](/home|/root|/Users|/work)/", line), (
            f"{name_of(path)}:{number}: a path of one machine"
        )


@each(OWN)
def test_imports_are_absolute_and_never_of_another_projects_script(path):
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.ImportFrom):
            continue
        assert node.level == 0, f"{name_of(path)}:{node.lineno}: a relative import"
        for module in [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]:
            target = ROOT / (module.replace(".", "/") + ".py")
            if path.parent.name.startswith("project") and target.exists() and target.parent != path.parent:
                assert kind_of(target) not in ("script", "benchmark", "download", "test") or "common" in target.parts, (
                    f"{name_of(path)}:{node.lineno}: imports {module}, a script of another project"
                )


# --- README.md ---

HEADINGS = {
    "what you will learn": r"learn",
    "the papers": r"paper",
    "the idea": r"idea|how it works",
    "the commands": r"command|run|use|using|try it",
    "results": r"result|measured",
    "what to try next": r"next|exercise",
}


@each_project
def test_the_readme_has_its_sections(folder):
    page = folder / "README.md"
    assert page.exists(), f"{folder.name} has no README.md"
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = [line.lower() for line in re.findall(r"^#+ +(.+)$", prose, re.MULTILINE)]
    missing = [name for name, pattern in HEADINGS.items() if not any(re.search(pattern, h) for h in headings)]
    assert not missing, f"{name_of(page)} lacks a section on {', '.join(missing)}; it has {headings}"
    assert text.count("```") >= 4, f"{name_of(page)} needs a diagram and the commands with their real output"
    assert any(title in text for title in papers()), f"{name_of(page)} cites no paper by its published title"
    assert "memory" in text.lower() and re.search(r"\bmin(ute)?s?\b", text), (
        f"{name_of(page)}: state memory and minutes"
    )
    for picture in re.findall(r"!\[[^\]]*\]\(([^)#]+)\)", text):
        assert picture.startswith("http") or (folder / picture).exists(), (
            f"{name_of(page)} shows {picture}: no such file"
        )


@each_project
def test_the_readme_shows_the_measured_results(folder):
    if folder.name.startswith(WITHOUT_BENCHMARK):
        pytest.skip("has no benchmark")
    page = folder / "README.md"
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    assert benchmark.START in text and benchmark.END in text, f"{name_of(page)} needs the markers of its results table"
    assert benchmark.is_fresh(folder.name), f"{name_of(page)} is out of date: run `uv run python -m common.benchmark`"
    assert "![" in text, f"{name_of(page)} needs a plot"


# --- the checks themselves ---


def test_lists_of_papers_are_read_with_their_second_lines():
    docstring = 'Title\n\nThis file implements X following:\n- "A\n  B" (C, 2017) - d\n- "E" (F, 2018) - g\n\nMore.'
    assert bullets(docstring) == ['"A B" (C, 2017) - d', '"E" (F, 2018) - g']


def test_sections_are_found_with_their_lengths():
    docstring = "Do it.\n\nPAPER: a\n  b\nPAPER CONTEXT: c\nINTUITION: d\nIMPLEMENTATION: e\nf\ng\nh\nWHY: i\n\nShapes."
    lengths = [("PAPER:", 2), ("PAPER CONTEXT:", 1), ("INTUITION:", 1), ("IMPLEMENTATION:", 4), ("WHY:", 1)]
    assert sections_of(docstring) == lengths
    assert sections_of("PAPER: a\nWHY: b") == [("PAPER:", 1), ("WHY:", 1)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class A(nn.Module): pass", True), ("class _A(nn.Module): pass", False), ("class A(ValueError): pass", False),
        ("class A(Protocol):\n  def f(self): ...", False), ("class A(NamedTuple):\n  x: int", False),
        ("@dataclass\nclass A:\n  x: int", False), ("@dataclass(frozen=True)\nclass A:\n  def f(self): pass", True),
        ("@dataclass\nclass A:\n  @property\n  def f(self): pass", False),
    ],
)  # fmt: skip
def test_which_classes_are_components(source, expected):
    assert is_component(ast.parse(source).body[0]) is expected


if __name__ == "__main__":
    for project in PROJECTS:
        print(f"{project.name}: " + ", ".join(f"{path.stem} ({kind_of(path)})" for path in python_files(project)))
    raise SystemExit(pytest.main([__file__]))
