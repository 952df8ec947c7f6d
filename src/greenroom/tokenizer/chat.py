"""The chat format of a model: messages to a prompt, output back to messages.

It picks Harmony, the file's own template or a built-in one, keeps what people wrote from being
read as special tokens, and picks the parser that fits. It does not generate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from greenroom.errors import ChatTemplateError
from greenroom.tokenizer import tool_formats as formats
from greenroom.tokenizer.defaults import default_template
from greenroom.tokenizer.deltas import OutputParser
from greenroom.tokenizer.harmony import MARKS, render_harmony
from greenroom.tokenizer.harmony_parser import HarmonyParser
from greenroom.tokenizer.messages import (
    Message,
    check_tools,
    normalise,
    with_parsed_arguments,
    with_written_arguments,
)
from greenroom.tokenizer.parsers import TextFormat, TextParser
from greenroom.tokenizer.portions import find
from greenroom.tokenizer.shield import Shield, escaped, without
from greenroom.tokenizer.template import TemplateTypeError, shared_renderer
from greenroom.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from greenroom.gguf import GGUFFile

Messages = Sequence[Mapping[str, Any]]
_TEMPLATE = "tokenizer.chat_template"
_REASONING_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_TAIL = 16  # tokens; what a prompt ends with


@dataclass(frozen=True, slots=True)
class Templates:
    """Where a prompt's form comes from: `source` says it in words for people to read."""

    source: str
    harmony: bool = False
    plain: str | None = None
    with_tools: str | None = None  # used where a request has tools, if there is one


class ChatFormat:
    """Renders prompts and parses outputs for one model. Safe to use from several threads.

    Attributes:
        source: "harmony", "file", "built-in chatml", ..., or "none" for a model that has no
            chat format: rendering then raises ChatTemplateError.
    """

    def __init__(self, templates: Templates, tokenizer: Tokenizer) -> None:
        self.source = templates.source
        self._templates = templates
        self._tokenizer = tokenizer
        self._shield = Shield(tokenizer.vocabulary)

    @classmethod
    def from_gguf(
        cls, file: GGUFFile, tokenizer: Tokenizer, template: str | None = None
    ) -> ChatFormat:
        """The chat format of a file; `template` replaces the file's own (from the operator of
        this program only, never from a request)."""
        return cls.from_metadata(file.metadata, tokenizer, template)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], tokenizer: Tokenizer, template: str | None = None
    ) -> ChatFormat:
        """The same from metadata that was read already."""
        return cls(_choose(metadata, tokenizer, template), tokenizer)

    def render(
        self,
        messages: Messages,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        **template_vars: Any,
    ) -> list[int]:
        """Token ids of a prompt.

        Args:
            messages: OpenAI-style, `content` a string or text parts; `tool_calls`, tool results
                and `reasoning_content` as there.
            tools: OpenAI-style definitions.
            add_generation_prompt: end where the assistant begins to write.
            template_vars: what the template knows, e.g. `enable_thinking=False` or
                `reasoning_effort="low"`.

        Raises RequestError where a message is malformed, ChatTemplateError where the template
        refuses or fails. BOS is added where the model wants it and the template did not.
        """
        text, sentinel = self._text(messages, tools, add_generation_prompt, template_vars)
        pieces = self._tokenizer.partition(text, parse_special=True)
        clean = [p if isinstance(p, int) else without(p, sentinel) for p in pieces]
        ids = self._tokenizer.encode_pieces(piece for piece in clean if piece != "")
        bos = self._tokenizer.bos_id
        if self._tokenizer.vocabulary.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def render_text(
        self,
        messages: Messages,
        tools: Messages | None = None,
        add_generation_prompt: bool = True,
        **template_vars: Any,
    ) -> str:
        """The prompt as text, to look at: tokenising it would read what users wrote as special
        tokens, which `render` does not."""
        text, sentinel = self._text(messages, tools, add_generation_prompt, template_vars)
        return without(text, sentinel)

    def parser(
        self, prompt: Sequence[int] | None = None, tools: Messages | None = None
    ) -> OutputParser:
        """A parser for the output that follows a prompt.

        Args:
            prompt: what `render` gave. It tells whether reasoning was opened; without it the
                template's usual ending is taken.
            tools: the request's tools; None if not known, empty: no calls are looked for.
        """
        if self._templates.harmony:
            return HarmonyParser(self._tokenizer)
        thinking = False
        if self._text_format.reasoning:
            opens = self._text_format.reasoning[0]
            tail = self._usual_ending if prompt is None else self._tail(prompt)
            thinking = tail.rstrip().endswith(opens)
        return TextParser(self._tokenizer, self._text_format, thinking, tools)

    def _text(
        self, messages: Messages, tools: Messages | None, prompt: bool, variables: Mapping[str, Any]
    ) -> tuple[str, str]:
        """The prompt with protected contents, and the character that protects them."""
        checked, given = normalise(messages), check_tools(tools)
        template = self._templates.plain
        sentinel = self._shield.sentinel_for(checked, given, variables, template or "")
        if self._templates.harmony:
            written = self._protect(with_written_arguments(checked), sentinel)
            safe = self._shield.protect(given, sentinel)
            return render_harmony(written, safe, prompt, variables), sentinel
        if given and self._templates.with_tools:
            template = self._templates.with_tools
        if template is None:
            raise ChatTemplateError(
                "this model has no chat template; give one with --chat-template, "
                "or use plain completion"
            )
        context = self._variables(given, prompt, variables, sentinel)
        text = self._fill(template, context, checked, sentinel)
        if find(text, escaped(sentinel)) >= 0:
            text = text.replace(escaped(sentinel), sentinel)
        return text, sentinel

    def _fill(
        self, template: str, context: Message, messages: Sequence[Message], sentinel: str
    ) -> str:
        messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in messages]
        render = shared_renderer().render
        try:
            parsed = self._protect(with_parsed_arguments(messages), sentinel)
            return render(template, context | {"messages": parsed})
        except TemplateTypeError:
            # Some templates (DeepSeek's) join tool call arguments as strings.
            if not any("tool_calls" in message for message in messages):
                raise
        written = self._protect(with_written_arguments(messages), sentinel)
        return render(template, context | {"messages": written})

    def _protect(self, messages: Iterable[Message], sentinel: str) -> list[Message]:
        return [self._shield.protect_message(message, sentinel) for message in messages]

    def _variables(
        self,
        tools: Sequence[Message],
        prompt: bool,
        variables: Mapping[str, Any],
        sentinel: str,
    ) -> dict[str, Any]:
        texts, special = self._tokenizer.vocabulary.texts, self._tokenizer.vocabulary.special
        tokens = {
            f"{name}_token": texts[special[role]] if role in special else ""
            for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"))
        }
        return {
            **tokens,
            "tools": self._shield.protect(tools, sentinel) or None,
            "documents": None,
            "add_generation_prompt": prompt,
            **self._shield.protect(dict(variables), sentinel),
        }

    def _tail(self, prompt: Sequence[int]) -> str:
        return self._tokenizer.decode(list(prompt)[-_TAIL:])

    @cached_property
    def _usual_ending(self) -> str:
        try:
            return self.render_text([{"role": "user", "content": "?"}])
        except ChatTemplateError:
            return ""

    @cached_property
    def _text_format(self) -> TextFormat:
        template = (self._templates.plain or "") + (self._templates.with_tools or "")
        return _text_format(template, self._tokenizer)


