"""Settings: a config module of UPPERCASE constants becomes the flags of a script.

A config file is plain Python that a learner reads and edits. Each constant carries its help text as a trailing
comment, and a line ``# == Name ==`` opens a section::

    # == Model ==
    N_EMBD = 384  # width of the residual stream
    TOP_K: int | None = 50  # keep only the k most likely tokens

`load` reads the constants, lets the command line override them (``--n_embd 256``, dashes work too), validates the
result and returns a copy. The module itself is never changed, so two runs in one process cannot disturb each other.
"""

import argparse
import ast
import copy
import inspect
import io
import json
import math
import re
import sys
import tokenize
import types
import typing
from dataclasses import dataclass
from pathlib import Path, PurePath

_SECTION = re.compile(r"^#\s*==+\s*(.+?)\s*==+\s*$")


@dataclass(frozen=True)
class Constant:
    """One UPPERCASE constant of a config module: its default, type, help text and section."""

    name: str
    default: object
    kind: object  # a type, or an annotation such as `int | None`
    help: str
    section: str


class Settings(types.SimpleNamespace):
    """A copy of a config's constants after the command line had its say.

    ``settings.N_EMBD`` reads a constant; ``settings.overrides`` names those that a flag changed.
    """

    def __init__(self, values=(), overrides=(), constants=()):
        super().__init__(**dict(values))
        self.__dict__["overrides"] = frozenset(overrides)
        self.__dict__["constants"] = constants

    def as_dict(self):
        """The constants as plain JSON values (paths as text, tuples as lists)."""
        return {name: _plain(getattr(self, name)) for name in self.constants}


