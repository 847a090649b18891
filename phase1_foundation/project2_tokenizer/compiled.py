"""
Compiled

This file implements how the loops of the fast path are compiled and kept, following:
- "Neural Machine Translation of Rare Words with Subword Units" (Sennrich et al., 2016) - loops worth compiling

Each component is explained with paper references for educational purposes.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from numba import njit

_SOURCES = ("scanner", "word_keys", "word_counts", "pair_index", "fast_training", "fast_encoding", "compiled")


def _stamp() -> str:
    """A hash of all files that hold compiled functions."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in _SOURCES)).hexdigest()


_STAMP = _stamp()


def compiled(function: Callable) -> Callable:
    """
    Compile a function when it is first called, without the interpreter lock, and keep the result on disk.

    PAPER: arXiv:1508.07909, section 3.2: millions of steps over integers, each of them trivial.
    PAPER CONTEXT: The paper's own code is plain Python, which takes hours where this takes seconds.
    INTUITION: Python decides at every step what `+` means; for loops over arrays of integers that is all it does.
    IMPLEMENTATION: numba; its cache looks only at the file a function is in, but ours call each other across files, so
        the cache is tied to the content of all of them: change one and everything is compiled anew. Processes that
        start together take turns at a function's cache, and a damaged one is thrown away; numba does neither.
    WHY: Half a minute of compilation is paid once a machine, and an edited loop is never shadowed by an old one.
    """
    dispatcher = njit(cache=True, nogil=True)(function)
    cache_file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if hasattr(cache_file, "_source_stamp"):
        cache_file._source_stamp = _STAMP
        _take_turns(cache_file)
    return dispatcher


def _take_turns(cache_file) -> None:
    """Let one process at a time read or write the cache of a function.

    Two processes that save different signatures at once would give both the same file name, and the next one to load
    would run the wrong machine code.
    """
    lock = FileLock(f"{cache_file._index_path}.lock")

    def locked(action):
        @functools.wraps(action)
        def turn(*arguments):
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            with lock:
                return action(*arguments)

        return turn

    cache_file.load, cache_file.save = locked(_forgiving(cache_file)), locked(cache_file.save)


def _forgiving(cache_file) -> Callable:
    """The cache's `load`, which finds nothing where a file is damaged, so that the function is compiled again."""
    load = cache_file.load

    @functools.wraps(load)
    def load_or_flush(*arguments):
        try:
            return load(*arguments)
        except Exception:  # a damaged pickle can raise anything
            cache_file.flush()
            return None

    return load_or_flush