def _choose(metadata: Mapping[str, Any], tokenizer: Tokenizer, template: str | None) -> Templates:
    vocabulary = tokenizer.vocabulary
    if template is not None:
        return Templates("given", plain=template)
    if all(vocabulary.id_of(mark) is not None for mark in MARKS):
        return Templates("harmony", harmony=True)
    own = metadata.get(_TEMPLATE)
    if isinstance(own, str) and own.strip():
        return Templates("file", plain=own, with_tools=metadata.get(f"{_TEMPLATE}.tool_use"))
    architecture = str(metadata.get("general.architecture", ""))
    has_experts = bool(metadata.get(f"{architecture}.expert_count"))
    default = default_template(architecture, vocabulary, has_experts)
    if default is None:
        return Templates("none")
    name, text = default
    return Templates(f"built-in {name}", plain=text)


def _text_format(template: str, tokenizer: Tokenizer) -> TextFormat:
    """What to look for in the output: what the template or the vocabulary speaks of."""

    def known(mark: str) -> bool:
        return mark in template or tokenizer.vocabulary.id_of(mark) is not None

    reasoning = next((tags for tags in _REASONING_TAGS if known(tags[1])), None)
    marked = (formats.HERMES, formats.MISTRAL, formats.DEEPSEEK, formats.PHI, formats.PYTHON_TAG)
    tools = [form for form in marked if known(form.opens)]
    if "functools" in template:
        tools.append(formats.FUNCTOOLS)
    if formats.PYTHON_TAG in tools or not tools:
        tools += [formats.BARE_JSON, formats.BARE_LIST]
    return TextFormat(reasoning, tuple(tools))
