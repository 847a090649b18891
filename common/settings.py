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
import inspect
import io
import re
import sys
import tokenize
import types
import typing
from dataclasses import dataclass
from pathlib import Path

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

    def __init__(self, values, overrides, constants):
        super().__init__(**values)
        self.__dict__["overrides"] = frozenset(overrides)
        self.__dict__["constants"] = constants

    def as_dict(self):
        """The constants as plain JSON values (paths as text, tuples as lists)."""
        return {name: _plain(getattr(self, name)) for name in self.constants}


def _plain(value):
    """Turn one value into what JSON can hold."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, dict, type(None))) else str(value)


def constants_of(config):
    """All constants of a config module by name, those of its ``BASE_CONFIG`` first."""
    base = getattr(config, "BASE_CONFIG", None)
    found = constants_of(base) if base is not None else {}
    comments, sections = _comments(Path(config.__file__).read_text(encoding="utf-8"))
    annotations = typing.get_type_hints(config)
    for name, default in vars(config).items():
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name) or inspect.ismodule(default):
            continue
        kind = annotations.get(name, type(default))
        inherited = found.get(name)
        text = comments.get(name) or (inherited.help if inherited else "")
        section = sections.get(name) or (inherited.section if inherited else "Settings")
        found[name] = Constant(name, default, kind, text, section)
    return found


def _comments(source):
    """Read the trailing comment and the section of every constant from the source text."""
    comments, sections, section = {}, {}, None
    name, first_of_line, depth = None, True, 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            heading = _SECTION.match(token.string)
            if heading and first_of_line:
                section = heading[1]
            elif name and not comments.get(name):
                comments[name] = token.string.lstrip("# ").strip()
        elif token.type == tokenize.NAME and first_of_line and depth == 0 and token.start[1] == 0:
            name = token.string if token.string.isupper() else None
            if name and section:
                sections[name] = section
        elif token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        if token.type == tokenize.NEWLINE:
            name = None
        layout = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.COMMENT)
        first_of_line = token.type in layout
    return comments, sections


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
    values = {name: given.get(name, constant.default) for name, constant in constants.items()}
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
    if kind is type(None) or not isinstance(kind, type) or issubclass(kind, Path):
        kind = str
    return kind, optional or constant.default is None, False


def _reader(kind, optional):
    """A function that turns the text of a flag into a value: 1e6 and 1_000_000 are integers, too."""

    def read(text):
        if optional and text.lower() in ("none", ""):
            return None
        if kind is int:
            number = float(text) if re.search(r"[.eE]", text) else int(text)
            if number != int(number):
                raise ValueError(text)
            return int(number)
        return kind(text)

    read.__name__ = kind.__name__  # argparse names the type in its message
    return read


def print_config(settings):
    """Print every constant with its value, its meaning, and a ``*`` where a flag overrode the default."""
    constants = getattr(settings, "constants", None) or constants_of(settings)
    overrides = getattr(settings, "overrides", ())
    section = None
    for constant in sorted(constants.values(), key=lambda c: list(constants).index(c.name)):
        if constant.section != section:
            section = constant.section
            print(f"{section}:")
        mark = "*" if constant.name in overrides else " "
        value = getattr(settings, constant.name)
        print(f"{mark} {constant.name:<24} {value!s:<28} {constant.help}".rstrip())
    sys.stdout.flush()
