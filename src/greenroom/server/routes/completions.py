"""OpenAI's completions: `POST /v1/completions`, with token-id prompts, echo and logprobs."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from greenroom.engine.output import TokenLogprob, TokenOutput
from greenroom.errors import RequestError
from greenroom.server.answer import collect, new_id
from greenroom.server.body import apart, read, takes
from greenroom.server.call import Call, given
from greenroom.server.generation import Generation
from greenroom.server.large import large_event
from greenroom.server.logprobs import completion_logprobs
from greenroom.server.protocol.openai import CompletionRequest
from greenroom.server.responder import streamed, whole
from greenroom.server.routes.chat import grammar_of, sampling_of, usage_body
from greenroom.server.stream import DONE, event

router = APIRouter(tags=["OpenAI"])
DEFAULT_TOKENS = 16  # OpenAI's


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt: the list is empty", "prompt")
    if isinstance(prompt[0], int):
        return [list(prompt)]
    return list(prompt)


def completion_call(body: CompletionRequest) -> Call:
    """What a completion asks for."""
    if body.best_of is not None and body.best_of != body.n:
        raise RequestError("best_of: only a value equal to n is supported", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens: 0 is only of use with echo", "max_tokens")
    limit = DEFAULT_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    of_prompt = body.logprobs if body.echo else None
    return Call(
        model=body.model,
        prompts=_prompts(body),
        sampling=sampling_of(body)
        | given(max_tokens=limit, logprobs=body.logprobs, prompt_logprobs=of_prompt),
        n=body.n,
        grammar=grammar_of(body.response_format),
        add_special=body.add_special_tokens,
    )


Row = tuple[int, TokenLogprob | None]


def _rows(outputs: Sequence[TokenOutput]) -> list[Row]:
    return [(o.token_id, TokenLogprob(o.logprob or 0.0, o.top_logprobs)) for o in outputs]


def _prompt_rows(tokens: Sequence[int], first: TokenOutput) -> list[Row]:
    return list(zip(tokens, first.prompt_logprobs or (), strict=True))


def _head(generation: Generation) -> dict[str, Any]:
    return {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": generation.served.name,
    }


async def _completion(generation: Generation, body: CompletionRequest) -> dict[str, Any]:
    tokenizer = generation.served.engine.tokenizer
    choices = []
    for index, answer in enumerate(await collect(generation)):
        tokens = generation.choices[index].tokens
        text, outputs = answer.text("content"), answer.outputs
        if body.max_tokens == 0:
            text, outputs = "", []
        rows = _rows(outputs) if body.logprobs is not None else []
        if body.echo:
            text = await generation.served.in_worker(tokenizer.decode, tokens) + text
            if body.logprobs is not None:
                rows = _prompt_rows(tokens, answer.outputs[0]) + rows
        logprobs = None
        if body.logprobs is not None:
            work = generation.served.in_worker
            logprobs = await work(completion_logprobs, tokenizer, rows)
        reason = "length" if body.max_tokens == 0 else answer.finish_reason
        choices.append(
            {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        )
    if body.max_tokens == 0:
        generation.usage.completion = 0
    return {**_head(generation), "choices": choices, "usage": usage_body(generation.usage)}


async def _chunks(generation: Generation, body: CompletionRequest) -> AsyncIterator[bytes]:
    head = _head(generation)
    tokenizer = generation.served.engine.tokenizer
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    open_usage = {"usage": None} if with_usage else {}
    offsets = [0] * len(generation.choices)
    begun = [not body.echo] * len(generation.choices)
    async for piece in generation.pieces():
        index, text = piece.choice, "".join(delta.text for delta in piece.deltas)
        rows = _rows([piece.output]) if body.logprobs is not None else []
        first = not begun[index]
        if first:
            tokens = generation.choices[index].tokens
            text = await generation.served.in_worker(tokenizer.decode, tokens) + text
            rows = _prompt_rows(tokens, piece.output) + rows if rows else rows
            begun[index] = True
        scores = None
        if len(rows) > 1:  # the prompt's
            work = generation.served.in_worker
            scores = await work(completion_logprobs, tokenizer, rows, offsets[index])
        elif rows:
            scores = completion_logprobs(tokenizer, rows, offsets[index])
        offsets[index] += len(text)
        choice = {
            "index": index,
            "text": text,
            "logprobs": scores,
            "finish_reason": piece.finish_reason,
        }
        found = {**head, "choices": [choice], **open_usage}
        yield await large_event(found) if first else event(found)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage_body(generation.usage)})
    yield DONE


@router.post("/v1/completions", **takes(CompletionRequest))
async def completions(request: Request) -> Response:
    """Text completions, whole or streamed."""
    body = await read(request, CompletionRequest)
    call = await apart(request, completion_call, body)
    if not body.stream:
        return await whole(request, call, lambda generation: _completion(generation, body))
    if body.max_tokens == 0:
        raise RequestError("max_tokens: 0 cannot be streamed", "max_tokens")
    return await streamed(request, call, lambda generation: _chunks(generation, body))
