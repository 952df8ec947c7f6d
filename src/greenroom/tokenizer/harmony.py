"""Prompts in the Harmony format of gpt-oss.

Every message has a role, perhaps a recipient, and a channel: `analysis` for thoughts,
`commentary` for tool calls, `final` for the answer. The functions here write text; who wrote
what is checked before and protected around it.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from greenroom.errors import RequestError
from greenroom.tokenizer.messages import Message
from greenroom.tokenizer.typescript import namespace

MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
EFFORTS = ("low", "medium", "high")
_VARIABLES = ("reasoning_effort", "model_identity", "knowledge_cutoff", "current_date")


def render_harmony(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """The text of a conversation.

    Args:
        messages: normalised, tool call arguments as JSON strings. What system and developer
            messages say at the beginning becomes the developer message's instructions.
        tools: OpenAI-style definitions.
        add_generation_prompt: end where the assistant begins to write.
        variables: reasoning_effort ("low", "medium", "high"), model_identity, knowledge_cutoff
            and current_date; RequestError for others.
    """
    _check(variables)
    lead = next(
        (n for n, m in enumerate(messages) if m["role"] not in ("system", "developer")),
        len(messages),
    )
    parts = [_message("system", _system(variables, bool(tools)))]
    instructions = "\n\n".join(m["content"] for m in messages[:lead] if m["content"])
    sections = [f"# Instructions\n\n{instructions}"] if instructions else []
    sections += [namespace(tools)] if tools else []
    if sections:
        parts.append(_message("developer", "\n\n".join(sections)))
    answered = _last_answer(messages)
    parts += [_turn(m, thinks=n > answered) for n, m in enumerate(messages) if n >= lead]
    if add_generation_prompt:
        parts.append("<|start|>assistant")
    return "".join(parts)


def _check(variables: Mapping[str, Any]) -> None:
    for name in variables:
        if name not in _VARIABLES:
            raise RequestError(
                f"{name} is no variable of this chat format; known: {', '.join(_VARIABLES)}", name
            )
    effort = variables.get("reasoning_effort", "medium")
    if effort not in EFFORTS:
        raise RequestError(
            f"reasoning_effort must be one of {', '.join(EFFORTS)}; got {effort!r:.40}",
            "reasoning_effort",
        )


def _system(variables: Mapping[str, Any], has_tools: bool) -> str:
    default = "You are ChatGPT, a large language model trained by OpenAI."
    lines = [
        variables.get("model_identity", default),
        f"Knowledge cutoff: {variables.get('knowledge_cutoff', '2024-06')}",
        f"Current date: {variables.get('current_date') or date.today().isoformat()}",
        "",
        f"Reasoning: {variables.get('reasoning_effort', 'medium')}",
        "",
        "# Valid channels: analysis, commentary, final. "
        "Channel must be included for every message.",
    ]
    if has_tools:
        lines.append("Calls to these tools must go to the commentary channel: 'functions'.")
    return "\n".join(lines)


def _last_answer(messages: Sequence[Message]) -> int:
    """Index of the last final answer, or -1. What was thought before it is left out."""
    answers = (
        n
        for n, m in enumerate(messages)
        if m["role"] == "assistant" and m["content"] and not m.get("tool_calls")
    )
    return max(answers, default=-1)


def _turn(message: Message, thinks: bool) -> str:
    role, content = message["role"], message["content"]
    if role == "user":
        return _message("user", content)
    if role == "tool":
        name = message.get("name", "")
        return _message(f"functions.{name} to=assistant", content, "commentary")
    if role != "assistant":
        return _message("developer", f"# Instructions\n\n{content}")
    calls = message.get("tool_calls", ())
    out = ""
    if thinks and message.get("reasoning_content"):
        out += _message("assistant", message["reasoning_content"], "analysis")
    if content:
        out += _message("assistant", content, "commentary" if calls else "final")
    for call in calls:
        function = call["function"]
        out += (
            f"<|start|>assistant to=functions.{function['name']}<|channel|>commentary "
            f"<|constrain|>json<|message|>{function['arguments']}<|call|>"
        )
    return out


def _message(header: str, content: str, channel: str = "") -> str:
    channel = f"<|channel|>{channel}" if channel else ""
    return f"<|start|>{header}{channel}<|message|>{content}<|end|>"
