"""The engine: schedule, run, hand out, over and over on a thread of its own, while callers
await their tokens. It knows the model only through the runner, and of a request only what
its job tells; servers and commands know nothing but this class.
"""

import asyncio
import contextlib
import logging
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as Items
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greenroom.engine.account import Account
from greenroom.engine.collect import Found
from greenroom.engine.config import ResolvedConfig
from greenroom.engine.jobs import Embedding, Generation, Job, Scoring, Sink
from greenroom.engine.kv_cache import BlockCache, GroupSize
from greenroom.engine.output import Constraint, TextStream, TokenOutput
from greenroom.engine.params import SamplingParams, check_lengths
from greenroom.engine.postbox import Postbox
from greenroom.engine.prefix_store import PrefixStore
from greenroom.engine.runner import ModelLike, Runner
from greenroom.engine.sampler import Sampler
from greenroom.engine.scheduler import Chunk, Scheduler
from greenroom.engine.sequence import Sequence, Want
from greenroom.errors import EngineClosedError, GreenroomError
from greenroom.layers.batch import KVCache
from greenroom.placement.enforce import give_back
from greenroom.placement.placement import Placement

log = logging.getLogger(__name__)

# Logits kept at once when every position of a prompt is wanted: 128 MiB of float32.
_SCORED_LOGITS = 2**25


