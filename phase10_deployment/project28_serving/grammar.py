"""
Grammars

This file implements texts that follow a grammar or a JSON schema, token by token, following:
- "Efficient Guided Generation for Large Language Models" (Willard & Louf, 2023) - which tokens lead on, as a mask
- "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models" (Dong et al., 2024) -
  grammars in which JSON can be nested, at the cost of microseconds

The parser is the library llguidance; grammars are written in its dialect of Lark. What is ours: which bytes a token
stands for, what ends a text, and that a grammar that fails harms nobody but its own text.

Each component is explained with paper references for educational purposes.
"""

import json
import re
from collections.abc import Collection
from functools import cache, lru_cache

import numpy as np

from phase1_foundation.project1_minimal_gpt.char_tokenizer import CharTokenizer
from phase1_foundation.project2_tokenizer.bytes_alphabet import CHAR_TO_BYTE, encode_utf8, from_printable
from phase1_foundation.project2_tokenizer.tokenizer import BPETokenizer
from phase1_foundation.project3_pretrain.hub_tokenizer import ForeignTokenizer
from phase3_core_inference.project8_kv_cache.constraints import bits_of

REMEMBERED = 64  # grammars that are kept compiled
SCHEMA_BYTES = 32_768  # of the longest schema that is read
# Between two parts of JSON: nothing, a blank, or a new line with an indentation. A model that is unsure of what comes
# next likes to write blanks, and would write them for ever. `lenient` would ignore what the library cannot honour.
JSON_STYLE = {"whitespace_flexible": False, "whitespace_pattern": r" |\n {0,16}", "lenient": False}
# So that a schema made in bad faith costs milliseconds of a step and some 100 MB, not seconds and gigabytes.
LIMITS = {"initial_lexer_fuel": 100_000, "max_lexer_states": 50_000, "max_grammar_size": 200_000}
PROBE = '{"ab": [-1.5, true, null]}'  # if a vocabulary spells this, it spells JSON


def library():
    """The library llguidance; ValueError where it is missing."""
    try:
        import llguidance
    except ImportError as error:
        raise ValueError("grammars and schemas need the library llguidance: uv sync --group serve") from error
    return llguidance


# -- grammars


def json_rule(schema: dict) -> str:
    """A schema as a part of a grammar; ValueError for one that is no object, too long, or no text.

    Keywords are not looked at: that is `check_grammar`'s work, for the whole grammar.
    """
    if not isinstance(schema, dict):
        raise ValueError(f'a JSON schema is an object, such as {{"type": "object"}}, not {schema!r:.60}')
    try:
        text = json.dumps({**schema, "x-guidance": JSON_STYLE}, ensure_ascii=False, allow_nan=False)
        n_bytes = len(text.encode("utf-8"))
    except (TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"the JSON schema is no JSON ({error}): use plain objects, lists, texts and numbers") from None
    if n_bytes > SCHEMA_BYTES:
        raise ValueError(f"the JSON schema has {n_bytes:,} bytes: at most {SCHEMA_BYTES:,} are read, split it")
    return f"%json {text}"


def json_schema_grammar(schema: dict) -> str:
    """The grammar of the JSON texts that satisfy a schema.

    PAPER: "XGrammar: Flexible and Efficient Structured Generation Engine for Large Language Models", arXiv:2411.15100.
    PAPER CONTEXT: JSON nests without end, so that it needs a stack: a pushdown automaton, not a finite one.
    INTUITION: the schema is the printed form, the grammar the rules for filling it in with a pen that cannot erase.
    IMPLEMENTATION: the library's own translation. Properties come in the order of the schema; keywords that it cannot
        honour are refused, not ignored; blanks are bounded.
    WHY: an answer that always parses, and always has the fields that the program behind it reads.

    Raises ValueError for what is no schema; whether it can be honoured, `check_grammar` tells.

    >>> check_grammar(json_schema_grammar({"type": "array", "uniqueItems": True}))
    Traceback (most recent call last):
    ValueError: the schema or grammar cannot be followed: Unimplemented keys: ["uniqueItems"]
    """
    return f"start: {json_rule(schema)}"


def json_object_grammar() -> str:
    """The grammar of all JSON objects."""
    return json_schema_grammar({"type": "object"})


