"""The engine for Python programs without an event loop: prompts in, completions out; and what
would go where, before anything is loaded.

Holds no logic of its own beyond turning callbacks into iterators and lists.
"""

import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from greenroom.engine.config import EngineConfig
from greenroom.engine.engine import Engine
from greenroom.engine.jobs import Job
from greenroom.engine.load import Progress, load_engine
from greenroom.engine.output import Completion, TokenOutput
from greenroom.engine.params import SamplingParams
from greenroom.engine.planning import planned
from greenroom.errors import RequestError
from greenroom.gguf import GGUFFile
from greenroom.placement.placement import Placement

Prompt = str | Items[int]


def plan(path: str | os.PathLike[str], **settings: Any) -> Placement:
    """What `LLM(path, **settings)` would place where on this machine; reads the header only.

    Args:
        path: a GGUF file, or the first of a split set.
        settings: fields of EngineConfig.

    Raises:
        ModelFileError, UnsupportedModelError: the file cannot be used.
        BudgetError, RequestError: the budget is too small, or a setting out of range.
    """
    with GGUFFile(path) as file:
        return planned(file, EngineConfig(**settings))


class LLM:
    """A model, loaded and ready.

    Ctrl-C during a call raises KeyboardInterrupt, drops the requests of that call and leaves
    the model usable.

    Args:
        path: a GGUF file, or the first of a split set.
        progress: called with bytes done and bytes in all while weights are loaded.
        settings: fields of EngineConfig.

    Raises:
        ModelFileError, UnsupportedModelError, TokenizerError, BudgetError: see load_engine.
        RequestError: a setting is out of range.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, progress: Progress | None = None, **settings: Any
    ) -> None:
        self.engine: Engine = load_engine(path, EngineConfig(**settings), progress)

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """The same interface on an engine that is already running."""
        llm = cls.__new__(cls)
        llm.engine = engine
        return llm

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.engine.tokenizer

    def generate(
        self, prompts: str | Items[str] | Items[Items[int]], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Completes prompts together, as one batch; one Completion per prompt, in order.

        Args:
            prompts: one text, several texts, or several lists of token ids. A text is
                encoded as the model asks for (with its beginning-of-text token, if any).
            params: for all prompts; a seed is counted up from prompt to prompt.

        Raises:
            ContextLengthError, RequestError: before anything is computed.
        """
        params = params or SamplingParams()
        batch: Items[Prompt] = [prompts] if isinstance(prompts, str) else prompts
        encoded = [self.encode(prompt) for prompt in batch]
        for tokens in encoded:
            self.engine.check(tokens, params)
        running: list[_Running] = []
        try:
            with self.engine.together():
                for index, tokens in enumerate(encoded):
                    running.append(self._start(tokens, _with_seed(params, index)))
            return [
                _completion(tokens, tuple(_outputs(request)))
                for tokens, request in zip(encoded, running, strict=True)
            ]
        finally:
            for request in running:
                self.engine.cancel(request.job)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[TokenOutput]:
        """Completes one prompt, token by token; closing the iterator cancels.

        Raises:
            ContextLengthError, RequestError: at once, before the first token is asked for.
        """
        tokens = self.encode(prompt)
        params = params or SamplingParams()
        self.engine.check(tokens, params)
        return self._stream(tokens, params)

    def chat(
        self,
        messages: Items[Mapping[str, Any]],
        params: SamplingParams | None = None,
        **template: Any,
    ) -> Completion:
        """Answers a conversation, rendered by the model's chat template.

        Args:
            messages: {"role": ..., "content": ...} each, the newest last.
            params: as for generate.
            template: further variables of the template.

        Returns:
            The raw answer; `llm.engine.chat.parser()` tells reasoning and content apart.

        Raises:
            ChatTemplateError: the model has no template, or it refuses the messages.
        """
        tokens = self.engine.chat.render(messages, **template)
        return self.generate([tokens], params)[0]

    def logits(self, tokens: Items[int]) -> NDArray[np.float32]:
        """(tokens, vocabulary) float32: the logits after each of the tokens."""
        results: SimpleQueue[Any] = SimpleQueue()
        job = self.engine.start_scoring(tokens, results.put)
        try:
            parts = []
            while (part := _take(results)) is not None:
                parts.append(part.copy())
        finally:
            self.engine.cancel(job)
        return np.concatenate(parts)

    def embed(self, tokens: Items[int]) -> NDArray[np.float32]:
        """(hidden,) float32: see Engine.embed."""
        results: SimpleQueue[Any] = SimpleQueue()
        job = self.engine.start_embedding(tokens, results.put)
        try:
            embedding: NDArray[np.float32] = _take(results)
        finally:
            self.engine.cancel(job)
        return embedding

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; text gets the special tokens the model asks for."""
        if isinstance(prompt, str):
            ids: list[int] = self.tokenizer.encode(prompt, add_special=True)
            return ids
        try:
            return [int(token) for token in prompt]
        except (TypeError, ValueError):
            message = "a prompt must be a text or a list of token ids"
            raise RequestError(message, "prompt") from None

    def close(self) -> None:
        """Stops the engine; requests of other threads end with EngineClosedError."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, tokens: list[int], params: SamplingParams) -> "_Running":
        results: SimpleQueue[Any] = SimpleQueue()
        return _Running(self.engine.start(tokens, params, None, results.put), results)

    def _stream(self, tokens: list[int], params: SamplingParams) -> Iterator[TokenOutput]:
        request = self._start(tokens, params)
        try:
            yield from _outputs(request)
        finally:
            self.engine.cancel(request.job)


class _Running(NamedTuple):
    job: Job
    results: "SimpleQueue[Any]"


def _take(results: "SimpleQueue[Any]") -> Any:
    item = results.get()
    if isinstance(item, BaseException):
        raise item
    return item


def _outputs(request: _Running) -> Iterator[TokenOutput]:
    while True:
        output: TokenOutput = _take(request.results)
        yield output
        if output.finish_reason is not None:
            return


def _completion(prompt: Items[int], outputs: tuple[TokenOutput, ...]) -> Completion:
    return Completion(
        text="".join(output.text for output in outputs),
        token_ids=tuple(output.token_id for output in outputs),
        finish_reason=outputs[-1].finish_reason or "",
        prompt_tokens=len(prompt),
        cached_tokens=outputs[0].cached_tokens,
        outputs=outputs,
    )


def _with_seed(params: SamplingParams, index: int) -> SamplingParams:
    if params.seed is None or not index:
        return params
    seed = params.seed + index
    return replace(params, seed=seed if seed < 2**64 else seed - 2**64)
