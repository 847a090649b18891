"""A pipeline of stages, each skipped when its outputs stand and its inputs have not changed.

The idea of ``make``, with contents instead of dates: a stage's key is a hash of its settings and of the files it reads.
The key is written after the stage has ended well, so a stage that was interrupted runs again.
"""

import hashlib
import json
import time
from pathlib import Path

from common.checkpoint import atomic_write
from common.progress import clock


def digest(path):
    """The SHA-256 of a file, as text."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Stages:
    """Run stages in order and remember which of them are up to date.

    Args:
        record: the JSON file that remembers keys and times.
        echo: how to print.
    """

    def __init__(self, record, echo=print):
        self.record, self.echo = Path(record), echo
        self.done = json.loads(self.record.read_text(encoding="utf-8")) if self.record.exists() else {}
        self.order = []

    def run(self, name, action, *, files=(), settings=None, outputs=()):
        """Run ``action(fresh)`` unless `outputs` exist and neither `files` nor `settings` have changed.

        `fresh` is True when the inputs differ from those of the last attempt, so that whatever an earlier attempt
        left half-done must not be continued.

        Returns:
            True if the action ran.
        """
        self.order.append(name)
        inputs = [[str(Path(file).name), digest(file)] for file in files]
        key = hashlib.sha256(json.dumps([inputs, settings], sort_keys=True).encode()).hexdigest()
        old = self.done.get(name, {})
        if old.get("key") == key and old.get("finished") and all(Path(path).exists() for path in outputs):
            self.echo(f"\n== {name}: up to date (took {clock(old['seconds'])})")
            return False
        self.echo(f"\n== {name}")
        fresh = old.get("key") != key
        spent = 0.0 if fresh or old.get("finished") else old["seconds"]  # by attempts that this one continues
        self._remember(name, {"key": key, "finished": False, "seconds": spent})
        start = time.perf_counter()
        try:
            action(fresh)
        except BaseException:
            self._remember(name, {"key": key, "finished": False, "seconds": spent + time.perf_counter() - start})
            raise
        seconds = spent + time.perf_counter() - start
        self._remember(name, {"key": key, "finished": True, "seconds": seconds})
        self.echo(f"== {name}: done in {clock(seconds)}")
        return True

    def _remember(self, name, entry):
        """Keep what is known of a stage, on disk."""
        self.done[name] = entry
        atomic_write(self.record, json.dumps(self.done, indent=1) + "\n")

    def times(self):
        """(name, seconds) of the stages named so far, in order; interrupted attempts are counted in."""
        return [(name, self.done[name]["seconds"]) for name in self.order]