def _plain(value):
    """Turn one value into what JSON can hold."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def constants_of(config):
    """All constants of a config module by name, those of its ``BASE_CONFIG`` first."""
    base = getattr(config, "BASE_CONFIG", None)
    found = constants_of(base) if base is not None else {}
    annotations = typing.get_type_hints(config)
    for name, (text, section) in _declared(Path(config.__file__).read_text(encoding="utf-8")).items():
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or name == "BASE_CONFIG" or not hasattr(config, name):
            continue
        default, inherited = getattr(config, name), found.get(name)
        kind = annotations.get(name, type(default))
        if name not in annotations and inherited and inherited.kind is not type(inherited.default):
            kind = inherited.kind  # a new default keeps the annotation of the inherited constant
        text = text or (inherited.help if inherited else "")
        section = section or (inherited.section if inherited else "Settings")
        found[name] = Constant(name, default, kind, text, section)
    return found


def _declared(source):
    """The names that a module assigns itself (not those it imports): name -> (trailing comment, section or None)."""
    comments, headings = {}, []  # line number -> text of the comment behind code; (line number, section)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            heading = _SECTION.match(token.string)
            if token.line[: token.start[1]].strip():
                comments[token.start[0]] = token.string.lstrip("# ").strip()
            elif heading:
                headings.append((token.start[0], heading[1]))
    declared = {}
    for statement in _assignments(ast.parse(source).body):
        first, last = statement.lineno, statement.end_lineno
        # The comment behind the end of the statement counts, else the first one inside it.
        text = comments.get(last) or next((comments[line] for line in range(first, last) if line in comments), "")
        section = next((name for line, name in reversed(headings) if line < first), None)
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for name in (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)):
            known = declared.get(name, ("", None))  # the second branch of an if need not say it again
            declared[name] = (known[0] or text, known[1] or section)
    return declared


def _assignments(statements):
    """The assignments of a module, also those inside its if, else, try and except blocks."""
    for statement in statements:
        if isinstance(statement, (ast.Assign, ast.AnnAssign)):
            yield statement
        elif isinstance(statement, (ast.If, ast.Try)):
            yield from _assignments([*statement.body, *statement.orelse])
            for handler in getattr(statement, "handlers", []):
                yield from _assignments(handler.body)


def load(config, argv=None, sections=None, description=None):
    """Read the flags of a script and return the validated `Settings`.

    Args:
        config: a module of UPPERCASE constants, with an optional ``validate_config(settings)``.
        argv: the command line without the program's name; None means ``sys.argv[1:]``.
        sections: names of the sections whose constants become flags; None means all of them. The others keep
            their defaults and are part of the result all the same.
        description: text at the top of ``--help``.

    Raises:
        ValueError: the combination of values is refused by ``validate_config``.
        SystemExit: ``--help``, an unknown flag, or a value of the wrong type.
    """
    constants = constants_of(config)
    known = {constant.section for constant in constants.values()}
    if sections is not None and not set(sections) <= known:
        raise ValueError(f"sections={tuple(sections)}: {config.__name__} has only {', '.join(sorted(known))}")
    parser = argparse.ArgumentParser(
        description=inspect.cleandoc(description) if description else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    groups = {}
    for constant in constants.values():
        if sections is None or constant.section in sections:
            group = groups.setdefault(constant.section, parser.add_argument_group(constant.section.lower()))
            _add_flag(group, constant)
    given = vars(parser.parse_args(argv))
    values = {name: given.get(name, copy.deepcopy(constant.default)) for name, constant in constants.items()}
    for name in given.keys() & constants.keys():
        if isinstance(values[name], list) and None in values[name]:
            if len(values[name]) > 1:
                parser.error(f"argument --{name.lower()}: none stands for the whole list, so give it alone")
            values[name] = None
        if isinstance(constants[name].default, tuple) and isinstance(values[name], list):
            values[name] = tuple(values[name])
    settings = Settings(values, given.keys() & constants.keys(), constants)
    if hasattr(config, "validate_config"):
        config.validate_config(settings)
    return settings


def _add_flag(group, constant):
    """Add the flag of one constant, spelled with underscores and with dashes."""
    plain = "--" + constant.name.lower()
    names = [plain] if "_" not in plain else [plain, plain.replace("_", "-")]
    text = f"{constant.help} (default: {constant.default})".replace("%", "%%").strip()
    kind, optional, many = _shape_of(constant)
    options = {"dest": constant.name, "default": argparse.SUPPRESS, "help": text}
    if kind is bool:
        off = ["--no_" + constant.name.lower(), "--no-" + constant.name.lower().replace("_", "-")]
        group.add_argument(*names, action="store_true", **options)
        if constant.name.startswith("NO_"):
            return  # nobody needs --no_no_fallback
        group.add_argument(
            *dict.fromkeys(off),
            action="store_false",
            dest=constant.name,
            default=argparse.SUPPRESS,
            help=f"turn --{constant.name.lower()} off",
        )
        return
    parse = _reader(kind, optional)
    group.add_argument(*names, type=parse, metavar=kind.__name__.upper(), **options, **({"nargs": "*"} if many else {}))


def _shape_of(constant):
    """(element type, may it be None, is it a list) of a constant."""
    kind, optional = constant.kind, False
    arguments = [a for a in typing.get_args(kind) if a is not type(None)]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind, optional = arguments[0], True
    if typing.get_origin(kind) in (list, tuple) or kind in (list, tuple):
        inner = typing.get_args(kind)
        first = constant.default[0] if constant.default else ""
        return (inner[0] if inner else type(first)), optional, True
    if kind is type(None) or not isinstance(kind, type):
        kind = typing.get_origin(kind) if typing.get_origin(kind) is dict else str
    if issubclass(kind, PurePath):
        kind = Path
    return kind, optional or constant.default is None, False


def _reader(kind, optional):
    """A function that turns the text of a flag into a value: 1e6 is an integer, too; a dict is written as JSON."""

    def read(text):
        if optional and text.lower() in ("none", ""):
            return None
        if kind is int:
            number = float(text) if re.search(r"[.eE]", text) else int(text)
            if not math.isfinite(number) or number != int(number):
                raise ValueError(text)
            return int(number)
        if kind is dict:
            value = json.loads(text)
            if not isinstance(value, dict):
                raise ValueError(text)
            return value
        return kind(text)

    read.__name__ = kind.__name__  # argparse names the type in its message
    return read


def print_config(settings):
    """Print every constant with its value, its meaning, and a ``*`` where a flag overrode the default."""
    constants = getattr(settings, "constants", None) or constants_of(settings)
    overrides = getattr(settings, "overrides", ())
    if overrides:
        print("(* changed by a flag)")
    section, order = None, list(dict.fromkeys(constant.section for constant in constants.values()))
    for constant in sorted(constants.values(), key=lambda constant: order.index(constant.section)):
        if constant.section != section:
            section = constant.section
            print(f"{section}:")
        mark = "*" if constant.name in overrides else " "
        value = getattr(settings, constant.name, constant.default)  # a module does not hold its BASE_CONFIG
        print(f"{mark} {constant.name:<24} {value!s:<28} {constant.help}".rstrip())
    sys.stdout.flush()