def check_grammar(grammar: str) -> None:
    """Raise ValueError, with the library's reason, for a grammar that cannot be followed.

    One that is merely costly may pass: its texts fail one by one, as `GuardedConstraint.failed` says.
    """
    matcher = library().LLMatcher(_bytes(), grammar, log_level=0, limits=_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()  # some mistakes show where the first token is asked for
    if matcher.is_error():
        raise ValueError(f"the schema or grammar cannot be followed: {_reason(matcher.get_error())}")


@cache
def _bytes():
    """A vocabulary of single bytes: what is wrong with a grammar is wrong for all vocabularies."""
    return library().LLTokenizer("byte")


def _limits():
    return library().LLParserLimits(verbose_errors=False, **LIMITS)


def _reason(error: str) -> str:
    """What matters of the library's error, in one line."""
    lines = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: ", "", error.strip()).splitlines()
    wrong = next((line for line in lines if line.startswith("error: ")), None)  # below a drawing of the expression
    if wrong and lines[0].startswith("regex parse error"):
        return f"regular expression, {wrong.removeprefix('error: ')}"
    return "no token leads on" if not lines or lines[0].startswith("NoExtension") else lines[0]


# -- vocabularies


def bytes_of_tokens(tokenizer) -> tuple[list[bytes], set[int]]:
    """The bytes that each token adds to a text, b"" where an id is none; and the special tokens.

    Special tokens that stand in any text (<think>, <tool_call>) are tokens like others.
    """
    if isinstance(tokenizer, CharTokenizer):
        return [encode_utf8(char) for char in tokenizer.chars], set()
    if isinstance(tokenizer, BPETokenizer):
        plain, names = tokenizer.token_bytes, tokenizer.special_tokens
        special = {i for name, i in names.items() if name not in tokenizer.always_matched}
    elif isinstance(tokenizer, ForeignTokenizer):
        plain, names = _foreign_bytes(tokenizer), tokenizer.special_tokens
        special = set(names.values())
    else:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say which bytes its tokens stand for, so no grammar can be followed: "
            f"use a model with a BPE, character or Hugging Face tokenizer"
        )
    known = plain | {i: encode_utf8(name) for name, i in names.items()}
    return [known.get(i, b"") for i in range(max(known) + 1)], special


def _foreign_bytes(tokenizer: ForeignTokenizer) -> dict[int, bytes]:
    """The bytes of each token of a tokenizer.json: decoding one alone would strip its blank, or half a character."""
    content = json.loads(tokenizer.text)
    vocab, byte_level = content["model"]["vocab"], '"ByteLevel"' in json.dumps(content.get("decoder"))
    pieces = {i: piece for piece, i in vocab.items()} if isinstance(vocab, dict) else dict(enumerate(next(zip(*vocab))))
    added = {token["id"]: encode_utf8(token["content"]) for token in content.get("added_tokens", [])}

    def of(piece: str) -> bytes:
        if byte_level and set(piece) <= CHAR_TO_BYTE.keys():
            return from_printable(piece)
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return encode_utf8(piece.replace("\u2581", " "))  # SentencePiece's sign for a blank

    return {i: of(piece) for i, piece in pieces.items()} | added


