"""Checkpoints that survive power cuts, full disks and foreign files.

A checkpoint is one dictionary in a ``.pt`` file. It is written to a temporary file beside its target, flushed to the
disk, and renamed: whoever looks sees the old file or the new one, never half of one. It is read with
``weights_only=True``, so a hostile file cannot run code.
"""

import contextlib
import glob
import os
import time
import warnings
from pathlib import Path

import torch

REQUIRED = ("iter", "model_state_dict", "optimizer_state_dict", "train_loss", "val_loss")


class CheckpointError(ValueError):
    """A file that is no checkpoint of ours, or a damaged one; the message names it."""


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path; when the block ends well its file replaces `path` in one step, else it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # left by a process that was killed
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > 3600:
                stale.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the data must reach the disk before the new name does
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path, content):
    """Write bytes or text to `path` so that no reader ever sees half of it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def save(path, checkpoint):
    """Write a checkpoint atomically.

    Args:
        path: where to; folders are made as needed.
        checkpoint: a dict with at least the keys of `REQUIRED`; tensors, numbers, text, lists and dicts alone.

    Raises:
        ValueError: a required key is missing.
        OSError: the disk is full or not writable; an older file at `path` stays as it was.
    """
    missing = [key for key in REQUIRED if key not in checkpoint]
    if missing:
        raise ValueError(f"a checkpoint needs the keys {', '.join(REQUIRED)}; missing: {', '.join(missing)}")
    with atomic_path(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk this way
            raise OSError(
                f"could not write the checkpoint {path} ({str(error).splitlines()[0]}): is the disk full? "
                f"An older checkpoint there was left as it was."
            ) from error


def load(path, map_location="cpu"):
    """Read a checkpoint written by `save`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, or not a checkpoint of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: train one first, or give another path")
    with open(path, "rb") as file:  # what the system refuses (permissions, say) is no damage and keeps its own error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's advice about foreign files would come before our error
                checkpoint = torch.load(file, map_location=map_location, weights_only=True)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # a damaged pickle can make its reader raise anything
            raise CheckpointError(
                f"{path} is damaged or no checkpoint of this project ({_first_line(error)}): "
                f"use another one; the best and the last are kept side by side"
            ) from error
    if not isinstance(checkpoint, dict) or any(key not in checkpoint for key in REQUIRED):
        raise CheckpointError(f"{path} is a PyTorch file but no checkpoint of this project: it needs {REQUIRED}")
    return checkpoint


def _first_line(error):
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
