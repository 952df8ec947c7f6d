"""OpenAI's chat completions: `POST /v1/chat/completions`."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from greenroom.errors import RequestError
from greenroom.server.answer import Answer, Block, collect, new_id
from greenroom.server.body import apart, read, takes
from greenroom.server.call import Call, bias_by_id, given
from greenroom.server.generation import Generation, Usage
from greenroom.server.grammar import GrammarSpec, json_grammar
from greenroom.server.logprobs import chat_logprobs
from greenroom.server.protocol.base import stop_strings
from greenroom.server.protocol.openai import (
    ChatCompletionRequest,
    Message,
    NamedTool,
    ResponseFormat,
    Sampling,
)
from greenroom.server.reading import Delta
from greenroom.server.responder import streamed, whole
from greenroom.server.stream import DONE, event

router = APIRouter(tags=["OpenAI"])


def template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it; `developer` is another word for `system`."""
    content = message.content
    if not isinstance(content, str):
        parts = content or []
        content = "".join(part.text if part.type == "text" else part.refusal for part in parts)
    role = "system" if message.role == "developer" else message.role
    calls = [
        {
            "id": call.id or new_id("call_"),
            "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments},
        }
        for call in message.tool_calls or ()
    ]
    reasoning = message.reasoning_content or message.reasoning
    return {"role": role, "content": content} | given(
        name=message.name,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id,
        reasoning_content=reasoning,
    )


def sampling_of(body: Sampling) -> dict[str, Any]:
    """Arguments of SamplingParams from the fields that OpenAI's APIs share."""
    top_k = None if body.top_k is None else max(body.top_k, 0)  # -1 also means all
    return given(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=bias_by_id(body.logit_bias),
        seed=body.seed,
        stop=stop_strings(body.stop) or None,
        ignore_eos=body.ignore_eos or None,
    )


def grammar_of(form: ResponseFormat | None) -> GrammarSpec | None:
    """The grammar that a `response_format` asks for."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return json_grammar(None, "response_format")
    if form.type == "json_schema":
        if form.json_schema is None:
            raise RequestError("response_format.json_schema: missing", "response_format")
        return json_grammar(form.json_schema.schema_, "response_format.json_schema.schema")
    key = "pattern" if form.type == "regex" else "grammar"
    text = form.pattern if form.type == "regex" else form.grammar
    if not text:
        raise RequestError(f"response_format.{key}: missing", f"response_format.{key}")
    return GrammarSpec(form.type, text, f"response_format.{key}")


def chat_call(body: ChatCompletionRequest) -> Call:
    """What a chat completion asks for."""
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs: needs logprobs to be true", "top_logprobs")
    choice = body.tool_choice or "auto"
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort:
        variables |= effort_variables(body.reasoning_effort)
    limit = body.max_completion_tokens or body.max_tokens
    return Call(
        model=body.model,
        messages=[template_message(message) for message in body.messages],
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        tool_choice=choice.function.name if isinstance(choice, NamedTool) else choice,
        parallel_tools=body.parallel_tool_calls is not False,
        variables=variables,
        sampling=sampling_of(body) | given(max_tokens=limit, logprobs=logprobs),
        n=body.n,
        grammar=grammar_of(body.response_format),
    )


def effort_variables(effort: str) -> dict[str, Any]:
    """Template variables for an effort: Harmony's levels, and the on/off switch of others."""
    level = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}.get(effort, effort)
    thinking = effort not in ("none", "minimal")
    return {"reasoning_effort": level, "enable_thinking": thinking, "thinking": thinking}


def usage_body(usage: Usage) -> dict[str, Any]:
    """`usage` of chat completions and completions."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    }


def _tool_call(block: Block) -> dict[str, Any]:
    function = {"name": block.name, "arguments": block.text}
    return {"id": f"call_{block.id}", "type": "function", "function": function}


def _message(answer: Answer) -> dict[str, Any]:
    content = answer.text("content")
    calls = [_tool_call(block) for block in answer.calls]
    message = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    if reasoning := answer.text("reasoning"):
        message["reasoning_content"] = reasoning
    return message | ({"tool_calls": calls} if calls else {})


def _logprobs(generation: Generation, call: Call, tokens: Any) -> dict[str, Any] | None:
    if call.sampling.get("logprobs") is None:
        return None
    tokenizer = generation.served.engine.tokenizer
    return {"content": chat_logprobs(tokenizer, tokens), "refusal": None}


async def _completion(generation: Generation, call: Call) -> dict[str, Any]:
    answers = await collect(generation)

    def written() -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(answer),
                "logprobs": _logprobs(generation, call, answer.tokens),
                "finish_reason": answer.finish_reason,
            }
            for index, answer in enumerate(answers)
        ]
        return _head(generation, "chat.completion") | {
            "choices": choices,
            "usage": usage_body(generation.usage),
        }

    return await generation.written(written)


def _head(generation: Generation, kind: str) -> dict[str, Any]:
    return {
        "id": new_id("chatcmpl-"),
        "object": kind,
        "created": int(time.time()),
        "model": generation.served.name,
        "service_tier": None,
        "system_fingerprint": None,
    }


def _delta(block: Block, delta: Delta, opened: bool) -> dict[str, Any]:
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.kind == "reasoning":
        return {"reasoning_content": delta.text}
    if not opened:
        return {"tool_calls": [{"index": delta.call, "function": {"arguments": delta.text}}]}
    call = _tool_call(block)
    call["function"]["arguments"] = delta.text
    return {"tool_calls": [{"index": delta.call, **call}]}


async def _chunks(
    generation: Generation, call: Call, with_usage: bool
) -> AsyncIterator[bytes]:  # fmt: skip
    head = _head(generation, "chat.completion.chunk")
    answers = [Answer() for _ in generation.choices]
    open_usage = {"usage": None} if with_usage else {}

    def chunk(index: int, delta: Any, reason: Any = None, logprobs: Any = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event({**head, "choices": [choice], **open_usage})

    for index in range(len(answers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for piece in generation.pieces():
        changes = answers[piece.choice].add(piece)
        logprobs = _logprobs(generation, call, piece.tokens) if piece.tokens else None
        for block, delta, opened in changes:
            of_content = logprobs if delta.kind == "content" else None
            yield chunk(piece.choice, _delta(block, delta, opened), None, of_content)
        if piece.finish_reason:
            yield chunk(piece.choice, {}, piece.finish_reason)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage_body(generation.usage)})
    yield DONE


@router.post("/v1/chat/completions", **takes(ChatCompletionRequest))
async def chat_completions(request: Request) -> Response:
    """A chat completion, whole or streamed."""
    body = await read(request, ChatCompletionRequest)
    call = await apart(request, chat_call, body)
    if not body.stream:
        return await whole(request, call, lambda generation: _completion(generation, call))
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    return await streamed(request, call, lambda g: _chunks(g, call, with_usage))
