"""Talk to a model in the terminal.

    uv run python chat.py
    uv run python chat.py --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct --temperature 0.3
    uv run python chat.py --system "Answer in one sentence."

It speaks through the engine of project 28, alone with it: what was said before is not read again. Any checkpoint will
do: one that was fine-tuned here is spoken to by project 4's template, one of the hub by its own,
and one that was only pre-trained goes on with a transcript.

Commands: /reset forgets the conversation, /save FILE writes it as JSON, /quit leaves (as Ctrl-D does); Ctrl-C ends an
answer, or at the prompt the chat.
"""

import contextlib
import json
import signal
import sys
from pathlib import Path

from common import CHECKPOINTS
from common import settings as common_settings
from common.checkpoint import atomic_write
from common.device import pick_device
from common.run import Run, ask
from phase1_foundation.project1_minimal_gpt.sampling import check_sampling
from phase1_foundation.project3_pretrain.loading import load, newest_checkpoint
from phase2_finetuning.project4_sft.other_templates import Transcript, template_for
from phase3_core_inference.project8_kv_cache.sampling_params import SamplingParams
from phase10_deployment.project28_serving.engine import Engine, EngineOptions, memory_for

# == Chat ==
CHECKPOINT: str | None = None  # a checkpoint, a Hugging Face folder or org/name; none: the newest that was fine-tuned
DEVICE = pick_device()  # cuda, mps or cpu
SYSTEM: str | None = None  # what the assistant is told before the conversation
MAX_NEW_TOKENS = 256  # of one answer
TEMPERATURE = 0.7  # 0: always the likeliest token
TOP_K: int | None = 50  # keep only the k most likely tokens; none: all
TOP_P: float | None = 0.95  # keep only the likeliest tokens that together reach this; none: all
SEED: int | None = None  # same answers every time; none: other ones
MEMORY_MIB: float | None = None  # for keys and values; none: enough for a whole conversation

_FINE_TUNED = ("project6", "project5", "project4", "speedrun/dpo", "speedrun/sft")  # below checkpoints/
_COMMANDS = "/reset forgets the conversation, /save FILE writes it, /quit leaves; Ctrl-C ends an answer"
_CUT = " [cut off]"  # shown behind an answer that the model did not end itself


def validate_config(settings=None):
    """Refuse what cannot work."""
    s = settings or sys.modules[__name__]
    check_sampling(s.TEMPERATURE, s.TOP_K, s.TOP_P)
    if s.MAX_NEW_TOKENS < 1:
        raise ValueError(f"MAX_NEW_TOKENS={s.MAX_NEW_TOKENS} must be at least 1")
    if s.MEMORY_MIB is not None and not 0 < s.MEMORY_MIB < float("inf"):
        raise ValueError(f"MEMORY_MIB={s.MEMORY_MIB} must be positive, or none to have what a conversation needs")


def print_config(settings=None):
    """Print every constant with its value and meaning."""
    common_settings.print_config(settings or sys.modules[__name__])


def main(argv=None):
    """Run the script."""
    with Run(sys.modules[__name__], argv, description=__doc__, quiet=True) as run:
        source = run.settings.CHECKPOINT or newest_fine_tuned()
        model, tokenizer = load(source, run.device)
        template = template_for(tokenizer, source)
        base = " (a base model: it only goes on with a transcript)" if isinstance(template, Transcript) else ""
        engine = engine_of(model, template, run.settings)
        _Conversation(engine, run.settings).hold(f"Talking to {source}{base}. {_COMMANDS}.")


def newest_fine_tuned():
    """The checkpoint that fine-tuning wrote last; raises ValueError that tells how to make one."""
    found = [path for folder in _FINE_TUNED if (path := newest_checkpoint(CHECKPOINTS / folder))]
    if not found:
        raise ValueError(
            "there is no fine-tuned model yet: make one with `uv run python speedrun.py`, or name one with --checkpoint"
        )
    return max(found, key=lambda path: path.stat().st_mtime)


def engine_of(model, template, s) -> Engine:
    """An engine for one text at a time."""
    room, graphs = model.config.block_size, next(model.parameters()).is_cuda
    memory = int(s.MEMORY_MIB * 2**20) if s.MEMORY_MIB else memory_for(model, EngineOptions(max_running=2), room)
    return Engine(model, template.tokenizer, template, 1, memory=memory, graphs=graphs)


class _Conversation:
    """What was said so far, and how it goes on."""

    def __init__(self, engine, settings):
        self.engine, self.settings = engine, settings
        self.reset()

    def reset(self):
        """Forget everything but the system's word."""
        system = self.settings.SYSTEM
        self.messages = [{"role": "system", "content": system}] if system else []
        self.cut = set()  # places of answers that the model did not end itself

    def hold(self, greeting):
        """Read, answer, read, until /quit or the end of the input."""
        print(greeting)
        # From here Ctrl-C ends an answer or the chat, not a training step.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            while (line := ask("> ")) is not None and self.react(line.strip()):
                pass
        finally:
            signal.signal(signal.SIGINT, handler)

    def react(self, line):
        """Carry out a command or answer; returns False when the conversation is over."""
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/reset":
            self.reset()
            print("(forgotten)")
        elif command == "/save":
            self.save(argument.strip())
        elif command.startswith("/"):
            print(_COMMANDS)
        elif line:
            self.say(line)
        return True

    def save(self, path):
        """Write the conversation as one line of the format that train_sft.py reads, without exchanges cut off."""
        dropped = self.cut | {place - 1 for place in self.cut}
        kept = [message for place, message in enumerate(self.messages) if place not in dropped]
        path = Path(path).expanduser()
        if path == Path() or path.exists():
            print(f"/save needs the name of a new file{f': {path} exists' if path != Path() else ''}")
        elif not kept or kept[-1]["role"] != "assistant":
            print("there is no whole answer to save yet")
        else:
            try:
                atomic_write(path, json.dumps({"messages": kept}, ensure_ascii=False) + "\n")
                print(f"(wrote {path})")
            except (OSError, ValueError) as error:
                print(f"error: {error}")

    def say(self, line):
        """Answer what the user said, word by word; what was said before Ctrl-C stays in the conversation."""
        self.messages.append({"role": "user", "content": line})
        s, pieces, whole = self.settings, [], False
        seed = None if s.SEED is None else s.SEED + len(self.messages)
        params = SamplingParams(s.MAX_NEW_TOKENS, s.TEMPERATURE, s.TOP_K, s.TOP_P, seed=seed)
        try:
            with contextlib.closing(self.engine.answer(self.messages, params)) as words:
                for piece in words:
                    whole = piece.finish_reason == "stop"
                    if piece.text:
                        pieces.append(piece.text if pieces else piece.text.lstrip())
                        print(pieces[-1], end="", flush=True)
        except KeyboardInterrupt:
            pass
        except ValueError as error:  # a message that this model's template or tokenizer cannot take
            self.messages.pop()
            print(f"error: {error}")
            return
        print("" if whole else _CUT)
        if not whole:
            self.cut.add(len(self.messages))
        self.messages.append({"role": "assistant", "content": "".join(pieces)})


if __name__ == "__main__":
    main()
