"""One context for the chores of a script, so that a script holds only its technique.

`Run` reads the settings, seeds, picks the device, joins a process group when started by ``torch.distributed.run``,
writes ``metrics.jsonl``, turns the first Ctrl-C into a request to stop, and turns errors that a user can cause into
one line instead of a traceback.
"""

import contextlib
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from common import settings as settings_module
from common.device import check_device, device_name, pick_device, reset_peak_memory


class Run:
    """The frame of a script::

        def main(argv=None):
            with Run(config, argv, description=__doc__) as run:
                model = GPT(...).to(run.device)
                ...
                run.log(step=1, loss=2.3)

    Args:
        config: the project's config module.
        argv: the command line, or None for ``sys.argv[1:]``.
        sections: the config's sections that become flags of this script.
        description: the text of ``--help``; usually the script's ``__doc__``.
        quiet: do not print the configuration.

    Attributes:
        settings: the validated copy of the constants.
        device: a `torch.device`; on several GPUs each process has its own.
        rank, world_size: this process among those of the run; 0 and 1 without ``torch.distributed.run``.
        stopping: True after the first Ctrl-C; loops finish their step, save and leave. A second one interrupts.

    Raises:
        SystemExit: with status 2 and one ``error: ...`` line, for a ValueError, an OSError or a missing library. Set
            LLM_ROADMAP_TRACEBACK=1 to see where it came from.
    """

    def __init__(self, config, argv=None, sections=None, description=None, quiet=False):
        self.config, self.argv, self.sections = config, argv, sections
        self.description, self.quiet = description, quiet
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.stopping, self._metrics, self._old_handler, self._joined = False, None, None, False

    def __enter__(self):
        try:
            self._start()
        except BaseException as error:
            if self.__exit__(type(error), error, error.__traceback__) is not True:
                raise
        return self

    def _start(self):
        self.settings = settings_module.load(self.config, self.argv, self.sections, self.description)
        seed = getattr(self.settings, "SEED", 0)
        if seed is not None:  # SEED = None: every run differs
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries that use the global generator
            torch.manual_seed(seed)
        name = str(getattr(self.settings, "DEVICE", None) or pick_device())
        if self.world_size > 1 and name.startswith("cuda"):
            name = f"cuda:{os.environ['LOCAL_RANK']}"  # never touch another process's GPU, not even to look at it
        self.device = check_device(name)
        reset_peak_memory(self.device)  # of an earlier run in this process
        if self.world_size > 1:
            self._join()
        self._old_handler = _install(self._on_interrupt)
        if not self.quiet and self.is_main:
            settings_module.print_config(self.settings)
            print(
                f"Running on {device_name(self.device)}" + f" x {self.world_size}" * (self.world_size > 1), flush=True
            )

    def _join(self):
        """Join the process group that ``torch.distributed.run`` announced in the environment."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self._joined = True

    @property
    def is_main(self):
        """True for the one process that prints and writes files."""
        return self.rank == 0

    def _on_interrupt(self, number, frame):
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        if self.is_main:  # not print(): the signal may have come in the middle of one
            os.write(2, b"\nStopping after this step (press Ctrl-C again to stop at once) ...\n")

    def print(self, *values, **options):
        """Print, once in a distributed run."""
        if self.is_main:
            print(*values, **{"flush": True, **options})

    def metrics(self, path):
        """Append what `log` gets to the JSON Lines file at `path`."""
        if self.is_main:
            if self._metrics:
                self._metrics.close()
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._metrics = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by __exit__

    def log(self, **fields):
        """Append one line to ``metrics.jsonl`` (nothing happens before `metrics` named a file)."""
        if self._metrics:
            self._metrics.write(json.dumps(fields) + "\n")
            self._metrics.flush()

    def __exit__(self, kind, error, traceback):
        if self._metrics:
            with contextlib.suppress(OSError):  # every line was flushed when it was logged
                self._metrics.close()
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()
        if kind is KeyboardInterrupt:
            raise SystemExit(130) from None
        if kind is not None and issubclass(kind, (ValueError, OSError)) and not os.environ.get("LLM_ROADMAP_TRACEBACK"):
            print(f"error: {' '.join(str(error).splitlines()) or kind.__name__}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        if kind is ModuleNotFoundError and _optional(error.name) and not os.environ.get("LLM_ROADMAP_TRACEBACK"):
            print(f"error: this needs {error.name}, which the small install leaves out: `uv sync --group all` brings "
                  f"it, and every other library", file=sys.stderr, flush=True)  # fmt: skip
            raise SystemExit(2) from None
        if kind is None and self.stopping:
            raise SystemExit(130)  # all is saved, but whoever started this script must not take it for finished
        return False


def _optional(module):
    """Whether a module that was not found is a library, and not a part of this repository."""
    return module and not module.startswith(("common", "phase"))


@contextlib.contextmanager
def interruptible():
    """Within this block Ctrl-C raises KeyboardInterrupt at once, where there is nothing to save; `Run` would only take
    it for a request to stop after a step."""
    handler = _install(signal.default_int_handler)
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)


def ask(question):
    """A line from the keyboard; None for Ctrl-D and Ctrl-C."""
    try:
        with interruptible():
            return input(question)
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _install(handler):
    """Install a SIGINT handler where that is allowed (only the main thread may); returns the old one or None."""
    try:
        return signal.signal(signal.SIGINT, handler)
    except ValueError:
        return None
