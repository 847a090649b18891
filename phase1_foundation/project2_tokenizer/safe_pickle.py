"""
Safe Pickle

This file implements reading pickled tokenizers without running anything that is in them, following:
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - a tokenizer is a vocabulary and a
  list of merges: plain data, so its file needs no code

A pickle is a program for a small stack machine, and some of its instructions import and call functions: whoever opens a
stranger's file runs the stranger's code. A tokenizer needs none of these instructions. So the standard library's
machine is not started at all: here is a smaller one, which knows only what the format consists of. Its data cannot be
nested deeply (Python's own recursion over such data overflows the stack of the processor), and its keys are strings and
small numbers (large ones can be chosen so that a dict needs quadratic time).

Each component is explained with paper references for educational purposes.
"""

import pickle
from pathlib import Path

MAX_BYTES = 128 << 20
MAX_CONTAINERS = 64  # a tokenizer has half a dozen
MAX_KEY = 1 << 32
_TEXTS = {pickle.SHORT_BINUNICODE: 1, pickle.BINUNICODE: 4, pickle.BINUNICODE8: 8}  # bytes of the length before it
_INTEGERS = {pickle.BININT1: 1, pickle.BININT2: 2, pickle.BININT: 4, pickle.LONG1: 1}
_PUTS = {pickle.MEMOIZE: 0, pickle.BINPUT: 1, pickle.LONG_BINPUT: 4}
_GETS = {pickle.BINGET: 1, pickle.LONG_BINGET: 4}
_CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
_CONTAINERS = {pickle.EMPTY_DICT: dict, pickle.EMPTY_LIST: list}
_FILLS = (pickle.SETITEM, pickle.SETITEMS, pickle.APPEND, pickle.APPENDS)
_IGNORED = {pickle.PROTO: 1, pickle.FRAME: 8}  # a frame only says how much to read at once
_ARGUMENT = _TEXTS | _INTEGERS | _PUTS | _GETS | _IGNORED  # opcode -> bytes of the number behind it
_ARGUMENT |= dict.fromkeys([*_CONSTANTS, *_CONTAINERS, *_FILLS, pickle.MARK, pickle.TUPLE2, pickle.STOP], 0)
_PLAIN = (str, int, bool, type(None))


class UnsafePickleError(ValueError):
    """The file is not a plain pickle of builtin containers, strings and integers."""


def read_plain(data: bytes) -> object:
    """
    What a pickle of plain data holds; anything that is more raises UnsafePickleError.

    PAPER: none; PEP 307 and the standard library's `pickletools` describe the opcodes.
    PAPER CONTEXT: Protocol 2 and later are binary: each opcode tells how many bytes of argument follow.
    INTUITION: Whoever has no key to the cellar cannot be talked into opening it.
    IMPLEMENTATION: A dict of dicts, lists and plain values; inside these, plain values and pairs of strings. The outer
        dict is the bottom of the stack, so "may hold containers" is asking whether something is that one object.
    WHY: An allow-list has no holes to forget; a deny-list has those that nobody thought of.

    >>> read_plain(pickle.dumps({"merges": [("a", "b")], "size": 257}))
    {'merges': [('a', 'b')], 'size': 257}
    >>> read_plain(pickle.dumps(len))
    Traceback (most recent call last):
    phase1_foundation.project2_tokenizer.safe_pickle.UnsafePickleError: opcode STACK_GLOBAL can do more than plain data
    """
    stack, marks, memo, at, containers = [], [], {}, 0, 0
    while True:
        op = data[at : at + 1]
        if op and op not in _ARGUMENT:
            raise UnsafePickleError(f"opcode {_opcode_name(op[0])} can do more than plain data")
        begin = at + 1 + _ARGUMENT.get(op, 0)
        number = int.from_bytes(data[at + 1 : begin], "little")
        at = begin + (number if op in _TEXTS or op == pickle.LONG1 else 0)
        if not op or at > len(data):
            raise UnsafePickleError("it was cut off, or says that it is longer than it is")
        if op in _TEXTS:
            stack.append(data[begin:at].decode("utf-8", "surrogatepass"))
        elif op in _PUTS:
            memo[len(memo) if op == pickle.MEMOIZE else number] = stack[-1]
        elif op in _GETS:
            stack.append(memo[number])
        elif op == pickle.TUPLE2:
            stack[-2:] = [_pair(stack[-2], stack[-1])]
        elif op == pickle.LONG1:
            stack.append(_long(data[begin:at]))
        elif op in _INTEGERS:
            stack.append(number - (1 << 32) if op == pickle.BININT and number >> 31 else number)
        elif op == pickle.MARK:
            marks.append(len(stack))
        elif op in _FILLS:
            items = marks.pop() if op in (pickle.SETITEMS, pickle.APPENDS) else len(stack) - 1 - (op == pickle.SETITEM)
            _fill(stack, items)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _CONTAINERS:
            containers += 1
            if containers > MAX_CONTAINERS:
                raise UnsafePickleError(f"it holds more than {MAX_CONTAINERS} dicts and lists")
            stack.append(_CONTAINERS[op]())
        elif op == pickle.STOP:
            return stack.pop()


def _pair(left: object, right: object) -> tuple[str, str]:
    """A merge."""
    if type(left) is not str or type(right) is not str:
        raise UnsafePickleError(f"a pair of {type(left).__name__} and {type(right).__name__}, expected two str")
    return left, right


def _long(data: bytes) -> int:
    """An integer of up to 64 bits."""
    if len(data) > 8:
        raise UnsafePickleError(f"an integer of {len(data)} bytes, expected 8 at most")
    return int.from_bytes(data, "little", signed=True)


def _fill(stack: list, begin: int) -> None:
    """Move what lies on the stack from `begin` on into the container before it."""
    if begin < 1:
        raise IndexError("nothing to fill")
    items, target = stack[begin:], stack[begin - 1]
    del stack[begin:]
    values = items
    if type(target) is dict:
        keys, values = items[::2], items[1::2]
        if not all(type(key) is str or (type(key) is int and 0 <= key < MAX_KEY) for key in keys):
            raise UnsafePickleError(f"a key of a dict is neither a str nor an int from 0 to {MAX_KEY:,}")
        target.update(zip(keys, values, strict=True))
    else:
        target.extend(items)
    is_root = target is stack[0]
    for value in values:
        if type(value) not in _PLAIN and type(value) is not tuple and (not is_root or value is target):
            raise UnsafePickleError("its data is nested more deeply than a tokenizer's")


def _opcode_name(code: int) -> str:
    """The name that `pickletools` gives an opcode."""
    import pickletools

    names = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
    return names.get(code, f"0x{code:02x}")


def loads(data: bytes, name: str = "the pickle") -> object:
    """Unpickle plain data; anything else raises UnsafePickleError with `name` in its message, and nothing is run."""
    try:
        return read_plain(data)
    except UnsafePickleError as error:
        raise UnsafePickleError(
            f"{name} is refused: {error}; only files written by `BPETokenizer.save` are read"
        ) from None
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise UnsafePickleError(f"{name} is damaged ({error}): write it again with `BPETokenizer.save`") from None
    except MemoryError:
        raise UnsafePickleError(f"{name} is refused: there is not enough memory to read it") from None


def load(path: str | Path) -> object:
    """`loads` for a file; a missing one raises FileNotFoundError."""
    path = Path(path)
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UnsafePickleError(f"{path} has {size:,} bytes: a tokenizer has at most {MAX_BYTES:,}")
    return loads(path.read_bytes(), str(path))
