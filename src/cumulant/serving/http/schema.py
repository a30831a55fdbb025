"""The bodies of requests, as OpenAI's API has them, and what is added to it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..sampling import SamplingOptions

MOST_SCORES = 20  # of the likeliest tokens at a place
MOST_PROMPTS = 128  # of one request
MOST_BIASES = 4096
Text = Annotated[str, Field(max_length=2**24)]
Tokens = Annotated[list[int], Field(fail_fast=True)]
Stop = Text | Annotated[list[Text], Field(max_length=16, fail_fast=True)]


class Body(BaseModel):
    """A JSON object without further fields, whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def refuse_at_once(cls, data: Any) -> Any:
        """Refuse what would give an error for each of many entries."""
        if isinstance(data, dict):
            for name, value in data.items():
                if name not in cls.model_fields:
                    raise ValueError(f"{name[:80]}: no such field here")
                if isinstance(value, dict) and len(value) > MOST_BIASES:
                    raise ValueError(f"{name}: expected at most {MOST_BIASES} entries")
        return data


class StreamOptions(Body):
    include_usage: bool = False


class Generation(Body):
    """Fields that completions and chats share.

    Added to OpenAI's: top_k, repetition_penalty and state_id.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Stop | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    state_id: str | None = None
    user: str | None = None  # has no effect
    metadata: dict[str, str] | None = None  # has no effect
    store: Literal[False] | None = None

    def sampling(self, most: int, default: int) -> SamplingOptions:
        """The options of drawing; `most` tokens at most, `default` if none are named."""
        wanted = self.max_tokens
        if wanted is not None and wanted > most:
            raise ValueError(f"max_tokens: expected at most {most:,} here, got {wanted:,}")
        names = (
            "temperature",
            "top_p",
            "top_k",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
            "seed",
        )
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return SamplingOptions(
            max_tokens=default if wanted is None else wanted,
            logit_bias=self._biases(),
            stop=stop,
            **given,
        )

    def _biases(self) -> dict[int, float]:
        try:
            return {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise ValueError(f"logit_bias: expected numbers of tokens as names: {error}") from error

    def check_scores(self, name: str, count: int | None) -> None:
        if count is not None and not 0 <= count <= MOST_SCORES:
            raise ValueError(f"{name}: expected 0 to {MOST_SCORES}, got {count}")


class CompletionBody(Generation):
    """POST /v1/completions."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(fail_fast=True)]
        | Annotated[list[Tokens], Field(fail_fast=True)]
    ) = ""
    echo: bool | None = None
    logprobs: int | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or tokens."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise ValueError("prompt: expected a text, a list of texts or of tokens, got []")
        if not isinstance(prompt[0], int) and len(prompt) > MOST_PROMPTS:
            raise ValueError(f"prompt: expected at most {MOST_PROMPTS} prompts, got {len(prompt)}")
        if isinstance(prompt[0], int):
            return [list(prompt)]
        return list(prompt)


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """The message with one text."""
        text = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]


class ChatBody(Generation):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None

    def model_post_init(self, context: Any) -> None:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens


class TokenizeBody(Body):
    """POST /tokenize."""

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Tokens


class StateBody(Body):
    """POST /v1/states: a text, tokens or messages to read, behind `state_id` if there is one."""

    model: str | None = None
    input: Text | Tokens | None = None
    messages: Messages | None = None
    state_id: str | None = None


class ForkBody(Body):
    """POST /v1/states/{id}/fork."""
