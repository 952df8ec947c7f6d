"""One loaded model and what the server needs around it: workers for the slow things that
must not run on the event loop, a grammar compiler, and the count of who is using it.
"""

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from greenroom.errors import ContextLengthError, RequestError
from greenroom.server.errors import ApiError
from greenroom.server.grammar import GrammarCompiler, GrammarConstraint, GrammarSpec

T = TypeVar("T")
_TOKENS = 1 << 18  # of a text: as many as may be counted where the context has less


class Served:
    """A model that answers requests.

    Args:
        name: what clients call it.
        engine: anything with the engine's interface.
        workers: threads for tokenising, rendering and grammars.
        queue: requests that may wait beyond those the engine runs at once.
    """

    def __init__(self, name: str, engine: Any, workers: Executor, queue: int) -> None:
        self.name, self.engine, self.workers = name, engine, workers
        self.created = int(time.time())
        self.grammars = GrammarCompiler(engine.tokenizer, _logit_columns(engine))
        if refuse := getattr(engine.tokenizer, "refuse_beyond", None):
            refuse(max(self.context_length, _TOKENS))
        self.users = 0  # leases held; see the registry
        self.expires: float | None = None  # time.time() at which it may be unloaded
        self._slots = engine.config.max_sequences
        self._limit = self._slots + queue
        self._admitted = 0
        self._mean_seconds = 1.0
        self._longest = 0  # characters of the longest token, once known

    @property
    def context_length(self) -> int:
        """Most tokens of prompt and answer together."""
        length = self.engine.config.context_length
        return int(length or self.engine.model_config.context_length)

    async def in_worker(self, work: Callable[..., T], *args: Any) -> T:
        """Runs slow, blocking work off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, work, *args)

    def admit(self, sequences: int) -> None:
        """Takes places in the queue.

        Raises:
            ApiError: 429 with Retry-After; there are not so many places left.
        """
        if sequences > self._limit:
            raise ApiError(
                400, f"this request asks for {sequences} sequences; at most {self._limit} fit"
            )
        if self._admitted + sequences > self._limit:
            rounds = math.ceil(self._admitted / self._slots)
            seconds = min(60, max(1, round(rounds * self._mean_seconds)))
            message = f"{self._admitted} sequences are running or waiting; try again later"
            raise ApiError(429, message, headers={"Retry-After": str(seconds)})
        self._admitted += sequences

    def leave(self, sequences: int, seconds: float) -> None:
        """Gives the places back, and notes how long the request took."""
        self._admitted -= sequences
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Token ids of a conversation by the model's own chat template.

        Raises:
            RequestError: the model has none.
        """
        chat = self.engine.chat
        if chat is None:
            raise RequestError(
                f"{self.name} has no chat template; use /v1/completions or /api/generate with raw",
                "messages",
            )

        def work() -> list[int]:
            return list(
                chat.render(
                    list(messages),
                    tools=list(tools) or None,
                    add_generation_prompt=add_generation_prompt,
                    **(variables or {}),
                )
            )

        return await self.in_worker(work)

    async def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of plain text; nothing in it becomes a control token."""
        encode = self.engine.tokenizer.encode
        return list(await self.in_worker(lambda: encode(text, add_special=add_special)))

    def check_length(self, characters: int, field: str) -> None:
        """Refuses a text that cannot fit, before it costs the time to tokenise it."""
        if not hasattr(self.engine.tokenizer, "vocabulary"):
            return
        if not self._longest:
            self._longest = max(map(len, self.engine.tokenizer.vocabulary.texts))
        # A token covers at most as many characters as its text has; normalising may merge some.
        most = 4 * self._longest * self.context_length
        if characters > most:
            raise ContextLengthError(
                f"{field}: {characters} characters are more than the context of "
                f"{self.context_length} tokens can hold",
                field,
            )

    def check_prompt(
        self, tokens: Sequence[int], answer: int | None, limit: int | None, field: str
    ) -> None:
        """Refuses a prompt that is empty, too long, or has ids the model does not know."""
        if not tokens:
            raise RequestError(f"{field}: the prompt is empty", field)
        size = self.engine.tokenizer.vocabulary_size
        if max(tokens) >= size:
            message = f"{field}: token {max(tokens)} is outside the vocabulary of {size}"
            raise RequestError(message, field)
        context = min(limit or self.context_length, self.context_length)
        wanted = len(tokens) + (answer or 1)
        if wanted > context:
            raise ContextLengthError(
                f"{field}: {len(tokens)} prompt tokens and {answer or 1} to generate are "
                f"{wanted}, more than the context of {context}",
                field,
            )

    async def compile(self, spec: GrammarSpec, seconds: float) -> GrammarConstraint:
        """A grammar ready for one answer.

        Raises:
            RequestError: it is wrong or takes longer to compile than `seconds`.
        """
        work = self.in_worker(self.grammars.compile, spec)
        try:
            return await asyncio.wait_for(work, seconds)
        except TimeoutError:
            message = f"{spec.field}: compiling it takes longer than {seconds:g} s"
            raise RequestError(message, spec.field) from None


def _logit_columns(engine: Any) -> int | None:
    """Columns of the model's logits, where the engine says."""
    return getattr(engine.model_config, "vocabulary_size", None)
