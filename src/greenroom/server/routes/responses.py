"""OpenAI's responses: `POST /v1/responses`, stateless."""

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from greenroom.errors import RequestError
from greenroom.server.answer import Answer, Block, collect, new_id
from greenroom.server.body import apart, read, takes
from greenroom.server.call import Call, given
from greenroom.server.generation import Generation
from greenroom.server.grammar import GrammarSpec, json_grammar
from greenroom.server.logprobs import chat_logprobs
from greenroom.server.protocol.responses import (
    FunctionCall,
    FunctionCallOutput,
    InputMessage,
    NamedFunctionTool,
    ReasoningItem,
    ResponsesRequest,
    TextContent,
)
from greenroom.server.responder import streamed, whole
from greenroom.server.routes.chat import effort_variables
from greenroom.server.stream import event

router = APIRouter(tags=["OpenAI"])
_PREFIXES = {"content": "msg_", "reasoning": "rs_", "tool_call": "fc_"}


def _text(content: str | list[TextContent]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _messages(body: ResponsesRequest) -> Iterator[dict[str, Any]]:
    """The input as chat messages; reasoning and calls join the assistant's next turn."""
    if body.instructions:
        yield {"role": "system", "content": body.instructions}
    if isinstance(body.input, str):
        yield {"role": "user", "content": body.input}
        return
    turn: dict[str, Any] = {}
    for item in body.input:
        if isinstance(item, ReasoningItem):
            parts = item.content or item.summary or []
            turn["reasoning_content"] = "".join(part.text for part in parts)
        elif isinstance(item, FunctionCall):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
        elif isinstance(item, InputMessage) and item.role == "assistant":
            turn["content"] = turn.get("content", "") + _text(item.content)
        else:
            if turn:
                yield {"role": "assistant", "content": "", **turn}
                turn = {}
            yield _other(item)
    if turn:
        yield {"role": "assistant", "content": "", **turn}


def _other(item: InputMessage | FunctionCallOutput) -> dict[str, Any]:
    if isinstance(item, FunctionCallOutput):
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
    role = "system" if item.role == "developer" else item.role
    return {"role": role, "content": _text(item.content)}


def _grammar(body: ResponsesRequest) -> GrammarSpec | None:
    form = body.text.format if body.text else None
    if form is None or form.type == "text":
        return None
    if form.type == "json_schema" and form.schema_ is None:
        raise RequestError("text.format.schema: missing", "text.format.schema")
    return json_grammar(form.schema_, "text.format.schema")


def responses_call(body: ResponsesRequest) -> Call:
    """What a response asks for."""
    choice = body.tool_choice or "auto"
    effort = body.reasoning.effort if body.reasoning else None
    tools = [
        {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})}
        for tool in body.tools or ()
    ]
    logprobs = (body.top_logprobs or 0) if body.include or body.top_logprobs else None
    return Call(
        model=body.model,
        messages=list(_messages(body)),
        tools=tools,
        tool_choice=choice.name if isinstance(choice, NamedFunctionTool) else choice,
        parallel_tools=body.parallel_tool_calls is not False,
        variables=effort_variables(effort) if effort else {},
        sampling=given(
            max_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            logprobs=logprobs,
        ),
        grammar=_grammar(body),
    )


