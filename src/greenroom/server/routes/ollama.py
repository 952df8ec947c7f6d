"""Ollama's chat and generate: `POST /api/chat` and `/api/generate`."""

import json
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from greenroom.errors import RequestError
from greenroom.server.answer import Answer, collect
from greenroom.server.body import apart, read, takes
from greenroom.server.call import Call, given
from greenroom.server.generation import Generation
from greenroom.server.grammar import GrammarSpec, json_grammar
from greenroom.server.logprobs import chat_logprobs
from greenroom.server.protocol.base import stop_strings
from greenroom.server.protocol.ollama import ChatRequest, GenerateRequest, Message, Options
from greenroom.server.protocol.ollama import Generation as Body
from greenroom.server.responder import LINES, Json, state, streamed, whole
from greenroom.server.routes.chat import effort_variables
from greenroom.server.stream import line

router = APIRouter(tags=["Ollama"])
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_NANO = 1e9


def seconds_of(value: float | str | None) -> float | None:
    """Ollama's durations: seconds as a number, or `300s`, `5m`, `1h30m`, `-1` for ever."""
    if value is None or isinstance(value, int | float):
        return value
    if re.fullmatch(r"-?\d+(\.\d+)?", value):
        return float(value)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", value)
    if not parts or "".join(number + unit for number, unit in parts) != value.lstrip("-"):
        raise RequestError(f"keep_alive: {value!r} is no duration such as '5m'", "keep_alive")
    total = sum(float(number) * _UNITS[unit] for number, unit in parts)
    return -total if value.startswith("-") else total


def _sampling(body: Body) -> dict[str, Any]:
    options = body.options or Options()
    limit = options.num_predict
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return given(
        max_tokens=None if limit is None or limit < 0 else max(1, limit),
        temperature=options.temperature,
        top_k=None if options.top_k is None else max(options.top_k, 0),
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=options.seed,
        stop=stop_strings(options.stop) or None,
        logprobs=logprobs,
    )


def _grammar(body: Body) -> GrammarSpec | None:
    if not body.format:
        return None
    return json_grammar(None if isinstance(body.format, str) else body.format, "format")


def _variables(think: bool | str | None) -> dict[str, Any]:
    if think is None:
        return {}
    if isinstance(think, bool):
        return effort_variables("medium" if think else "none")
    return effort_variables(think)


def _common(body: Body, context: int) -> dict[str, Any]:
    asked = body.options.num_ctx if body.options else None
    if asked is not None and asked > context:
        raise RequestError(
            f"options.num_ctx: {asked} is more than the context of {context} this model is "
            "served with",
            "options.num_ctx",
        )
    return {
        "model": body.model,
        "sampling": _sampling(body),
        "grammar": _grammar(body),
        "context": asked,
    }


def _message(message: Message) -> dict[str, Any]:
    calls = [
        {"type": "function", "function": call.function.model_dump(include={"name", "arguments"})}
        for call in message.tool_calls or ()
    ]
    return {"role": message.role, "content": message.content or ""} | given(
        tool_calls=calls or None,
        reasoning_content=message.thinking or None,
        name=message.tool_name,
        tool_call_id=message.tool_call_id,
    )


def _chat_call(body: ChatRequest, context: int) -> Call:
    return Call(
        **_common(body, context),
        messages=[_message(message) for message in body.messages or ()],
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        variables=_variables(body.think),
    )


def _generate_call(body: GenerateRequest, context: int) -> Call:
    prompt = body.prompt or ""
    if body.raw:
        if body.system:
            raise RequestError("system: has no meaning with raw", "system")
        return Call(**_common(body, context), prompts=[prompt], add_special=False)
    system = [{"role": "system", "content": body.system}] if body.system else []
    messages = [*system, {"role": "user", "content": prompt}]
    return Call(**_common(body, context), messages=messages, variables=_variables(body.think))


