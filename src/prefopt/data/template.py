"""A conversation as the chat template renders it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt.data.errors import bad_row
from prefopt.data.messages import with_object_arguments
from prefopt.types import Message, PreferenceExample

__all__ = ["ChatRenderer", "joined", "tokenizer_of"]

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer itself, also where a processor holds it."""
    return getattr(processing_class, "tokenizer", processing_class)


def joined(prompt: Sequence[Message], completion: Sequence[Message]) -> tuple[list[Message], int]:
    """The conversation, and the index of the message in it where the completion begins.

    A prompt that ends in an assistant turn is continued by a completion that begins with one: they are one message.
    """
    if not continues(prompt, completion):
        return [*prompt, *completion], len(prompt)
    last, first = prompt[-1], completion[0]
    message = {**last, **first, "content": last["content"] + first["content"]}
    return [*prompt[:-1], message, *completion[1:]], len(prompt) - 1


def continues(prompt: Sequence[Message], completion: Sequence[Message]) -> bool:
    """Whether the completion goes on with the prompt's last message."""
    if not prompt or not completion or prompt[-1].get("tool_calls"):
        return False
    return prompt[-1]["role"] == completion[0]["role"] == "assistant"


@dataclass(frozen=True)
class ChatRenderer:
    """Renders messages with the template of ``processing_class``; errors name the row."""

    processing_class: Any

    def prompt(self, example: PreferenceExample) -> str:
        """The prompt's text: with the generation prompt where an assistant turn follows, open where one goes on.

        It is empty for an empty prompt: no template is asked to render a conversation of nothing.
        """
        prompt: Any = example.prompt
        if not prompt:
            return ""
        completions: list[Any] = list(example.completions.values())
        if all(continues(prompt, completion) for completion in completions):
            return self.render(prompt, example, "prompt", continue_final_message=True)
        opens = any(completion[0]["role"] == "assistant" for completion in completions)
        return self.render(prompt, example, "prompt", add_generation_prompt=opens)

    def render(self, messages: Sequence[Message], example: PreferenceExample, column: str, **options: Any) -> str:
        """The text of ``messages``; ``column`` is the one an error names."""
        return self._apply(messages, example, column, tokenize=False, **options)

    def tokens_with_markers(
        self, messages: Sequence[Message], example: PreferenceExample, column: str
    ) -> tuple[list[int], list[bool]]:
        """Token ids, and which of them stand between the template's generation markers."""
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        tokens = self._apply(messages, example, column, tokenizer_kwargs={"verbose": False}, **options)
        return tokens["input_ids"], [bool(item) for item in tokens["assistant_masks"]]

    def has_markers(self, example: PreferenceExample) -> bool:
        """Whether the template marks what the assistant says with ``{% generation %}``."""
        tokenizer = tokenizer_of(self.processing_class)
        template = self._template() or tokenizer.get_chat_template(None, example.tools)
        return bool(tokenizer.is_fast and _MARKER.search(template))

    def _template(self) -> str | None:
        """A processor's own template; ``None`` where the tokenizer picks among its own."""
        is_tokenizer = tokenizer_of(self.processing_class) is self.processing_class
        return None if is_tokenizer else self.processing_class.chat_template

    def _apply(self, messages: Sequence[Message], example: PreferenceExample, column: str, **options: Any) -> Any:
        tokenizer = tokenizer_of(self.processing_class)
        if tokenizer is not self.processing_class:
            messages = [_with_parts(message) for message in messages]
        if not (self._template() or tokenizer.chat_template):
            fix = "Set `processing_class.chat_template`, or give prompt and completions as text."
            raise bad_row(example.row, column, "the row holds messages, but the tokenizer has no chat template", fix)

        def apply(given: Sequence[Message]) -> Any:
            arguments = {"tools": example.tools, "chat_template": self._template(), **example.chat_template_kwargs}
            return tokenizer.apply_chat_template(list(given), **arguments, **options)

        with_objects = with_object_arguments(messages)
        if with_objects is not None:
            try:
                return apply(with_objects)
            except Exception:  # this template takes the arguments of tool calls as text
                pass
        try:
            return apply(messages)
        except Exception as error:  # a template may raise anything
            fix = "Change the row, the template, or `chat_template_kwargs`."
            raise bad_row(example.row, column, f"the chat template failed: {error or type(error)}", fix) from error


def _with_parts(message: Message) -> Message:
    """The message as the templates of vision-language models take it: its content as parts."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