class _Writer:
    """One response's objects and events."""

    def __init__(self, generation: Generation, body: ResponsesRequest) -> None:
        self.generation, self.body = generation, body
        self.id, self.created = new_id("resp_"), time.time()
        self.answer = Answer()
        self.number = -1

    def event(self, kind: str, **fields: Any) -> bytes:
        self.number += 1
        return event({"type": kind, "sequence_number": self.number, **fields}, kind)

    def response(self, status: str, output: list[Any]) -> dict[str, Any]:
        """The response object, with what the client asked for."""
        body = self.body
        dumped = body.model_dump(exclude_none=True, by_alias=True)
        cut = status == "incomplete"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.generation.served.name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None} | dumped.get("reasoning", {}),
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": dumped.get("text", {"format": {"type": "text"}}),
            "tool_choice": dumped.get("tool_choice", "auto"),
            "tools": dumped.get("tools", []),
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        usage = self.generation.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
        }

    def part(self, block: Block, text: str) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        tokens = self.answer.tokens if text else []
        logprobs = chat_logprobs(self.generation.served.engine.tokenizer, tokens)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def item(self, block: Block, status: str) -> dict[str, Any]:
        """An output item; without its text while it is in progress."""
        begun = status == "in_progress"
        head = {"id": self.item_id(block), "status": status}
        if block.kind == "tool_call":
            arguments = "" if begun else block.text
            call = {"type": "function_call", "call_id": f"call_{block.id}", "name": block.name}
            return {**head, **call, "arguments": arguments}
        content = [] if begun else [self.part(block, block.text)]
        if block.kind == "reasoning":
            return {**head, "type": "reasoning", "summary": [], "content": content}
        return {**head, "type": "message", "role": "assistant", "content": content}

    def item_id(self, block: Block) -> str:
        return _PREFIXES[block.kind] + block.id

    def final(self) -> dict[str, Any]:
        status = "incomplete" if self.answer.finish_reason == "length" else "completed"
        items = [self.item(block, "completed") for block in self.answer.blocks]
        if status == "incomplete" and items:
            items[-1]["status"] = status
        return self.response(status, items)

    def closed(self, index: int) -> list[bytes]:
        """The events that end a block."""
        return list(_closed(self, self.answer.blocks[index], index))

    def last(self) -> bytes:
        """The event that ends the response."""
        final = self.final()
        return self.event(f"response.{final['status']}", response=final)


def _opened(writer: _Writer, block: Block, index: int) -> Iterator[bytes]:
    item = writer.item(block, "in_progress")
    yield writer.event("response.output_item.added", output_index=index, item=item)
    if block.kind != "tool_call":
        place = {"item_id": item["id"], "output_index": index, "content_index": 0}
        part = writer.part(block, "")
        yield writer.event("response.content_part.added", **place, part=part)


def _changed(writer: _Writer, block: Block, index: int, text: str) -> bytes:
    place = {"item_id": writer.item_id(block), "output_index": index}
    if block.kind == "tool_call":
        return writer.event("response.function_call_arguments.delta", **place, delta=text)
    if block.kind == "reasoning":
        return writer.event(
            "response.reasoning_text.delta", **place, content_index=0, delta=text
        )  # fmt: skip
    return writer.event(
        "response.output_text.delta", **place, content_index=0, delta=text, logprobs=[]
    )


def _closed(writer: _Writer, block: Block, index: int) -> Iterator[bytes]:
    place = {"item_id": writer.item_id(block), "output_index": index}
    if block.kind == "tool_call":
        yield writer.event(
            "response.function_call_arguments.done",
            **place,
            arguments=block.text,
            name=block.name,
        )
    else:
        place["content_index"] = 0
        text = {"text": block.text}
        if block.kind == "reasoning":
            yield writer.event("response.reasoning_text.done", **place, **text)
        else:
            yield writer.event("response.output_text.done", **place, **text, logprobs=[])
        part = writer.part(block, block.text)
        yield writer.event("response.content_part.done", **place, part=part)
    item = writer.item(block, "completed")
    yield writer.event("response.output_item.done", output_index=index, item=item)


async def _events(generation: Generation, body: ResponsesRequest) -> AsyncIterator[bytes]:
    writer = _Writer(generation, body)
    answer = writer.answer
    begun = writer.response("in_progress", [])
    yield writer.event("response.created", response=begun)
    yield writer.event("response.in_progress", response=begun)
    async for piece in generation.pieces():
        for block, delta, opened in answer.add(piece):
            index = len(answer.blocks) - 1
            if opened and index:
                for chunk in await generation.written(writer.closed, index - 1):
                    yield chunk
            if opened:
                for chunk in _opened(writer, block, index):
                    yield chunk
            if delta.text:
                yield _changed(writer, block, index, delta.text)
    if answer.blocks:
        for chunk in await generation.written(writer.closed, len(answer.blocks) - 1):
            yield chunk
    yield await generation.written(writer.last)


async def _whole(generation: Generation, body: ResponsesRequest) -> dict[str, Any]:
    writer = _Writer(generation, body)
    (writer.answer,) = await collect(generation)
    return await generation.written(writer.final)


@router.post("/v1/responses", **takes(ResponsesRequest))
async def responses(request: Request) -> Response:
    """A response, whole or streamed. Nothing is stored."""
    body = await read(request, ResponsesRequest)
    call = await apart(request, responses_call, body)
    if body.stream:
        return await streamed(request, call, lambda generation: _events(generation, body))
    return await whole(request, call, lambda generation: _whole(generation, body))
