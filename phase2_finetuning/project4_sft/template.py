"""
Chat template

This file implements how a conversation becomes one text, and which of its tokens are learned, following:
- "Training language models to follow instructions with human feedback" (Ouyang et al., 2022) - learning from answers
- "Finetuned Language Models Are Zero-Shot Learners" (Wei et al., 2022) - instructions as plain text before the answer
- "LIMA: Less Is More for Alignment" (Zhou et al., 2023) - a token of its own at the end of every utterance

Each component is explained with paper references for educational purposes.
"""

from collections.abc import Sequence

from phase1_foundation.project3_pretrain.token_file import END_OF_TEXT
from phase2_finetuning.project4_sft.conversations import Message, check_messages

BEGIN = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}  # a turn opens with its role
END = "<|end|>"  # and closes with this
CHAT_TOKENS = (*BEGIN.values(), END)


class ChatTemplate:
    """Renders conversations for one tokenizer.

    PAPER: "Training language models to follow instructions with human feedback", arXiv:2203.02155, section 3.5.
    PAPER CONTEXT: supervised fine-tuning shows the model prompts with the answers that people wrote to them.
    INTUITION: a play needs its speakers' names before each line, and the actor learns only the own lines.
    IMPLEMENTATION: <|endoftext|>, then for each message its role's token, the text, <|end|>. The mask is 1 on the
        assistant's words and on the <|end|> behind them: the model must learn to stop, but not to ask.
        A message is encoded as plain text, so that nobody can forge a role by typing its token.
    WHY: one definition for training, chatting, serving and export: a template that differs by a space costs quality
        that no loss shows.

    Raises ValueError if the tokenizer lacks a token of the template.

    >>> from phase2_finetuning.project4_sft.vocabulary import with_chat_tokens, byte_tokenizer
    >>> template = ChatTemplate(with_chat_tokens(byte_tokenizer()))
    >>> talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    >>> tokens, mask = template.render(talk)
    >>> template.tokenizer.decode(tokens)
    '<|endoftext|><|user|>Hi<|end|><|assistant|>Yo<|end|>'
    >>> mask                                                    # Y, o and the end
    [0, 0, 0, 0, 0, 0, 1, 1, 1]
    """

    stop_text = None  # an answer ends with a token

    def __init__(self, tokenizer):
        special = getattr(tokenizer, "special_tokens", {})
        missing = [name for name in CHAT_TOKENS if name not in special]
        if missing or tokenizer.eot_id is None:
            raise ValueError(
                f"the tokenizer has no {', '.join(missing) or END_OF_TEXT}: fine-tune the model first (train_sft.py "
                f"adds what is missing), or add it with vocabulary.with_chat_tokens"
            )
        if special[END] in tokenizer.encode(END):
            raise ValueError(
                f"this tokenizer ({type(tokenizer).__name__}) takes {END} in a text for the token, so anybody could "
                f"forge a role: use a model with a byte-level BPE tokenizer"
            )
        self.tokenizer = tokenizer
        self.start_id = tokenizer.eot_id  # a conversation is a document: it begins as documents do
        self.begin_ids = {role: special[name] for role, name in BEGIN.items()}
        self.end_id = special[END]

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which an answer is over."""
        return frozenset((self.end_id, self.start_id))

    def render(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """A whole conversation: (tokens, loss mask), equally long; the mask is 1 where a token is to be learned."""
        check_messages(messages)
        tokens, mask = [self.start_id], [0]
        for message in messages:
            words = [*self.tokenizer.encode(message["content"]), self.end_id]
            learned = int(message["role"] == "assistant")
            tokens += [self.begin_ids[message["role"]], *words]
            mask += [0, *[learned] * len(words)]
        return tokens, mask

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation that waits for an answer: the tokens up to where the assistant begins to speak."""
        check_messages(messages, answered=False)
        tokens = [self.start_id]
        for message in messages:
            tokens += [self.begin_ids[message["role"]], *self.tokenizer.encode(message["content"]), self.end_id]
        return [*tokens, self.begin_ids["assistant"]]

    def cut(self, tokens: list[int], limit: int) -> list[int]:
        """A prompt that is too long: its first two tokens, which open the user's turn, and its end."""
        return [*tokens[:2], *tokens[len(tokens) - (limit - 2) :]]

    @property
    def jinja(self) -> str:
        """The same template in the language of Hugging Face's `chat_template`.

        It gives the same tokens for texts that hold no special token; a text that does forges roles there, not here.
        """
        start = next(name for name, i in self.tokenizer.special_tokens.items() if i == self.start_id)
        return (
            f"{{{{ '{start}' }}}}"
            "{% for message in messages %}"
            f"{{{{ '<|' + message['role'] + '|>' + message['content'] + '{END}' }}}}"
            "{% endfor %}"
            f"{{% if add_generation_prompt %}}{{{{ '{BEGIN['assistant']}' }}}}{{% endif %}}"
        )