class Engine:
    """Serves any number of concurrent requests on one model.

    Args:
        model: a loaded model.
        caches: its keys and values, one KVCache per layer, with the blocks config says.
        config: how many sequences, how long, how many blocks.
        tokenizer: decodes tokens and names the end tokens.
        chat: the model's chat format, or None.
        store: keeps prefixes that have to leave the caches, or None.
    """

    def __init__(
        self,
        model: ModelLike,
        caches: Items[KVCache],
        config: ResolvedConfig,
        tokenizer: Any,
        chat: Any = None,
        store: PrefixStore | None = None,
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.chat = chat
        self._model: ModelLike | None = model
        self.model_config = model.config
        groups = [
            GroupSize(spec.window, blocks)
            for spec, blocks in zip(model.kv_groups, config.cache_blocks, strict=True)
        ]
        self._blocks = BlockCache(
            groups,
            block_size=config.block_size,
            rows=config.max_sequences,
            context_length=config.context_length,
            reuse=config.prefix_cache,
            store=store,
        )
        self._scheduler = Scheduler(self._blocks, config.prefill_chunk)
        self._runner = Runner(model, caches, self._blocks)
        self.placement: Placement | None = None  # what was planned, where a file was loaded
        self._account = Account(model, caches, store)
        self._jobs: dict[Sequence, Job] = {}
        self._ready: list[tuple[Job, Any]] = []  # results to hand out
        self._counts: Counter[str] = Counter()
        self._inbox: list[Callable[[], None]] = []  # what other threads want done
        self._wake = threading.Condition()
        self._box: Postbox | None = None  # of the loop that asked last
        self._closed: EngineClosedError | None = None
        self._thread = threading.Thread(target=self._work, name="greenroom-engine", daemon=True)
        self._thread.start()

    # What callers use

    def stream(
        self,
        tokens: Items[int],
        params: SamplingParams,
        constraint: Constraint | None = None,
    ) -> AsyncIterator[TokenOutput]:
        """Generates; an async iterator of one TokenOutput per token, in time.

        Closing the iterator cancels the request within one step.

        Args:
            tokens: the prompt's ids, at least one.
            params: how to sample and when to stop.
            constraint: a grammar of this request's own, or None.

        Raises:
            ContextLengthError, RequestError: at once, if the request cannot be served.
            EngineClosedError: the engine was closed before the answer was complete.
        """
        self.check(tokens, params)
        return self._stream(partial(self.start, tokens, params, constraint))

    async def _stream(self, start: Callable[[Sink], Job]) -> AsyncIterator[TokenOutput]:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        job = start(partial(self._postbox().post, queue))
        try:
            while True:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self.cancel(job)

    async def embed(self, tokens: Items[int]) -> NDArray[np.float32]:
        """(hidden,) float32: the final hidden states of a text, pooled as the model says
        (mean if it does not); not normalised.
        """
        queue: asyncio.Queue[Any] = asyncio.Queue()
        job = self.start_embedding(tokens, partial(self._postbox().post, queue))
        try:
            item = await queue.get()
        finally:
            self.cancel(job)
        if isinstance(item, BaseException):
            raise item
        result: NDArray[np.float32] = item
        return result

    def _postbox(self) -> Postbox:
        loop = asyncio.get_running_loop()
        if self._box is None or self._box.loop is not loop:
            self._box = Postbox(loop)
        return self._box

    def stats(self) -> dict[str, Any]:
        """Requests waiting and running, cache use in blocks, counters since the start, and
        bytes of memory by part; on a GPU also what the driver and the allocator say of it.
        """
        return {
            "waiting": len(self._scheduler.waiting),
            "running": len(self._scheduler.running),
            "preemptions": self._scheduler.preemptions,
            "cache": self._blocks.report(),
            "block_size": self.config.block_size,
            "counts": dict(self._counts),
            **self._account(self.placement),
        }

    @property
    def model(self) -> ModelLike:
        """What computes; EngineClosedError says where it is gone."""
        if (model := self._model) is None:
            raise EngineClosedError(str(self._closed))
        return model

    def meter(self) -> None:
        """Has `stats()["layers"]` tell, from now on, what each layer's experts cost the CPU."""
        start = getattr(self.model, "meter", None)
        if start is not None:
            start()

    def close(self) -> None:
        """Ends every request with EngineClosedError, waits for the thread and frees the model's
        memory, whoever still holds this engine."""
        with self._wake:
            if self._closed is None:
                self._closed = EngineClosedError("the engine was closed")
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The same for callers without an event loop: results go to `sink` on the engine's thread

    def check(self, tokens: Items[int], params: SamplingParams | None = None) -> None:
        """Raises what is wrong with a request before it is queued."""
        asked = 0 if params is None else params.max_tokens or 1
        check_lengths(tokens, asked, self.model_config.vocabulary_size, self.config.context_length)

    def start(
        self,
        tokens: Items[int],
        params: SamplingParams,
        constraint: Constraint | None,
        sink: Sink,
    ) -> Job:
        """Queues a generation; `sink` takes TokenOutputs, or an exception as the last item."""
        self.check(tokens, params)
        scored = params.prompt_logprobs is not None
        sequence = self._sequence(tokens, "all" if scored else "next")
        sampler = Sampler(params, tokens, self.model_config.vocabulary_size, constraint)
        sequence.choice = sampler.choice if sampler.alone else None
        limit = self.config.context_length
        if params.max_tokens is not None:
            limit = len(tokens) + params.max_tokens
        ends = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self.tokenizer.eog_ids
        job = Generation(
            sequence,
            sink,
            params=params,
            sampler=sampler,
            text=TextStream(self.tokenizer.stream(context=tokens[-1:]), tuple(params.stop)),
            limit=limit,
            end_tokens=ends,
        )
        return self._submit(job)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Requests started inside are queued before any of them is computed, so that the same
        requests always share the same steps, and with them their last bits.
        """
        with self._wake:
            yield

    def start_scoring(self, tokens: Items[int], sink: Sink) -> Job:
        """Queues the computation of all logits of a text (see Scoring)."""
        self.check(tokens)
        return self._submit(Scoring(self._sequence(tokens, "all"), sink))

    def start_embedding(self, tokens: Items[int], sink: Sink) -> Job:
        """Queues the computation of a text's embedding (see Embedding)."""
        self.check(tokens)
        pooling = getattr(self.model_config, "pooling", None) or "mean"
        return self._submit(Embedding(self._sequence(tokens, "hidden"), sink, pooling))

    def cancel(self, job: Job) -> None:
        """Drops a request before the next step; nothing happens if it is already done."""
        self._call(partial(self._drop, job, "cancelled"))

    def _sequence(self, tokens: Items[int], want: Want) -> Sequence:
        room, plan = _SCORED_LOGITS, self.placement
        if plan is not None and plan.head_on_gpu:  # half of a step's bytes for logits and a copy
            room = min(room, plan.parts.get("activations", 0) // 16)
        limit = max(1, room // self.model_config.vocabulary_size)
        return Sequence(
            tokens,
            len(self._blocks.pools),
            want,
            reuse=want == "next",
            chunk_limit=limit if want == "all" else None,
        )

    def _submit(self, job: Job) -> Job:
        with self._wake:  # or the thread could end between the question and the call
            if self._closed is not None:
                raise EngineClosedError(str(self._closed))
            self._call(partial(self._add, job))
        return job

    def _call(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(action)
            self._wake.notify()

    # What happens on the engine's thread

    def _work(self) -> None:
        # The thread gives up the interpreter lock in every kernel call. With the default of
        # 5 ms, getting it back from a busy event loop would cost more than the kernel.
        sys.setswitchinterval(min(sys.getswitchinterval(), 2e-4))
        try:
            while self._gather():
                self._step()
        except BaseException as error:
            log.exception("the engine stopped")
            with self._wake:
                self._closed = EngineClosedError(f"the engine stopped after an error: {error}")
        finally:
            self._runner.end()
            self._deliver()
            with self._wake:
                actions, self._inbox = self._inbox, []
            for action in actions:
                action()
            for job in tuple(self._jobs.values()):
                self._fail(job, EngineClosedError(str(self._closed)))
            self._let_go()

    def _let_go(self) -> None:
        """Drops all that refers to weights, keys and values."""
        self._model = self._blocks.store = None
        self._account.close()
        del self._runner
        give_back()

    def _gather(self) -> bool:
        """Does what other threads asked for; waits while there is nothing to compute."""
        while True:
            if not self._jobs:
                self._deliver()
                self._runner.settle()
            with self._wake:
                while not (self._inbox or self._jobs or self._closed):
                    self._wake.wait()
                actions, self._inbox = self._inbox, []
            for action in actions:
                action()
            if self._closed or self._jobs:
                return self._closed is None

    def _step(self) -> None:
        chunks = self._scheduler.schedule(self._runner.under_way)
        for chunk, found in zip(chunks, self._run(chunks), strict=True):
            job = self._jobs.get(chunk.sequence)
            if job is None or found is None:  # it ended meanwhile
                continue
            if isinstance(found, Exception):
                self._fail(job, found)
            else:
                self._finish_chunk(job, chunk, found)
        self._counts["steps"] += 1

    def _run(self, chunks: list[Chunk]) -> Items[Found | Exception | None]:
        try:
            return self._runner.run(chunks, self._deliver, self._lasting(chunks))
        except Exception as error:
            if len(chunks) == 1:
                if not isinstance(error, GreenroomError):
                    log.exception("a request failed in the model")
                return [error]
        # One of them is to blame; alone, it fails alone. Positions are written again, which
        # changes nothing.
        return [self._alone(chunk) for chunk in chunks]

    def _alone(self, chunk: Chunk) -> Found | Exception | None:
        """The result of one chunk, or None if its job is over; it outlasts the next step."""
        found = self._run([chunk])[0] if chunk.sequence in self._jobs else None
        return found.copy() if isinstance(found, np.ndarray) else found

    def _lasting(self, chunks: list[Chunk]) -> bool:
        """Whether the next step is likely to be of the same sequences."""
        if self._inbox or not self._scheduler.steady(chunks):
            return False
        return all(self._jobs[chunk.sequence].lasting for chunk in chunks)

    def _finish_chunk(self, job: Job, chunk: Chunk, found: Found) -> None:
        self._scheduler.commit(chunk)
        tokens = len(job.sequence)
        try:
            results = job.consume(found)
        except Exception as error:
            if not isinstance(error, GreenroomError):
                log.exception("a request failed")
            self._fail(job, error)
            return
        self._counts["computed_tokens"] += chunk.end - chunk.start
        self._counts["generated_tokens"] += len(job.sequence) - tokens
        if job.finish_reason is not None:
            self._drop(job, job.finish_reason)  # whoever sees the last result sees it free
        self._ready += [(job, result) for result in results]

    def _deliver(self) -> None:
        """Hands out results; in a step that computes elsewhere it is done beside it."""
        ready, self._ready = self._ready, []
        for job, result in ready:
            try:
                job.sink(result)
            except Exception:  # nobody listens any more, e.g. the event loop is closed
                self._drop(job, "cancelled")

    def _add(self, job: Job) -> None:
        self._jobs[job.sequence] = job
        self._counts["prompt_tokens"] += job.sequence.prompt_length
        self._scheduler.add(job.sequence)

    def _drop(self, job: Job, reason: str) -> None:
        if self._jobs.pop(job.sequence, None) is not None:
            self._scheduler.remove(job.sequence)
            self._counts[f"finished_{reason}"] += 1
            self._counts["reused_tokens"] += job.sequence.reused

    def _fail(self, job: Job, error: Exception) -> None:
        self._drop(job, "error")
        self._deliver()  # what came before the error
        with contextlib.suppress(Exception):  # the caller may be gone
            job.sink(error)
