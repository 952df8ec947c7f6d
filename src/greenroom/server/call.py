"""One request of any API after validation and before a model is chosen for it.

The routes build a `Call`; `generation` runs it. Neither side knows the other's types.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from greenroom.errors import RequestError
from greenroom.server.grammar import GrammarSpec

Message = dict[str, Any]
_RESERVED = {"self", "messages", "tools", "documents", "add_generation_prompt"}
_RESERVED |= {f"{name}_token" for name in ("bos", "eos", "unk")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What is to be generated.

    Args:
        model: name the client used, or None for the only model.
        prompts: for completions, texts or token ids; empty for chat.
        messages: for chat, in the form chat templates expect.
        tools: function definitions in OpenAI's form.
        tool_choice: "auto", "none", "required" or the name of a function.
        parallel_tools: whether an answer may call more than one tool.
        variables: passed to the chat template.
        sampling: arguments of SamplingParams.
        n: answers per prompt.
        grammar: the form of the answer's content.
        context: a lower limit on prompt plus answer, in tokens.
        add_special: begin text prompts with BOS where the model wants it.
    """

    model: str | None
    prompts: Sequence[str | Sequence[int]] = ()
    messages: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    parallel_tools: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    grammar: GrammarSpec | None = None
    context: int | None = None
    add_special: bool = True

    def __post_init__(self) -> None:
        if not self.messages and not self.prompts:
            raise RequestError("messages: there is nothing to answer", "messages")
        if reserved := _RESERVED & set(self.variables):
            field = f"chat_template_kwargs.{min(reserved)}"
            raise RequestError(f"{field}: this name is not the client's to set", field)
        names = {tool["function"]["name"] for tool in self.tools}
        if self.tool_choice == "required" and not names:
            raise RequestError("tool_choice: 'required' needs tools", "tool_choice")
        if self.tool_choice not in {"auto", "none", "required"} | names:
            raise RequestError(
                f"tool_choice: there is no tool named {self.tool_choice!r}", "tool_choice"
            )

    @property
    def forced_tools(self) -> list[Mapping[str, Any]]:
        """The tools one of which must be called; empty unless tool_choice demands it."""
        if self.tool_choice in ("auto", "none"):
            return []
        chosen = self.tool_choice
        return [t for t in self.tools if chosen in ("required", t["function"]["name"])]


def given(**values: Any) -> dict[str, Any]:
    """The values that the client did give."""
    return {name: value for name, value in values.items() if value is not None}


def bias_by_id(bias: Mapping[str, float] | None) -> dict[int, float] | None:
    """JSON's string keys as token ids.

    Raises:
        RequestError: a key is not a whole number.
    """
    if bias is None:
        return None
    wrong = next((key for key in bias if not key.isascii() or not key.isdigit()), None)
    if wrong is not None:
        raise RequestError(f"logit_bias: {wrong!r} is not a token id", "logit_bias")
    return {int(key): value for key, value in bias.items()}


def check_bias(bias: Mapping[int, float], vocabulary_size: int) -> None:
    """Refuses a bias on tokens that do not exist."""
    worst = max(bias, default=0)
    if worst >= vocabulary_size:
        raise RequestError(
            f"logit_bias: token {worst} is outside the vocabulary of {vocabulary_size}",
            "logit_bias",
        )