class _Speller:
    """A tokenizer in the form that the library wants.

    It says that no token ends a text: the library then makes up one, behind all others.
    """

    eos_token_id = bos_token_id = None

    def __init__(self, tokenizer, tokens: list[bytes], special: set[int]):
        self.tokenizer, self.tokens = tokenizer, tokens
        self.special_token_ids = [i for i in sorted(special) if i < len(tokens)]
        self._ids = {token: i for i, token in enumerate(tokens) if token and i not in special}
        self._plain = set(range(len(tokens))) - special
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that the grammar forces, which the model reads as it knows them.

        The library also tries it with bytes, to see whether it may: it may not.
        """
        data = text.encode("utf-8")
        try:
            ids = self.tokenizer.encode(text)
            if b"".join(self.tokens[i] for i in ids) == data and self._plain.issuperset(ids):
                return ids
        except (ValueError, IndexError):  # a character that has no token, or a token that the model does not know
            pass
        return self._longest_match(data)  # tokenizers that put a blank before everything

    def _longest_match(self, data: bytes) -> list[int]:
        """The tokens of some bytes, each as long as possible; none where they cannot be spelled."""
        ids: list[int] = []
        while data:
            fitting = (n for n in range(min(len(data), self._longest), 0, -1) if data[:n] in self._ids)
            if (n := next(fitting, 0)) == 0:
                return []
            ids.append(self._ids[data[:n]])
            data = data[n:]
        return ids


def _check_spelling(tokenizer, tokens: list[bytes], special: set[int]) -> None:
    """Raise ValueError where JSON cannot be spelled, or tokens are not just put one behind the other."""
    ids = {token: i for i, token in enumerate(tokens) if i not in special}
    missing = sorted({char for char in PROBE if char.encode() not in ids})
    name = type(tokenizer).__name__
    if missing:
        raise ValueError(
            f"this vocabulary ({name}) has no token for {' '.join(missing)}, so it cannot write JSON: use a model with "
            f"a byte-level tokenizer"
        )
    if tokenizer.decode([ids[char.encode()] for char in PROBE]) != PROBE:
        raise ValueError(
            f"this tokenizer ({name}) puts blanks between its tokens, so no grammar can be followed: use a model with "
            f"a byte-level BPE or SentencePiece tokenizer"
        )


# -- constraints


class Grammars:
    """What makes constraints for the texts of one vocabulary.

    PAPER: "Efficient Guided Generation for Large Language Models", arXiv:2307.09702, section 3; "XGrammar: Flexible and
        Efficient Structured Generation Engine for Large Language Models", arXiv:2411.15100.
    PAPER CONTEXT: what does not depend on the text is worked out before: for a state, most tokens are in or out for
        good.
    INTUITION: the dictionary is sorted once; then each form only asks which words begin with what fits its next box.
    IMPLEMENTATION: the library's trie of all tokens, as bytes, with the special ones apart. That takes some tenths of a
        second, and the tokenizer's first text two more: make it before the first request comes.
    WHY: a mask then costs tens of microseconds, next to a step of milliseconds.

    Args:
        end_ids: tokens that end a text. They may come where the grammar may end; no other special token ever may.
        vocab_size: ids that the model knows, if fewer than the tokenizer's.

    Raises ValueError for a tokenizer whose tokens cannot spell JSON.
    """

    def __init__(self, tokenizer, end_ids: Collection[int] = (), vocab_size: int | None = None):
        tokens, special = bytes_of_tokens(tokenizer)
        self.vocab_size = min(len(tokens), vocab_size or len(tokens))
        tokens = tokens[: self.vocab_size]
        _check_spelling(tokenizer, tokens, special)
        self.end_ids = frozenset(i for i in end_ids if i < self.vocab_size)
        self.everything = bits_of(range(self.vocab_size), self.vocab_size)
        self.plain = self.everything & ~bits_of([i for i in special if i < self.vocab_size], self.vocab_size)
        self.ends = bits_of(list(self.end_ids), self.vocab_size)
        llguidance, speller = library(), _Speller(tokenizer, tokens, special)
        speller(PROBE)  # the compiled loops of the tokenizer are loaded with the first text
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(speller))
        self._compiled = lru_cache(REMEMBERED)(self._compile)

    def _compile(self, grammar: str):
        return library().LLMatcher(self._tokenizer, grammar, log_level=0, limits=_limits())

    def constraint(self, grammar: str) -> "GuardedConstraint":
        """What holds one text to a grammar, from its first token on; never raises, see `GuardedConstraint.failed`.

        A grammar is compiled, which takes milliseconds, for its first text alone; the others get copies.
        """
        return GuardedConstraint(self._compiled(grammar).deep_copy(), self)


class GuardedConstraint:
    """A constraint that fails for its own text alone.

    PAPER: "Efficient Guided Generation for Large Language Models", arXiv:2307.09702, section 3.
    PAPER CONTEXT: the mask of each step leaves the tokens with which the text is still the beginning of a valid one.
    INTUITION: a fuse of its own for every lamp.
    IMPLEMENTATION: project 8's `Constraint` over the library's matcher. Where that fails (a state that no token leads
        out of, a grammar that grew too large), it keeps the reason, allows everything, and has `finished`.
    WHY: in a batch a mask without tokens, or an exception, would end the texts of everybody.

    Args:
        matcher: of the library, for one text; grammars: the vocabulary that it belongs to.
    """

    def __init__(self, matcher, grammars: Grammars):
        self.matcher, self.grammars = matcher, grammars
        self.finished = False
        self.failed: str | None = None  # why the text does not follow its grammar to the end

    def allowed(self) -> np.ndarray:
        """The tokens that may come now: (words,) int32, token t is bit t % 32 of word t // 32."""
        if not self.finished:
            try:
                mask = self._mask()
                if mask.any():
                    return mask
                self._fail("no token of this vocabulary leads on")
            except Exception as error:  # whatever it is: the others go on
                self._fail(str(error))
        return self.grammars.everything

    def _mask(self) -> np.ndarray:
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.int32)
        if self.matcher.is_error():
            raise ValueError(self.matcher.get_error())
        plain = self.grammars.plain  # without the library's own end of text, and what a grammar may have named
        mask = bits[: len(plain)] & plain
        return mask | self.grammars.ends if self.matcher.is_accepting() else mask

    def accept(self, token: int) -> None:
        """Go on to the state behind this token; one of `end_ids` ends the text where the grammar may end."""
        if self.finished:
            return
        try:
            if token in self.grammars.end_ids and self.matcher.is_accepting():
                self.finished = True
            elif not self.matcher.consume_token(token):
                self._fail(self.matcher.get_error())
            else:
                self.finished = self.matcher.is_stopped()
        except Exception as error:
            self._fail(str(error))

    def _fail(self, reason: str) -> None:
        self.failed, self.finished = f"the text cannot follow its grammar any further: {_reason(reason)}", True
