"""
Templates of other models

This file implements talking to models that know other words for the roles, or none, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - models that answer
- "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019) - a plain model answers after "A:"

Each component is explained with paper references for educational purposes.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from phase1_foundation.project3_pretrain.hub import resolve_folder
from phase2_finetuning.project4_sft.conversations import Message, check_messages
from phase2_finetuning.project4_sft.template import CHAT_TOKENS, ChatTemplate


def template_for(tokenizer, source: str | Path):
    """The template by which the model at `source` is spoken to.

    A tokenizer with our chat tokens: `ChatTemplate`; a Hugging Face folder with a template of its own: `JinjaTemplate`;
    else `Transcript`. Raises ValueError for a model without a tokenizer, and for a template that cannot be read.
    """
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer: use a model that was saved with its own")
    if all(name in getattr(tokenizer, "special_tokens", {}) for name in CHAT_TOKENS):
        return ChatTemplate(tokenizer)
    if Path(source).suffix != ".pt" and (found := read_template(resolve_folder(source))):
        return JinjaTemplate(tokenizer, *found)
    return Transcript(tokenizer)


def read_template(folder: Path) -> tuple[str, dict, list[int]] | None:
    """(template, its variables, ids that end an answer) of a Hugging Face folder, or None if it holds no template."""
    settings = _read_json(folder / "tokenizer_config.json")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name: [{"name": "default", "template": ...}, ...]
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not template:
        return None
    texts = {name: _text(value) for name, value in settings.items() if name.endswith("_token")}
    texts = {name: text for name, text in texts.items() if text is not None}  # Jinja would write "None"
    stops = _read_json(folder / "generation_config.json").get("eos_token_id")
    stops = _read_json(folder / "config.json").get("eos_token_id") if stops is None else stops
    return template, texts, [stops] if isinstance(stops, int) else list(stops or [])


def _read_json(path: Path) -> dict:
    """The object in a file; nothing where there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch it again") from error


def _text(token) -> str | None:
    """A special token as text; some files write {"content": text, ...}."""
    return token.get("content") if isinstance(token, dict) else token


class JinjaTemplate:
    """The chat template that a published model was trained with.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.5.
    PAPER CONTEXT: a model answers in the form in which its demonstrations were written, and in no other as well.
    INTUITION: address an actor in the language of the rehearsals.
    IMPLEMENTATION: rendered by the library jinja2, in a sandbox (a template is somebody's program), as `transformers`
        does; then encoded as one text, special tokens included, since these templates spell them out.
    WHY: a model of the hub answers well only to its own template.

    Args:
        tokenizer: has `encode`, `decode`, `special_tokens`.
        source: the template, in Jinja.
        variables: texts that it may name, such as ``eos_token``.
        stop_ids: tokens that end an answer; the tokenizer's end of text is always one.

    Raises ValueError for a template that is no Jinja, ImportError without the library.
    """

    stop_text = None

    def __init__(self, tokenizer, source: str, variables: dict, stop_ids: Sequence[int] = ()):
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.datetime.now().strftime}
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the model's chat template cannot be read: {error}") from error
        self._errors, self.tokenizer, self.variables = TemplateError, tokenizer, variables
        plain = getattr(tokenizer, "always_matched", ())  # <think> and the like stand in any text: they forge no role
        self._meaningful = [name for name in tokenizer.special_tokens if name not in plain]
        end = tokenizer.special_tokens.get(variables.get("eos_token"))
        self.stop_ids = frozenset(i for i in (*stop_ids, end, tokenizer.eot_id) if i is not None)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation that waits for an answer: the tokens up to where the assistant begins to speak.

        Raises ValueError for a message that holds a special token (it would forge a role), or one that the template
        refuses, such as a system message where the model knows none.
        """
        check_messages(messages, answered=False)
        for message in messages:
            forged = [name for name in self._meaningful if name in message["content"]]
            if forged and message["role"] != "assistant":  # the model's own words may hold what it likes
                raise ValueError(
                    f"a message holds {forged[0]}, which has a meaning of its own in this model's template"
                )
        try:
            text = self._template.render(messages=list(messages), add_generation_prompt=True, **self.variables)
        except self._errors as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        return self.tokenizer.encode(text, allowed_special="all")

    def cut(self, tokens: list[int], limit: int) -> list[int]:
        """The last `limit` tokens of a prompt that is too long."""
        return tokens[len(tokens) - limit :]


def _refuse(message: str):
    """What templates call ``raise_exception``."""
    from jinja2 import TemplateError

    raise TemplateError(message)


class Transcript:
    """A conversation with a model that was never taught one: it goes on with a transcript.

    PAPER: "Language Models are Unsupervised Multitask Learners" (Radford et al., 2019), section 3.5.
    PAPER CONTEXT: given a document, the conversation about it and a final "A:", a merely pre-trained model answers.
    INTUITION: nobody told the model to answer, but after "Assistant:" an answer is what usually stands.
    IMPLEMENTATION: "User: ...", "Assistant: ...", a line each; an answer ends where the model lets the user speak.
    WHY: shows what fine-tuning has to teach: a base model knows no better when to stop, or whom it speaks for.

    >>> from phase2_finetuning.project4_sft.vocabulary import byte_tokenizer
    >>> tokens = Transcript(byte_tokenizer()).prompt([{"role": "user", "content": "Hi"}])
    >>> byte_tokenizer().decode(tokens)
    '<|endoftext|>User: Hi\\nAssistant:'
    """

    stop_text = "\nUser:"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        end = getattr(tokenizer, "eot_id", None)  # a tokenizer of characters has none
        self.stop_ids = frozenset(() if end is None else (end,))
        self._start = sorted(self.stop_ids)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The transcript up to where the assistant begins to speak."""
        check_messages(messages, answered=False)
        lines = [
            message["content"] if message["role"] == "system" else f"{message['role'].title()}: {message['content']}"
            for message in messages
        ]
        return [*self._start, *self.tokenizer.encode("\n".join([*lines, "Assistant:"]))]

    def cut(self, tokens: list[int], limit: int) -> list[int]:
        """The last `limit` tokens of a prompt that is too long."""
        return tokens[len(tokens) - limit :]
