"""
Protocol

This file implements what clients may send: the requests of OpenAI's interface, with the extensions that other servers
have made common (top_k, min_p, repetition_penalty, ignore_eos). Values are checked here, by type and by range; what
only the model can tell (lengths, names) is checked by asking.py. Unknown fields are let pass, as they are there.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_TOP_LOGPROBS = 20
INT64 = 2**63


class Lenient(BaseModel):
    """Fields that nobody knows are let pass; values of known ones must have their type."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


Temperature = Annotated[float, Field(ge=0, le=2)]
Part = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Positive = Annotated[int, Field(ge=1, lt=INT64)]


class StreamOptions(Lenient):
    """What a stream also holds."""

    include_usage: bool = False


class Sampling(Lenient):
    """What all requests for text have in common."""

    model: str | None = None
    max_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Part | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    min_p: Part | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: Positive | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    user: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value):
        wrong = [key for key in value or () if not (key.isascii() and key.isdigit() and len(key) < 20)]
        if wrong:
            raise ValueError(f'{wrong[0]!r:.40} is no token id: give ids as text, {{"50256": -100}}')
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value):
        stops = [value] if isinstance(value, str) else value or []
        if not all(stops):
            raise ValueError("an empty text would end everything at once: leave it out")
        return value

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self


class FunctionCall(Lenient):
    """A call as the assistant wrote it."""

    name: str
    arguments: str = "{}"


class ToolCallMessage(Lenient):
    """A call in an earlier message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Lenient):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCallMessage] | None = None
    tool_call_id: str | None = None


class Function(Lenient):
    """A function that the model may ask to be called."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    """A tool: functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(Lenient):
    """The name of a function."""

    name: str


class NamedTool(Lenient):
    """The choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Lenient):
    """A schema that the answer must satisfy."""

    model_config = ConfigDict(extra="ignore", strict=True, populate_by_name=True, protected_namespaces=())

    name: str = "answer"
    description: str | None = None
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Lenient):
    """What form the answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _a_schema_is_there(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('json_schema is missing: give {"name": ..., "schema": {...}}')
        return self


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _what_needs_what(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice asks for a tool, and tools holds none")
        return self


# fail_fast: a body of a million wrong values has one error, not a million.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=INT64)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Prompts = str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Positive | None = None

    @model_validator(mode="after")
    def _what_cannot_be(self):
        if self.suffix:
            raise ValueError("suffix is not supported: this model writes from left to right only")
        if self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("best_of above n is not supported: ask for n texts and choose")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: the prompt's log-probabilities are not kept")
        return self


class EmbeddingRequest(Lenient):
    """POST /v1/embeddings."""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Positive | None = None
    user: str | None = None


class TokenizeRequest(Lenient):
    """POST /tokenize: a text, or a conversation as the model reads it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None

    @model_validator(mode="after")
    def _one_of_both(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt is missing, or both are there: give either prompt or messages")
        return self


class DetokenizeRequest(Lenient):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
