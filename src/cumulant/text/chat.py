"""Chat messages as text, by a tokenizer's chat template.

The tokenizer reads control tokens that the template writes (``<|im_start|>``) as special tokens.
It would do the same with these characters inside a message, so a message could pretend to be a
turn. Chats with such a message are not rendered.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, Any]]
Chat = Callable[[Messages], str | None]


def read_chat_template(folder: Path) -> str | None:
    """The template beside a ``tokenizer.json``; among several, the one named "default".

    It is in ``chat_template.jinja`` or in ``tokenizer_config.json``.
    """
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = (
            json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
            if settings.is_file()
            else None
        )
    except (ValueError, AttributeError) as error:
        raise ValueError(f"tokenizer: {settings} is damaged: {error}") from error
    if isinstance(found, list):
        found = next(
            (
                t.get("template")
                for t in found
                if isinstance(t, dict) and t.get("name") == "default"
            ),
            None,
        )
    return found if isinstance(found, str) else None


def chat_renderer(tokenizer: PreTrainedTokenizerFast) -> Chat | None:
    """A function from messages to text; None if the tokenizer has no template.

    The function returns None for messages that hold a control token.

    Raises:
        ValueError: the template refuses the messages, for example for the order of their roles.
    """
    if tokenizer.chat_template is None:
        return None

    def render(messages: Messages) -> str | None:
        return None if holds_control_token(tokenizer, messages) else _render(tokenizer, messages)

    return render


def holds_control_token(tokenizer: PreTrainedTokenizerFast, value: Any) -> bool:
    """Whether any text in messages, however deep, holds the characters of a special token."""
    if isinstance(value, str):
        special = (
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        )
        return any(token in value for token in special)
    inner = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return any(holds_control_token(tokenizer, x) for x in inner)


def render_prompt(tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """A user's message as text, and the beginning of the answer."""
    if tokenizer.chat_template is None:
        raise ValueError("chat: the model's tokenizer has no chat template; leave --chat out")
    if holds_control_token(tokenizer, prompt):
        raise ValueError(
            "prompt: holds a control token of the tokenizer, which would be read as the end of a"
            " turn"
        )
    return _render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def render_messages(
    tokenizer: PreTrainedTokenizerFast, messages: Messages, *, answer: bool = False
) -> str:
    """Messages as text; answer: and the beginning of an answer.

    Raises:
        ValueError: the template refuses them.
    """
    return _render(tokenizer, messages, add_generation_prompt=answer)


def end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The special token that the template writes after an answer, if any."""
    answer = "cumulant"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    behind = _render(tokenizer, messages).rpartition(answer)[2].lstrip()
    special = {
        token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return next((i for token, i in special.items() if behind.startswith(token)), None)


def _render(tokenizer: PreTrainedTokenizerFast, messages: Messages, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"chat template: cannot render {str(messages)[:80]}: {error}") from error
