"""Anthropic's messages: `POST /v1/messages` and `/v1/messages/count_tokens`."""

import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from greenroom.errors import RequestError
from greenroom.server.answer import Answer, Block, collect, new_id
from greenroom.server.body import apart, read, takes
from greenroom.server.call import Call, given
from greenroom.server.generation import Generation
from greenroom.server.grammar import json_grammar
from greenroom.server.protocol.anthropic import (
    CountTokensRequest,
    Message,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from greenroom.server.responder import Json, state, streamed, whole
from greenroom.server.routes.chat import effort_variables
from greenroom.server.stream import event

router = APIRouter(tags=["Anthropic"])
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _text(content: str | Iterable[TextBlock] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(block.text for block in content)


def _assistant(message: Message) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": "assistant", "content": message.content}
    blocks = message.content
    if any(isinstance(block, ToolResultBlock) for block in blocks):
        raise RequestError("messages: tool_result belongs into a user message", "messages")
    calls = [
        {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": b.input}}
        for b in blocks
        if isinstance(b, ToolUseBlock)
    ]
    thinking = "".join(b.thinking for b in blocks if isinstance(b, ThinkingBlock))
    content = "".join(b.text for b in blocks if isinstance(b, TextBlock))
    return {"role": "assistant", "content": content} | given(
        tool_calls=calls or None, reasoning_content=thinking or None
    )


def _user(message: Message) -> list[dict[str, Any]]:
    """Tool results become messages of their own, before the text beside them."""
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    found: list[dict[str, Any]] = []
    texts = []
    for block in message.content:
        if isinstance(block, ToolResultBlock):
            content = _text(block.content)
            content = f"Error: {content}" if block.is_error else content
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif isinstance(block, TextBlock):
            texts.append(block.text)
        else:
            raise RequestError(f"messages: {block.type} belongs to the assistant", "messages")
    if not found and not texts:
        raise RequestError("messages: a user message has no content", "messages")
    return [*found, {"role": "user", "content": "".join(texts)}] if texts else found


def messages_call(body: CountTokensRequest) -> Call:
    """What a request asks for."""
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        messages += [_assistant(message)] if message.role == "assistant" else _user(message)
    tools = []
    for tool in body.tools or ():
        given_tool = given(description=tool.description, strict=tool.strict)
        function = {"name": tool.name, "parameters": tool.input_schema, **given_tool}
        tools.append({"type": "function", "function": function})
    choice = body.tool_choice
    names = {"auto": "auto", "any": "required", "none": "none"}
    form = body.output_config.format if body.output_config else None
    return Call(
        model=body.model,
        messages=messages,
        tools=tools,
        tool_choice=(names.get(choice.type) or choice.name or "") if choice else "auto",
        parallel_tools=not (choice and choice.disable_parallel_tool_use),
        variables=_thinking(body),
        sampling=_sampling(body) if isinstance(body, MessagesRequest) else {},
        grammar=json_grammar(form.schema_, "output_config.format.schema") if form else None,
    )


def _sampling(body: MessagesRequest) -> dict[str, Any]:
    return given(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=None if body.top_k is None else max(body.top_k, 0),
        stop=tuple(body.stop_sequences or ()) or None,
    )


def _thinking(body: CountTokensRequest) -> dict[str, Any]:
    """Template variables: an effort in words, or one for a budget of thinking tokens."""
    if body.output_config and body.output_config.effort:
        return effort_variables(body.output_config.effort)
    if body.thinking is None:
        return {}
    if body.thinking.type == "disabled":
        return effort_variables("none")
    budget = body.thinking.budget_tokens
    if budget is None:
        return effort_variables("medium")
    return effort_variables("low" if budget < 2048 else "medium" if budget < 8192 else "high")


def _usage(generation: Generation) -> dict[str, Any]:
    usage = generation.usage
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion,
    }


def _stop(answer: Answer) -> dict[str, Any]:
    reason = _REASONS.get(answer.finish_reason or "stop", "end_turn")
    if answer.stopped_by is not None and reason == "end_turn":
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": answer.stopped_by}


def _arguments(block: Block) -> Any:
    try:
        return json.loads(block.text or "{}")
    except ValueError:  # the model wrote no JSON: the client sees what it wrote
        return {"_raw": block.text}


def _content(block: Block, empty: bool = False) -> dict[str, Any]:
    if block.kind == "content":
        return {"type": "text", "text": "" if empty else block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": "" if empty else block.text, "signature": ""}
    arguments = {} if empty else _arguments(block)
    return {"type": "tool_use", "id": f"toolu_{block.id}", "name": block.name, "input": arguments}


def _message(generation: Generation, content: list[Any], stop: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": generation.served.name,
        "content": content,
        **stop,
        "usage": _usage(generation),
    }


async def _whole(generation: Generation) -> dict[str, Any]:
    (answer,) = await collect(generation)
    return _message(generation, [_content(block) for block in answer.blocks], _stop(answer))


def _delta(kind: str, text: str) -> dict[str, Any]:
    if kind == "content":
        return {"type": "text_delta", "text": text}
    if kind == "reasoning":
        return {"type": "thinking_delta", "thinking": text}
    return {"type": "input_json_delta", "partial_json": text}


def _named(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)


async def _events(generation: Generation) -> AsyncIterator[bytes]:
    nothing = {"stop_reason": None, "stop_sequence": None}
    yield _named("message_start", message=_message(generation, [], nothing))
    answer = Answer()
    async for piece in generation.pieces():
        for block, delta, opened in answer.add(piece):
            index = len(answer.blocks) - 1
            if opened and index:
                yield _named("content_block_stop", index=index - 1)
            if opened:
                start = _content(block, empty=True)
                yield _named("content_block_start", index=index, content_block=start)
            if delta.text:
                changed = _delta(delta.kind, delta.text)
                yield _named("content_block_delta", index=index, delta=changed)
    if answer.blocks:
        yield _named("content_block_stop", index=len(answer.blocks) - 1)
    yield _named("message_delta", delta=_stop(answer), usage=_usage(generation))
    yield _named("message_stop")


@router.post("/v1/messages", **takes(MessagesRequest))
async def messages(request: Request) -> Response:
    """A message, whole or streamed."""
    body = await read(request, MessagesRequest)
    call = await apart(request, messages_call, body)
    if body.stream:
        return await streamed(request, call, _events)
    return await whole(request, call, _whole)


@router.post("/v1/messages/count_tokens", **takes(CountTokensRequest))
async def count_tokens(request: Request) -> Response:
    """How many tokens a request's prompt would have."""
    body = await read(request, CountTokensRequest)
    call = await apart(request, messages_call, body)
    server = state(request)
    served = await server.registry.lease(call.model)
    try:
        (tokens,) = await server.runner.prompts(served, call)
    finally:
        server.registry.release(served)
    return Json({"input_tokens": len(tokens)})
