"""A conversation as the chat template renders it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefopt.data.errors import bad_row
from prefopt.data.image_text import expanded
from prefopt.data.images import image_token
from prefopt.data.messages import follow_on, parts_of, with_object_arguments
from prefopt.data.template_process import TemplateError, TemplateLimitError, apply_template
from prefopt.types import COLUMN_OF_BRANCH, Message, PreferenceExample

__all__ = ["ChatRenderer", "Rendering", "joined", "prompt_rendering", "tokenizer_of"]

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
    message = {**last, **first, "content": follow_on(last["content"], first["content"])}
    return [*prompt[:-1], message, *completion[1:]], len(prompt) - 1


def continues(prompt: Sequence[Message], completion: Sequence[Message]) -> bool:
    """Whether the completion goes on with the prompt's last message."""
    if not prompt or not completion or prompt[-1].get("tool_calls"):
        return False
    return prompt[-1]["role"] == completion[0]["role"] == "assistant"


@dataclass(frozen=True)
class Rendering:
    """What is to be rendered."""

    messages: Sequence[Message]
    example: PreferenceExample
    column: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def has_messages_alone(self) -> bool:
        """Whether the template is given nothing but messages, and those as they are."""
        given = self.example.tools is not None or self.example.chat_template_kwargs
        return not given and bool(self.messages) and not any("tool_calls" in message for message in self.messages)


def prompt_rendering(example: PreferenceExample) -> Rendering:
    """The prompt: with the generation prompt where an assistant turn follows, open where one goes on."""
    prompt: Any = example.prompt
    completions: list[Any] = list(example.completions.values())
    if all(continues(prompt, completion) for completion in completions):
        return Rendering(prompt, example, "prompt", {"continue_final_message": True})
    opens = any(completion[0]["role"] == "assistant" for completion in completions)
    return Rendering(prompt, example, "prompt", {"add_generation_prompt": True} if opens else {})


@dataclass(frozen=True)
class ChatRenderer:
    """Renders messages with the template of ``processing_class``; errors name the row.

    The text of a completion's column has in the places of its images what the processor writes there; that of the
    prompt alone keeps the places, since branches may have other images.
    """

    processing_class: Any

    def render(self, messages: Sequence[Message], example: PreferenceExample, column: str, **options: Any) -> str:
        """The text of ``messages``; ``column`` is the one an error names."""
        return self._expanded(self._apply(messages, example, column, tokenize=False, **options), example, column)

    def _expanded(self, text: str, example: PreferenceExample, column: str) -> str:
        own = next((example.images[branch] for branch in example.images if COLUMN_OF_BRANCH[branch] == column), None)
        return expanded(text, image_token(self.processing_class), own) if own else text

    def render_all(self, wanted: Sequence[Rendering]) -> list[str]:
        """The text of each; those for which the template is given messages alone are rendered in one call."""
        texts: dict[int, str] = {}
        for options in ({}, {"add_generation_prompt": True}):
            indices = [i for i, item in enumerate(wanted) if item.options == options and item.has_messages_alone]
            texts |= zip(indices, self._render_together([wanted[i].messages for i in indices], options), strict=False)
        for i, item in enumerate(wanted):
            if i not in texts:
                texts[i] = self._apply(item.messages, item.example, item.column, tokenize=False, **item.options)
        return [self._expanded(texts[i], item.example, item.column) for i, item in enumerate(wanted)]

    def _render_together(self, conversations: Sequence[Sequence[Message]], options: dict[str, Any]) -> Sequence[str]:
        """The text of each conversation; nothing where the tokenizer fails on one or has a way of its own."""
        tokenizer = tokenizer_of(self.processing_class)
        if not conversations or type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            return ()
        given = [self._as_taken(messages) for messages in conversations]
        try:
            return apply_template(tokenizer, given, {"chat_template": self._template(), "tokenize": False, **options})
        except TemplateError:  # each is then rendered for itself, which names the row
            return ()

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
        messages = self._as_taken(messages)
        if not (self._template() or tokenizer.chat_template):
            fix = "Set `processing_class.chat_template`, or give prompt and completions as text."
            raise bad_row(example.row, column, "the row holds messages, but the tokenizer has no chat template", fix)

        def apply(given: Sequence[Message]) -> Any:
            arguments = {"tools": example.tools, "chat_template": self._template(), **example.chat_template_kwargs}
            if clash := arguments.keys() & options.keys():
                raise TemplateError(f"`chat_template_kwargs` has {', '.join(sorted(clash))}, which is set for all rows")
            return apply_template(tokenizer, list(given), {**arguments, **options})

        with_objects = with_object_arguments(messages)
        try:
            try:
                return apply(messages if with_objects is None else with_objects)
            except TemplateLimitError:
                raise
            except TemplateError:
                if with_objects is None:
                    raise
                return apply(messages)  # this template takes the arguments of tool calls as text
        except TemplateError as error:
            fix = f"Change the row, the template ({self._name}), or `chat_template_kwargs`."
            raise bad_row(example.row, column, f"the chat template failed: {error}", fix) from error

    @property
    def _name(self) -> str:
        """Whose template it is, for messages."""
        return getattr(self.processing_class, "name_or_path", "") or type(self.processing_class).__name__

    def _as_taken(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them: those of vision-language models take the content as parts."""
        if tokenizer_of(self.processing_class) is self.processing_class:
            return list(messages)
        return [{**message, "content": parts_of(message["content"])} for message in messages]