def _arguments(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {"_raw": text}


class _Writer:
    """The lines of one answer.

    Args:
        generation: what runs.
        body: what was asked.
        started: time.perf_counter() when the request came, before the model was loaded.
    """

    def __init__(self, generation: Generation, body: Body, started: float) -> None:
        self.generation, self.body, self.started = generation, body, started
        self.chat = isinstance(body, ChatRequest)
        self.answer = Answer()

    def line(self, content: str = "", thinking: str = "", calls: Any = ()) -> dict[str, Any]:
        """One line that is not the last."""
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        head = {"model": self.generation.served.name, "created_at": now}
        show = thinking if self.body.think is not False else ""
        shown = {"thinking": show} if show else {}
        if not self.chat:
            return {**head, "response": content, **shown, "done": False}
        message = {"role": "assistant", "content": content, **shown}
        called = {"tool_calls": calls} if calls else {}
        return {**head, "message": message | called, "done": False}

    def calls(self) -> list[dict[str, Any]]:
        """All tool calls, complete: Ollama sends arguments as objects."""
        return [
            {
                "id": f"call_{block.id}",
                "function": {
                    "index": block.call,
                    "name": block.name,
                    "arguments": _arguments(block.text),
                },
            }
            for block in self.answer.calls
        ]

    def last(self) -> dict[str, Any]:
        """Counts and durations, in nanoseconds."""
        generation, now = self.generation, time.perf_counter()
        first = generation.first or now
        return {
            "done": True,
            "done_reason": "length" if self.answer.finish_reason == "length" else "stop",
            "total_duration": int((now - self.started) * _NANO),
            "load_duration": int((generation.started - self.started) * _NANO),
            "prompt_eval_count": generation.usage.prompt,
            "prompt_eval_duration": int((first - generation.started) * _NANO),
            "eval_count": generation.usage.completion,
            "eval_duration": int((now - first) * _NANO),
        }

    def whole(self) -> dict[str, Any]:
        """All in one."""
        answer = self.answer
        body = self.line(answer.text("content"), answer.text("reasoning"), self.calls())
        return body | self.last() | self.logprobs(answer.tokens)

    def logprobs(self, tokens: Any) -> dict[str, Any]:
        if not self.body.logprobs:
            return {}
        return {"logprobs": chat_logprobs(self.generation.served.engine.tokenizer, tokens)}


async def _lines(writer: _Writer) -> AsyncIterator[bytes]:
    async for piece in writer.generation.pieces():
        writer.answer.add(piece)
        content = "".join(d.text for d in piece.deltas if d.kind == "content")
        thinking = "".join(d.text for d in piece.deltas if d.kind == "reasoning")
        if content or thinking:
            yield line(writer.line(content, thinking) | writer.logprobs(piece.tokens))
    if calls := writer.calls():
        yield line(writer.line(calls=calls))
    yield line(writer.line() | writer.last())


async def _whole(writer: _Writer) -> dict[str, Any]:
    (writer.answer,) = await collect(writer.generation)
    return await writer.generation.written(writer.whole)


async def _respond(request: Request, body: Body, call: Call, started: float) -> Response:
    keep_alive = seconds_of(body.keep_alive)
    if body.stream is not False:
        return await streamed(
            request, call, lambda g: _lines(_Writer(g, body, started)), LINES, keep_alive
        )
    return await whole(request, call, lambda g: _whole(_Writer(g, body, started)), keep_alive)


async def _loaded(request: Request, body: Body, empty: bool) -> int | Response:
    """The model's context length; or the answer, where a request only loads or unloads it."""
    server = state(request)
    server.runner.refuse_when_draining()
    keep_alive = seconds_of(body.keep_alive)
    served = await server.registry.lease(body.model)
    context = served.context_length
    server.registry.release(served, keep_alive if empty else None)
    if not empty:
        return context
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    said: dict[str, Any] = {"response": ""}
    if isinstance(body, ChatRequest):
        said = {"message": {"role": "assistant", "content": ""}}
    reason = "unload" if keep_alive == 0 else "load"
    done = {"done": True, "done_reason": reason}
    return Json({"model": served.name, "created_at": now, **said, **done})


@router.post("/api/chat", **takes(ChatRequest))
async def chat(request: Request) -> Response:
    """A chat answer; streamed unless `stream` is false."""
    started = time.perf_counter()
    body = await read(request, ChatRequest)
    found = await _loaded(request, body, not body.messages)
    if isinstance(found, Response):
        return found
    call = await apart(request, _chat_call, body, found)
    return await _respond(request, body, call, started)


@router.post("/api/generate", **takes(GenerateRequest))
async def generate(request: Request) -> Response:
    """An answer to a prompt; streamed unless `stream` is false."""
    started = time.perf_counter()
    body = await read(request, GenerateRequest)
    found = await _loaded(request, body, not body.prompt)
    if isinstance(found, Response):
        return found
    call = await apart(request, _generate_call, body, found)
    return await _respond(request, body, call, started)
