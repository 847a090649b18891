"""
Safe Pickle

This file implements reading pickled tokenizers without running anything that is in them, following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - a tokenizer is a vocabulary and a
  list of merges: plain data, so its file needs no code

A pickle is a program for a small stack machine, and some of its instructions import and call functions: whoever opens a
stranger's file runs the stranger's code. A tokenizer needs none of these instructions. Every opcode is checked before
the first one is executed: only those that build dicts, lists, tuples, sets, strings and integers may pass, no length
may reach beyond the file, and no memo index beyond the number of bytes in it (such a one makes the unpickler allocate
until the machine dies).

Each component is explained with paper references for educational purposes.
"""

import io
import pickle
import struct
from pathlib import Path

MAX_BYTES = 512 << 20
_NO_ARGUMENT = {
    pickle.MARK, pickle.STOP, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE, pickle.EMPTY_SET,
    pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.ADDITEMS, pickle.FROZENSET,
    pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.MEMOIZE,
}  # fmt: skip
_FIXED = {pickle.PROTO: 1, pickle.FRAME: 8, pickle.BININT: 4, pickle.BININT1: 1, pickle.BININT2: 2}
_MEMO = {pickle.BINPUT: 1, pickle.LONG_BINPUT: 4, pickle.BINGET: 1, pickle.LONG_BINGET: 4}
_SIZED = {pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8, pickle.LONG1: 1}
_LENGTH = {1: "<B", 4: "<I", 8: "<Q"}


class UnsafePickleError(ValueError):
    """The file is not a plain pickle of builtin containers, strings and integers."""


class _PlainUnpickler(pickle.Unpickler):
    """The second wall: should an opcode ever ask for a class or an outside object, it gets an error."""

    def find_class(self, module, name):
        raise UnsafePickleError(f"it wants to import {module}.{name}")

    def persistent_load(self, pid):
        raise UnsafePickleError("it refers to an object outside the file")


def _plans() -> list[tuple[int, str]]:
    """For each opcode: size of its argument (or of the length before it) and kind ("" forbidden)."""
    plans = [(0, "")] * 256
    for codes, kind in (
        (dict.fromkeys(_NO_ARGUMENT, 0), "plain"),
        (_FIXED, "plain"),
        (_MEMO, "memo"),
        (_SIZED, "sized"),
    ):
        for code, size in codes.items():
            plans[code[0]] = (size, kind)
    return plans


_PLANS = _plans()


def check(data: bytes) -> None:
    """
    Raise UnsafePickleError unless a pickle holds nothing but plain data.

    PAPER: none; PEP 307 and the standard library's `pickletools` describe the opcodes.
    PAPER CONTEXT: Protocol 2 and later are binary: each opcode tells how many bytes of argument follow.
    INTUITION: Read the program without running it, and refuse it if it can do more than build data.
    IMPLEMENTATION: Walk from opcode to opcode by a table of argument sizes.
    WHY: An allow-list has no holes to forget; a deny-list has those that nobody thought of.

    >>> check(pickle.dumps({"merges": [("a", "b")], "size": 257}))
    >>> check(pickle.dumps(io.BytesIO()))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    phase1_foundation.project2_tokenizer.safe_pickle.UnsafePickleError: opcode STACK_GLOBAL ... more than plain data
    """
    i, end = 0, len(data)
    while i < end:
        code = data[i]
        size, kind = _PLANS[code]
        i += 1
        if not kind:
            raise UnsafePickleError(f"opcode {_opcode_name(code)} at byte {i - 1:,} can do more than plain data")
        if i + size > end:
            break
        if kind != "plain":
            argument = struct.unpack_from(_LENGTH[size], data, i)[0]
            if argument > (end if kind == "memo" else end - i - size):
                raise UnsafePickleError(f"opcode {_opcode_name(code)} at byte {i - 1:,} reaches beyond the file")
            if kind == "sized":
                i += argument
        i += size
        if code == pickle.STOP[0]:
            return
    raise UnsafePickleError("it ends in the middle: it was cut off")


def _opcode_name(code: int) -> str:
    """The name that `pickletools` gives an opcode."""
    import pickletools

    names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    return names.get(code, f"0x{code:02x}")


def loads(data: bytes, name: str = "the pickle") -> object:
    """Unpickle plain data; anything else raises UnsafePickleError with `name` in its message, and nothing is run."""
    try:
        check(data)
        return _PlainUnpickler(io.BytesIO(data)).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{name} is refused: {error}; only files written by `BPETokenizer.save` are read"
        ) from None
    except (pickle.UnpicklingError, TypeError, ValueError, EOFError, IndexError, KeyError, AttributeError) as error:
        raise UnsafePickleError(f"{name} is damaged ({error}): write it again with `BPETokenizer.save`") from None
    except (MemoryError, RecursionError) as error:
        raise UnsafePickleError(f"{name} is refused: reading it needs too much ({type(error).__name__})") from None


def load(path: str | Path) -> object:
    """`loads` for a file; a missing one raises FileNotFoundError."""
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UnsafePickleError(f"{path} has {size:,} bytes: a tokenizer has at most {MAX_BYTES:,}")
    return loads(path.read_bytes(), str(path))
