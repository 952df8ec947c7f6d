"""Runs a `Call`: leases the model, renders and tokenises, admits, streams from the engine.

The one place that the routes of all APIs go through, so limits, metrics and cancellation are
the same for each. Knows nothing of their formats.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from greenroom.engine.output import TokenOutput
from greenroom.engine.params import SamplingParams
from greenroom.errors import RequestError
from greenroom.server.call import Call, check_bias
from greenroom.server.deferral import after_reasoning
from greenroom.server.errors import ApiError
from greenroom.server.grammar import GrammarConstraint, GrammarSpec
from greenroom.server.metrics import Metrics
from greenroom.server.reading import (
    FamilyParser,
    ForcedToolParser,
    Parser,
    Piece,
    PlainParser,
    Reader,
    forced_tool_grammar,
)
from greenroom.server.registry import Registry
from greenroom.server.served import Served
from greenroom.server.settings import Caps

T = TypeVar("T")


@dataclass(slots=True)
class Usage:
    """Tokens of one request so far."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence for the engine."""

    prompt: int  # index of its prompt
    tokens: list[int]
    params: SamplingParams
    constraint: Any
    reader: Reader


class Generation:
    """A running request: iterate over its pieces, then close it.

    Attributes:
        served: the model that answers.
        choices: its sequences; `Piece.choice` indexes them.
        scored: whether log-probabilities were asked for.
        usage: tokens so far, complete after the last piece.
        started: time.perf_counter() when the request was admitted.
        first: the same for the first token, or None.
    """

    def __init__(
        self, served: Served, choices: Sequence[Choice], registry: Registry, metrics: Metrics
    ) -> None:
        self.served, self.choices = served, choices
        self.usage = Usage(prompt=sum(len(c.tokens) for c in _first_of_each_prompt(choices)))
        self.scored = any(choice.params.logprobs is not None for choice in choices)
        self.keep_alive: float | None = None
        self.started = time.perf_counter()
        self.first: float | None = None
        self._registry, self._metrics = registry, metrics
        self._last = [0.0] * len(choices)
        self._all = self._merged()
        self._begun: asyncio.Future[Piece | None] | None = None
        self._tasks: list[asyncio.Future[Any]] = []
        self._streams: list[Any] = []
        self._closed = False
        metrics.prompt_tokens.labels(served.name).inc(self.usage.prompt)
        # Looked up once: this is done for every token of every sequence.
        self._between = metrics.between.labels(served.name)
        self._generated = metrics.generated.labels(served.name)

    async def begin(self, seconds: float) -> None:
        """Starts, and waits a little for the first piece, so that an early error raises here,
        where it can still become an HTTP status.
        """
        self._begun = asyncio.ensure_future(_next(self._all))
        await asyncio.wait({self._begun}, timeout=seconds)
        if self._begun.done():
            self._begun.result()

    async def pieces(self) -> AsyncIterator[Piece]:
        """The pieces of all choices, in the order in which they come."""
        piece = await (self._begun or _next(self._all))
        while piece is not None:
            yield piece
            piece = await _next(self._all)

    async def _merged(self) -> AsyncIterator[Piece]:
        if len(self.choices) == 1:
            async for piece in self._follow(0):
                yield piece
            return
        queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._tasks = [asyncio.create_task(self._pump(i, queue)) for i in range(len(self.choices))]
        running = len(self._tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item

    async def _pump(self, index: int, queue: "asyncio.Queue[Piece | Exception | None]") -> None:
        try:
            async for piece in self._follow(index):
                queue.put_nowait(piece)
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    async def _follow(self, index: int) -> AsyncIterator[Piece]:
        choice = self.choices[index]
        stream = self.served.engine.stream(choice.tokens, choice.params, choice.constraint)
        self._streams.append(stream)
        async for output in stream:
            if output.finish_reason == "cancelled":
                raise ApiError(503, "the server ended this request", headers=_SOON)
            piece = choice.reader.read(output)
            self._note(index, output, piece)
            yield piece
            if piece.finish_reason:
                await stream.aclose()
                return

    def _note(self, index: int, output: TokenOutput, piece: Piece) -> None:
        """Counts a token."""
        usage, metrics, name = self.usage, self._metrics, self.served.name
        usage.completion += 1
        usage.cached += output.cached_tokens if not self._last[index] else 0
        if any(delta.kind == "reasoning" for delta in piece.deltas):
            usage.reasoning += 1
        now = output.time
        if self.first is None:
            self.first = now
            metrics.first_token.labels(name).observe(max(0.0, now - self.started))
        if self._last[index]:
            self._between.observe(max(0.0, now - self._last[index]))
        self._last[index] = now
        self._generated.inc()
        if piece.finish_reason:
            metrics.finished.labels(name, piece.finish_reason).inc()

    async def written(self, write: Callable[..., T], *args: Any) -> T:
        """`write(*args)`, in a worker if log-probabilities make it much."""
        if not self.scored:
            return write(*args)
        return await self.served.in_worker(write, *args)

    async def close(self) -> None:
        """Cancels what still runs and gives everything back; may be called twice."""
        if self._closed:
            return
        self._closed = True
        tasks = self._tasks + ([self._begun] if self._begun else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in self._streams:  # suspended now, so that closing reaches the engine
            await stream.aclose()
        seconds = time.perf_counter() - self.started
        self._metrics.whole.labels(self.served.name).observe(seconds)
        self.served.leave(len(self.choices), seconds)
        self._registry.release(self.served, self.keep_alive)


async def _next(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)


_SOON = {"Retry-After": "1"}


def _first_of_each_prompt(choices: Sequence[Choice]) -> list[Choice]:
    return list({choice.prompt: choice for choice in choices}.values())


class Runner:
    """Starts generations.

    Args:
        registry: the models.
        metrics: where tokens are counted.
        caps: limits of one request.
    """

    def __init__(self, registry: Registry, metrics: Metrics, caps: Caps) -> None:
        self.registry, self.metrics, self.caps = registry, metrics, caps
        self.draining = False

    async def start(self, call: Call, keep_alive: float | None = None) -> Generation:
        """A generation that is admitted; whoever gets it must close it.

        Raises:
            ApiError, RequestError: it cannot or may not run.
        """
        self.refuse_when_draining()
        served = await self.registry.lease(call.model)
        sequences = 0
        try:
            choices = await self._choices(served, call)
            served.admit(len(choices))
            sequences = len(choices)
            generation = Generation(served, choices, self.registry, self.metrics)
        except BaseException:
            served.leave(sequences, 0.0) if sequences else None
            self.registry.release(served, keep_alive)
            raise
        generation.keep_alive = keep_alive
        return generation

    def refuse_when_draining(self) -> None:
        """503 once the server is shutting down."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", headers={"Retry-After": "10"})

    async def prompts(self, served: Served, call: Call) -> list[list[int]]:
        """Token ids of the call's prompts."""
        if call.messages:
            contents = (message.get("content") for message in call.messages)
            served.check_length(sum(len(c) for c in contents if isinstance(c, str)), "messages")
            tools = () if call.tool_choice == "none" else call.tools
            return [await served.render(call.messages, tools, call.variables)]
        prompts: list[list[int]] = []
        for prompt in call.prompts:
            if isinstance(prompt, str):
                served.check_length(len(prompt), "prompt")
                prompts.append(await served.tokenize(prompt, call.add_special))
            else:
                prompts.append(list(prompt))
        return prompts

    async def _choices(self, served: Served, call: Call) -> list[Choice]:
        wanted = max(1, len(call.prompts)) * call.n
        if call.n > self.caps.choices or len(call.prompts) > self.caps.prompts:
            limit = self.caps.choices if call.n > self.caps.choices else self.caps.prompts
            field = "n" if call.n > self.caps.choices else "prompt"
            raise RequestError(f"{field}: {wanted} answers asked for, at most {limit}", field)
        check_bias(call.sampling.get("logit_bias", {}), served.engine.tokenizer.vocabulary_size)
        params = SamplingParams(**call.sampling)
        field = "messages" if call.messages else "prompt"
        prompts = await self.prompts(served, call)
        for tokens in prompts:
            served.check_prompt(tokens, params.max_tokens, call.context, field)
        grammar = await self._grammar(served, call)
        choices: list[Choice] = []
        for number, tokens in enumerate(prompts):
            for index in range(call.n):
                constraint = self._constraint(served, call, grammar, tokens)
                reader = self._reader(served, call, len(choices), tokens, params.stop)
                sampled = self._params(call, params, index, tokens)
                choices.append(Choice(number, tokens, sampled, constraint, reader))
                await asyncio.sleep(0)  # sixteen long prompts take their time
        return choices

    def _params(
        self, call: Call, params: SamplingParams, index: int, tokens: list[int]
    ) -> SamplingParams:
        """Of one choice: a seed of its own, and what the call's own context leaves."""
        if params.seed is not None and index:
            params = replace(params, seed=params.seed + index)
        if call.context is not None and params.max_tokens is None:
            params = replace(params, max_tokens=call.context - len(tokens))
        return params

    def _reader(
        self, served: Served, call: Call, position: int, tokens: list[int], stop: Sequence[str]
    ) -> Reader:
        parser = self._parser(served, call, tokens)
        tokenizer = served.engine.tokenizer
        return Reader(position, parser, stop, tokenizer, not call.parallel_tools)

    def _parser(self, served: Served, call: Call, tokens: list[int]) -> Parser:
        if not call.messages:
            return PlainParser()
        tools = () if call.forced_tools or call.tool_choice == "none" else call.tools
        parser = FamilyParser(served.engine.chat.parser(tokens, list(tools)))
        return ForcedToolParser(parser) if call.forced_tools else parser

    async def _grammar(self, served: Served, call: Call) -> GrammarConstraint | None:
        """The call's grammar, compiled."""
        forced = call.forced_tools
        spec = await served.in_worker(forced_tool_grammar, forced) if forced else call.grammar
        if spec is None:
            return None
        self._check_size(spec)
        return await served.compile(spec, self.caps.compile_seconds)

    def _constraint(
        self, served: Served, call: Call, grammar: GrammarConstraint | None, tokens: list[int]
    ) -> Any:
        """The grammar of one choice; in a chat it holds after the reasoning only."""
        if grammar is None:
            return None
        constraint = grammar.copy()
        if not call.messages:
            return constraint
        return after_reasoning(constraint, served.engine.tokenizer, tokens)

    def _check_size(self, spec: GrammarSpec) -> None:
        size = len(spec.text.encode())
        if size > self.caps.schema_bytes:
            raise RequestError(
                f"{spec.field}: {size} bytes, at most {self.caps.schema_bytes}", spec.field
            )
